"""What a model says of completions: log-probs, values and scores, each prompt run once.

Here is the one shift between hidden states and targets: `hidden` gives the states that predict the
tokens, `token_hidden` those of the tokens themselves.
"""

import dataclasses

from flax import linen as nn
import jax.numpy as jnp

from ptjax.models import attention
from ptjax.models import head
from ptjax.models import transformer


def log_probs(config, params, prompt_tokens, prompt_lengths, tokens, *, packing=None,
              temperature=1.0, remat='none', with_entropy=True, chunk=None):
  """Log π of completion tokens: `head.score` of `hidden`.

  Args:
    config, params, prompt_tokens, prompt_lengths, tokens, packing, remat: see `hidden`.
    temperature, with_entropy, chunk: see `head.score`.
  Returns:
    As `head.score`.
  """
  states = hidden(config, params, prompt_tokens, prompt_lengths, tokens, packing=packing,
                  remat=remat)
  return head.score(config, params, states, tokens, temperature=temperature,
                    with_entropy=with_entropy, chunk=chunk)


def hidden(config, params, prompt_tokens, prompt_lengths, tokens, *, packing=None, remat='none'):
  """The hidden states that predict each completion token, each prompt run once for its group.

  Args:
    config: TransformerConfig.
    params: the parameter tree.
    prompt_tokens: [P, S] int32, padded on the right with anything; whole rows where packed.
    prompt_lengths: [P] int32, at least 1; not read where packed.
    tokens: [B, T] int32, B = P * G prompt-major, padded on the right with anything, ids out of
      range included. Where packed they stand in the rows already, and P = B.
    packing: types.Packing where rows hold several sequences, else None.
    remat: see `transformer.forward`.
  Returns:
    [B, T, width]: `[b, t]` predicts `tokens[b, t]`. Finite and without meaning on padding.
  """
  rows = _rows(config, params, prompt_tokens, prompt_lengths, tokens, packing, remat)
  if packing is not None:
    return _at(rows, packing.predictors)
  p, s = prompt_tokens.shape
  b, t = tokens.shape
  last = jnp.take_along_axis(rows, prompt_lengths[:, None, None] - 1, axis=1)  # [P, 1, width]
  last = jnp.broadcast_to(last[:, None], (p, b // p, 1, last.shape[-1]))
  own = rows[:, s:].reshape(p, b // p, t, -1)[:, :, :-1]
  out = jnp.concatenate([last, own], axis=2).reshape(b, t, -1)
  return nn.with_logical_constraint(out, ('batch', None, None))


def token_hidden(config, params, prompt_tokens, prompt_lengths, tokens, *, packing=None,
                 remat='none'):
  """The hidden states [B, T, width] of the completion tokens themselves; as `hidden` otherwise."""
  rows = _rows(config, params, prompt_tokens, prompt_lengths, tokens, packing, remat)
  if packing is not None:
    if packing.branches is not None:
      raise ValueError('a first token stands right behind its prompt in the first branch alone')
    return _at(rows, packing.predictors + 1)
  own = rows[:, prompt_tokens.shape[1]:].reshape(*tokens.shape, -1)
  return nn.with_logical_constraint(own, ('batch', None, None))


def _rows(config, params, prompt_tokens, prompt_lengths, tokens, packing, remat):
  """Hidden states of whole rows: [P, S + G * T, width], or [P, S, width] where packed."""
  (p, s), (b, t) = prompt_tokens.shape, tokens.shape
  if packing is not None:
    if b != p:
      raise ValueError(f'{b} rows of targets do not fit {p} packed rows')
    rows, positions = prompt_tokens, packing.positions.reshape(-1)
    attend = attention.packed(config, packing)
  else:
    if b % p:
      raise ValueError(f'{b} completions do not split over {p} prompts')
    rows = jnp.concatenate([prompt_tokens, tokens.reshape(p, -1)], axis=1)
    positions = attention.grouped_positions(prompt_lengths, s, b // p, t)
    attend = attention.grouped(config, prompt_lengths, s, b // p, t)
  states, _ = transformer.forward(
      config, params, rows.reshape(-1), positions, attend, remat=remat)
  return states.reshape(*rows.shape, -1)


def _at(rows, places):
  """The states [B, T, width] at `places` [B, T] of rows [B, S, width]; clipped to the row."""
  out = jnp.take_along_axis(rows, places[..., None], axis=1, mode='clip')
  return nn.with_logical_constraint(out, ('batch', None, None))


def scores(config, params, prompt_tokens, prompt_lengths, tokens, *, loss_mask, packing=None,
           remat='none'):
  """A reward model's score of each completion, read at its last trained token.

  Args:
    config: TransformerConfig with one label.
    params, prompt_tokens, prompt_lengths, tokens, remat: see `hidden`.
    loss_mask: [B, T] bool.
    packing: refused, for the rows' scores would be those of their last sequences.
  Returns:
    [B] float32; without meaning where a row trains no token.
  """
  if config.num_labels != 1:
    raise ValueError(f'a score needs one label, the model has {config.num_labels}')
  if packing is not None:
    raise ValueError('packed rows hold several sequences; scores are of one each')
  states = token_hidden(config, params, prompt_tokens, prompt_lengths, tokens, remat=remat)
  t = tokens.shape[1]
  last = jnp.where(loss_mask, jnp.arange(t)[None], 0).max(-1, keepdims=True)  # [B, 1]
  return transformer.head_scores(config, params['score'], _at(states, last))[:, 0, 0]


def token_scores(config, params, prompt_tokens, prompt_lengths, tokens, *, packing=None,
                 remat='none'):
  """A token classifier's logits [B, T, num_labels] float32 at each completion token itself."""
  states = token_hidden(config, params, prompt_tokens, prompt_lengths, tokens, packing=packing,
                        remat=remat)
  return transformer.head_scores(config, params['score'], states)


def values(config, params, states, prompt_tokens, prompt_lengths, tokens, *, critic_config=None,
           packing=None, remat='none'):
  """A critic's value of the state before each completion token.

  Args:
    config: the policy's TransformerConfig.
    params: a tree with 'critic': {'kernel': [width, 1], 'bias': [1]}, a head on the policy's own
      states, or the tree of a whole model with a score head.
    states: [B, T, width], the policy's, from `hidden`; read by such a head alone.
    prompt_tokens, prompt_lengths, tokens, packing, remat: what a whole model is run on.
    critic_config: its TransformerConfig; None: the policy's shape with one label.
  Returns:
    [B, T] float32, in the unit of the rewards: `[b, t]` depends on the prompt and
    `tokens[b, :t]`. Without meaning on padding.
  """
  critic = params['critic']
  if 'kernel' in critic:
    return transformer.head_scores(config, critic, states)[..., 0]
  critic_config = critic_config or dataclasses.replace(config, num_labels=1)
  states = hidden(critic_config, critic, prompt_tokens, prompt_lengths, tokens, packing=packing,
                  remat=remat)
  return transformer.head_scores(critic_config, critic['score'], states)[..., 0]
