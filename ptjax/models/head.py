"""The head over the vocabulary: log-probs and their like from hidden states, in chunks.

No array here is as large as all positions times the vocabulary, in the backward pass neither.
Where the derivative of what is minimised is known for each token as soon as its log-prob is
(`slope`), the gradient is made in the forward pass, from logits that are there: three products
with the head instead of four.
"""

import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ptjax import config as settings
from ptjax import sharding
from ptjax.models import transformer

# Positions of a device whose logits are held at once. On CPU they should fit its caches: at a
# vocabulary of 2k 512 positions are best, at 32k 128 are 1.2x faster than 512. With fewer still,
# adding up the head's gradient chunk by chunk costs more than all else (1.5x at 64).
_CHUNK_POSITIONS = 512
_LEAST_POSITIONS, _CPU_BYTES = 128, 2**24
DIFFERENTIABLE = 'log_probs', 'entropy', 'divergence'  # outputs of `score` that carry a gradient


def score(config, params, states, tokens, *, temperature=1.0, with_entropy=True,
          with_sum_squares=False, divergence=None, teacher=None, chunk=None, slope=None):
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
    slope: an object such as training.per_token.PerToken that gives the derivative, with respect to
      some of DIFFERENTIABLE, of the one objective these outputs will be differentiated for; what
      comes back through them in the backward pass is then not read. None: any objective.
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
  slopes = None
  if slope is not None:
    slopes, shared['scalars'], rows['arrays'] = slope.apply, slope.scalars, slope.arrays
    shared['total'] = jnp.zeros((config.width, config.vocab_size), jnp.float32)
  return _per_device(functools.partial(_in_chunks, one, slopes, chunk, positions))(shared, rows)


def chunk_positions(vocab_size):
  """How many positions' logits `score` holds at once on each device."""
  if jax.default_backend() != 'cpu':
    return _CHUNK_POSITIONS
  return min(_CHUNK_POSITIONS, max(_LEAST_POSITIONS, _CPU_BYTES // (4 * vocab_size)))


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


def _in_chunks(function, slopes, chunk, positions, shared, rows):
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

  parts = jax.tree.map(split, rows)
  if slopes is None:
    out = lax.map(jax.checkpoint(functools.partial(function, shared)), parts)
  else:
    out = _with_gradient(function, slopes, shared, parts)
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(b, -1)[:, :t], out)


def _with_gradient(function, slopes, shared, parts):
  """`lax.map` of `function` over `parts`, the gradient of kernel and states made on the way."""
  of_part = lambda kernel, states, others, rest: function(
      {**others, 'kernel': kernel}, {**rest, 'states': states})
  # The gradient of the kernel adds up as [width, V], also of one stored as [V, width]: on CPU
  # that product is up to 1.4x as fast.
  upright = lambda kernel: kernel.T if kernel.shape != shared['total'].shape else kernel
  stored = lambda kernel: kernel.T if kernel.shape != shared['kernel'].shape else kernel

  @jax.custom_vjp
  def run(kernel, states, others, rest):
    return lax.map(lambda part: of_part(kernel, part[0], others, part[1]), (states, rest))

  def forward(kernel, states, others, rest):
    def one(total, part):
      states, rest = part
      def outputs(kernel, states):
        out = of_part(stored(kernel), states, others, rest)
        return {name: out[name] for name in DIFFERENTIABLE if name in out}, out
      values, pull, out = jax.vjp(outputs, upright(kernel), states, has_aux=True)
      found = slopes(values, rest['arrays'], others['scalars'])
      of_kernel, of_states = pull(
          {name: found.get(name, jnp.zeros_like(x)) for name, x in values.items()})
      return total + of_kernel.astype(jnp.float32), (out, of_states)
    total, (out, of_states) = lax.scan(one, others['total'], (states, rest))
    return out, (stored(total).astype(kernel.dtype), of_states)

  run.defvjp(forward, lambda gradient, _: (*gradient, None, None))
  others = {name: x for name, x in shared.items() if name != 'kernel'}
  rest = {name: x for name, x in parts.items() if name != 'states'}
  return run(shared['kernel'], parts['states'], others, rest)


def _scores(logits, tokens, with_entropy, with_sum_squares):
  """What `score` returns, [B, chunk], of `tokens` under logits [B, chunk, V]."""
  logits = logits - lax.stop_gradient(logits.max(-1, keepdims=True))
  weights = jnp.exp(logits)  # at least one of them is 1
  total = weights.sum(-1)
  log_total = jnp.log(total)
  own = _of_tokens(logits, tokens, logits.shape[-1])  # at most 0, as the largest is subtracted
  out = {'log_probs': own - log_total, 'likeliest': own == 0.0}
  if with_entropy:
    out['entropy'] = log_total - jnp.sum(weights * logits, axis=-1) / total
  if with_sum_squares:
    fixed, fixed_total = lax.stop_gradient((logits, log_total))
    out['sum_squares'] = jnp.log(jnp.exp(2.0 * fixed).sum(-1)) - 2.0 * fixed_total
  return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _of_tokens(logits, tokens, size):
  """logits[..., token] of `size` = V, 0 where the id is out of range.

  Nothing of size V is written for it. Its gradient is a comparison, not a scatter: elementwise, so
  that it stays local where the vocabulary is split over devices.
  """
  index = jnp.where(tokens < 0, size, tokens)[..., None]
  return jnp.take_along_axis(logits, index, axis=-1, mode='fill', fill_value=0)[..., 0]


def _of_tokens_backward(size, tokens, gradient):
  hit = tokens[..., None] == jnp.arange(size)[None, None]
  return jnp.where(hit, gradient[..., None], 0), None


_of_tokens.defvjp(lambda logits, tokens, size: (_of_tokens(logits, tokens, size), tokens),
                  _of_tokens_backward)
