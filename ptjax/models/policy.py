"""What a model says of completions: log-probs, values and scores, each prompt run once.

Here is the one shift between hidden states and targets: `hidden` gives the states that predict the
tokens, `token_hidden` those of the tokens themselves.
"""

import dataclasses
import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ptjax import config as settings
from ptjax import sharding
from ptjax.models import attention
from ptjax.models import transformer

# Positions of a device whose logits are held at once. On CPU they should fit its caches: at a
# vocabulary of 2k 512 positions are best, at 32k 128 are 1.2x faster than 512. With fewer still,
# adding up the head's gradient chunk by chunk costs more than all else (1.5x at 64).
_CHUNK_POSITIONS = 512
_LEAST_POSITIONS, _CPU_BYTES = 128, 2**24


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


def score(config, params, states, tokens, *, temperature=1.0, with_entropy=True,
          with_sum_squares=False, divergence=None, teacher=None, chunk=None):
  """Scores `tokens` under the hidden states that predict them.

  The logits exist for `chunk` tokens of every completion at a time, in the backward pass too.

  Args:
    config, params: the model.
    states: [B, T, width], from `hidden`.
    tokens: [B, T] int32.
    temperature: divides the logits of all outputs but the divergence; positive.
    with_entropy: whether to return the entropy too.
    with_sum_squares: whether to return `sum_squares`.
    divergence: `divergence(logits, teacher_logits)`, both [..., V] float32 at temperature 1, ->
      [...]; None: not returned.
    teacher: (TransformerConfig, params, states [B, T, its width]) for the divergence.
    chunk: tokens of each completion whose logits are held at once; None: 128 to 512 positions on
      each device, by the vocabulary.
  Returns:
    Dict of [B, T], finite and without meaning on padding:
      log_probs: float32, nats; `[b, t]` scores `tokens[b, t]`.
      likeliest: bool; whether no token is likelier.
      entropy: float32, nats, of the distribution that token was drawn from; differentiable.
      sum_squares: float32, log Σ_v π(v)² of that distribution; carries no gradient.
      divergence: float32; its gradient flows into the student alone.
  Raises:
    UserError: the teacher has another vocabulary.
  """
  shared = {'kernel': transformer.head_kernel(config, params)}
  rows = {'states': states, 'tokens': tokens}
  if divergence is not None:
    teacher_config, teacher_params, teacher_states = teacher
    if teacher_config.vocab_size != config.vocab_size:
      raise settings.UserError(
          f'a teacher with another vocabulary: {teacher_config.vocab_size} tokens, the student '
          f'{config.vocab_size}; choose one of the same family')
    shared['teacher_kernel'] = lax.stop_gradient(
        transformer.head_kernel(teacher_config, teacher_params))
    rows['teacher_states'] = lax.stop_gradient(teacher_states)

  def one(shared, part):
    logits = transformer.project(config, shared['kernel'], part['states'])  # [B, chunk, V]
    out = _scores(logits / temperature, part['tokens'], with_entropy, with_sum_squares)
    if divergence is not None:
      teacher_logits = transformer.project(
          teacher_config, shared['teacher_kernel'], part['teacher_states'])
      out['divergence'] = divergence(logits, teacher_logits)
    return out

  positions = chunk_positions(config.vocab_size)
  return _per_device(functools.partial(_in_chunks, one, chunk, positions))(shared, rows)


def chunk_positions(vocab_size):
  """How many positions' logits `score` holds at once on each device."""
  if jax.default_backend() != 'cpu':
    return _CHUNK_POSITIONS
  return min(_CHUNK_POSITIONS, max(_LEAST_POSITIONS, _CPU_BYTES // (4 * vocab_size)))


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


def _per_device(function):
  """Lets every device run `function(shared, rows) -> rows` on its own rows.

  Inside, the sums over rows of `shared`'s gradient stay local; they are added up over the devices
  once, outside. Left to the partitioner, a loop over chunks adds them up in every turn.
  """
  def run(shared, rows):
    mesh = jax.sharding.get_abstract_mesh()
    known = set(sharding.BATCH_AXES) <= set(mesh.axis_names)  # not outside `sharding.use`
    count = sharding.batch_size(mesh) if known else 1
    if count == 1 or any(x.shape[0] % count for x in jax.tree.leaves(rows)):
      return function(shared, rows)

    def local(shared, rows):
      shared = jax.tree.map(lambda x: lax.pcast(x, sharding.BATCH_AXES, to='varying'), shared)
      with nn.logical_axis_rules([rule for rule in sharding.LOGICAL_RULES if rule[0] != 'batch']):
        return function(shared, rows)
    by_row = PartitionSpec(sharding.BATCH_AXES)
    return jax.shard_map(local, in_specs=(PartitionSpec(), by_row), out_specs=by_row,
                         axis_names=set(sharding.BATCH_AXES))(shared, rows)
  return run


def _in_chunks(function, chunk, positions, shared, rows):
  """Maps `function(shared, rows)` over chunks of T of rows [B, T, ...], and puts them together.

  A chunk holds `chunk` of the T or, where that is None, about `positions` of the B * T.

  Chunks run along T: where B is split over devices after all (see `_per_device`), a scan over it
  would make every device compute every token.
  """
  b, t = rows['tokens'].shape
  if chunk is None:
    chunk = max(1, positions // b)
  count = -(-t // chunk)
  chunk = -(-t // count)  # as even as can be

  def split(x):  # [B, T, ...] -> [count, B, chunk, ...]
    widths = [(0, 0), (0, count * chunk - t)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths).reshape(b, count, chunk, *x.shape[2:]).swapaxes(0, 1)

  out = lax.map(jax.checkpoint(functools.partial(function, shared)), jax.tree.map(split, rows))
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(b, -1)[:, :t], out)


def _scores(logits, tokens, with_entropy, with_sum_squares):
  """What `score` returns, [B, chunk], of `tokens` under logits [B, chunk, V]."""
  logits = logits - lax.stop_gradient(logits.max(-1, keepdims=True))
  log_total = jnp.log(jnp.exp(logits).sum(-1))
  # A comparison instead of a gather: it stays local where the vocabulary is split over devices,
  # its gradient is elementwise, not a scatter, and an id out of range hits nothing.
  hit = tokens[..., None] == jnp.arange(logits.shape[-1])[None, None]
  own = jnp.sum(logits, axis=-1, where=hit)  # at most 0, as the largest is subtracted
  out = {'log_probs': own - log_total, 'likeliest': own == 0.0}
  if with_entropy:
    probs = jnp.exp(logits - log_total[..., None])
    out['entropy'] = log_total - jnp.sum(probs * logits, axis=-1)
  if with_sum_squares:
    fixed, fixed_total = lax.stop_gradient((logits, log_total))
    out['sum_squares'] = jnp.log(jnp.exp(2.0 * fixed).sum(-1)) - 2.0 * fixed_total
  return out
