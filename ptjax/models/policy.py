"""Log-probs of completions: the one shift between hidden states and targets."""

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from ptjax.models import attention
from ptjax.models import transformer

_CHUNK_POSITIONS = 512  # of the batch, per chunk; bounds the logits held at once


def log_probs(config, params, prompt_tokens, prompt_lengths, tokens, *, packing=None,
              temperature=1.0, remat='none', with_entropy=True, chunk=None):
  """Log π of completion tokens: `score` of `hidden`.

  Args:
    config, params, prompt_tokens, prompt_lengths, tokens, packing, remat: see `hidden`.
    temperature, with_entropy, chunk: see `score`.
  Returns:
    As `score`.
  """
  states = hidden(config, params, prompt_tokens, prompt_lengths, tokens, packing=packing,
                  remat=remat)
  return score(config, params, states, tokens, temperature=temperature,
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
  (p, s), (b, t) = prompt_tokens.shape, tokens.shape
  if packing is not None:
    if b != p:
      raise ValueError(f'{b} rows of targets do not fit {p} packed rows')
    states, _ = transformer.forward(
        config, params, prompt_tokens.reshape(-1), packing.positions.reshape(-1),
        attention.packed(config, packing.segments), remat=remat)
    return _at(states.reshape(p, s, -1), packing.predictors)
  if b % p:
    raise ValueError(f'{b} completions do not split over {p} prompts')
  g = b // p
  rows = jnp.concatenate([prompt_tokens, tokens.reshape(p, g * t)], axis=1)  # [P, S + G * T]
  states, _ = transformer.forward(
      config, params, rows.reshape(-1), attention.grouped_positions(prompt_lengths, s, g, t),
      attention.grouped(config, prompt_lengths, s, g, t), remat=remat)
  return _predicting(states.reshape(p, s + g * t, -1), prompt_lengths, s, g)


def score(config, params, hidden, tokens, *, temperature=1.0, with_entropy=True, chunk=None):
  """Scores `tokens` [B, T] under the hidden states [B, T, width] that predict them.

  The logits exist for `chunk` tokens of every completion at a time, in the backward pass too.
  Chunks run along T: B may be split over devices, and a scan over a split axis would make every
  device compute every token.

  Args:
    config, params: the model.
    hidden: [B, T, width], from `hidden`.
    tokens: [B, T] int32.
    temperature: divides the logits; positive.
    with_entropy: whether to return the entropy too (differentiable).
    chunk: tokens of each completion whose logits are held at once; None: about 512 / B.
  Returns:
    {'log_probs': [B, T] float32, nats: `[b, t]` scores `tokens[b, t]`; 'likeliest': [B, T] bool,
    whether no token is likelier; 'entropy': [B, T] float32, nats, of the distribution that token
    was drawn from}. Finite and without meaning on padding.
  """
  b, t = tokens.shape
  if chunk is None:
    chunk = max(1, _CHUNK_POSITIONS // b)
  count = -(-t // chunk)
  chunk = -(-t // count)  # as even as can be

  def chunks(x):  # [B, T, ...] -> [count, B, chunk, ...]
    widths = [(0, 0), (0, count * chunk - t)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths).reshape(b, count, chunk, *x.shape[2:]).swapaxes(0, 1)

  kernel = transformer.head_kernel(config, params)

  @jax.checkpoint
  def one(hidden, tokens):
    logits = transformer.project(config, kernel, hidden) / temperature  # [B, chunk, V]
    return _scores(logits, tokens, with_entropy)

  scores = lax.map(lambda inputs: one(*inputs), (chunks(hidden), chunks(tokens)))
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(b, -1)[:, :t], scores)


def _predicting(hidden, prompt_lengths, prompt_width, group_size):
  """The hidden states that predict each completion token.

  Args:
    hidden: [P, S + G * T, width].
  Returns:
    [P * G, T, width]: the prompt's last real position, then all completion tokens but the last.
  """
  p, _, width = hidden.shape
  last = jnp.take_along_axis(hidden, prompt_lengths[:, None, None] - 1, axis=1)  # [P, 1, width]
  last = jnp.broadcast_to(last[:, None], (p, group_size, 1, width))
  own = hidden[:, prompt_width:].reshape(p, group_size, -1, width)
  out = jnp.concatenate([last, own[:, :, :-1]], axis=2).reshape(p * group_size, -1, width)
  return nn.with_logical_constraint(out, ('batch', None, None))


def _at(hidden, places):
  """The states [B, T, width] at `places` [B, T] of rows [B, S, width]; clipped to the row."""
  out = jnp.take_along_axis(hidden, places[..., None], axis=1, mode='clip')
  return nn.with_logical_constraint(out, ('batch', None, None))


def _scores(logits, tokens, with_entropy):
  """What `score` returns, [B, chunk], of `tokens` under logits [B, chunk, V]."""
  logits = logits - lax.stop_gradient(logits.max(-1, keepdims=True))
  log_total = jnp.log(jnp.exp(logits).sum(-1))
  # A comparison instead of a gather: it stays local where the vocabulary is split over devices,
  # its gradient is elementwise, not a scatter, and an id out of range hits nothing.
  hit = tokens[..., None] == jnp.arange(logits.shape[-1])[None, None]
  own = jnp.sum(logits, axis=-1, where=hit)  # at most 0, as the largest is subtracted
  scores = {'log_probs': own - log_total, 'likeliest': own == 0.0}
  if with_entropy:
    probs = jnp.exp(logits - log_total[..., None])
    scores['entropy'] = log_total - jnp.sum(probs * logits, axis=-1)
  return scores
