"""The compiled parts of a rollout, as pure functions: prefill, a chunk of steps, the result.

Completions are counted prompt-major and split over the mesh with their prompts: each of X shards
holds N of them. A shard decodes in M slots, the rows of its own caches; a chunk runs n of them. All
that is chosen by row is chosen within a shard, so that nothing but the result crosses devices.
"""

from typing import Any

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp

from ptjax import keys as streams
from ptjax import types
from ptjax.models import attention
from ptjax.models import cache
from ptjax.models import transformer
from ptjax.rollout import logits as sampling


@struct.dataclass
class Completions:
  """Completions waiting, in the making and done; B = X * N, K steps per chunk."""
  prompt_lengths: Any  # [P] int32
  keys: Any  # [B] PRNG keys
  limits: Any  # [B] int32; most tokens of each; 0 where the row only fills the mesh
  last: Any  # [B] int32; the newest token, whose key and value are not yet in the cache
  length: Any  # [B] int32; tokens so far
  done: Any  # [B] bool
  stopped: Any  # [B] bool; True where a stop token ended the completion
  tokens: Any  # [B, T + K] int32; what stands past `length` means nothing
  log_probs: Any  # [B, T + K] float32, likewise


def decode_weights(config, params):
  """The weights as decoding wants them: matrices in the compute dtype, layers apart.

  Biases and norm scales, which some models use in float32, stay as they are.
  """
  def cast(path, leaf):
    matrix = path[-1].key in ('kernel', 'embedding')
    return leaf.astype(config.dtype) if matrix else leaf
  return transformer.split_layers(jax.tree_util.tree_map_with_path(cast, params))


def prefill(config, options, params, prompts, key, limits, *, slots, steps, capacity):
  """Runs every prompt once and draws the first token of each of its completions.

  Args:
    config: TransformerConfig.
    options: SamplingOptions.
    params: a list of parameter trees, layers stacked: of one model or of a mixture's.
    prompts: types.Prompts, P rows.
    key: the rollout's key.
    limits: [B] int32; most tokens of each completion, 0 where the row only fills the mesh.
    slots: X * M, rows of the own caches.
    steps: K, steps of a chunk.
    capacity: tokens for which a slot has room.
  Returns:
    The prompt stores and the own caches, a list of a model's each, and the completions.
  """
  p, s = prompts.tokens.shape
  g = options.group_size
  positions = jnp.broadcast_to(jnp.arange(s)[None], (p, s)).reshape(-1)

  def run(params):
    hidden, store = transformer.forward(
        config, params, prompts.tokens.reshape(-1), positions,
        attention.prefill(config, prompts.lengths, s))
    hidden = jnp.take_along_axis(
        hidden.reshape(p, s, -1), prompts.lengths[:, None, None] - 1, axis=1)[:, 0]  # [P, width]
    return transformer.logits(config, params, hidden), cache.split(store)

  logits, stores = zip(*map(run, params))
  logits = _mixed(options, logits)  # [P, V]
  logits = jnp.broadcast_to(logits[:, None], (p, g, logits.shape[-1])).reshape(p * g, -1)
  unused = limits == 0  # [B]
  made = Completions(
      prompt_lengths=prompts.lengths,
      keys=streams.per_sequence(key, prompts.ids, prompts.sample_ids), limits=limits,
      last=jnp.zeros(p * g, jnp.int32), length=jnp.zeros(p * g, jnp.int32),
      done=unused, stopped=unused,
      tokens=jnp.zeros((p * g, options.max_tokens + steps), jnp.int32),
      log_probs=jnp.zeros((p * g, options.max_tokens + steps), jnp.float32))
  made, log_probs = _draw(options, made, logits)
  made = made.replace(tokens=made.tokens.at[:, 0].set(made.last),
                      log_probs=made.log_probs.at[:, 0].set(log_probs))
  return list(stores), [cache.init_own(config, slots, capacity) for _ in params], made


def run_chunk(config, options, weights, store, own, made, cuts, slots, rows, *, steps, window):
  """Decodes `steps` tokens in the chosen slots; completions that are done stand still.

  The loop is counted, not `while any slot lives`: a GPU would wait for the host at every step.
  It works on a copy of the chosen slots' caches, no wider than needed, of which the new columns
  are written back: a copy is read `steps` times. Where all slots are chosen at full width, the
  caches are updated in place.

  Args:
    config, options: as in `prefill`.
    weights: a list, a model's from `decode_weights` each.
    store, own: lists of a model's per-layer prompt and own caches.
    made: Completions.
    cuts: [B] int32; a completion of so many tokens is done (see stop.py).
    slots: [X, n] int32 in [0, M), without repetition; all of them in order where n = M.
    rows: [X, n] int32 in [0, N), without repetition; the completion in each of these slots. Where
      n = N, all of them in order; a group then shares its prompt's keys, else they are copied.
    steps: K.
    window: columns of the own caches that the completions not done need, K new ones included.
  Returns:
    The own caches and the completions.
  """
  shards, n = rows.shape
  grouped = shards * n == made.length.shape[0]
  part = _take(made.replace(prompt_lengths=None, tokens=None, log_probs=None), rows)
  part = part.replace(done=part.done | (part.length >= _take(cuts, rows)))
  start = part.length
  group_size, prompt_lengths = options.group_size, made.prompt_lengths
  if not grouped:
    store, prompt_lengths = _take((store, prompt_lengths), rows // group_size)
    group_size = 1
  moved = slots if shards * n < own[0][0][0].shape[0] else None
  own_part = [cache.select(one, window, None if moved is None else lambda x: _take(x, moved))
              for one in own]

  # Sines and cosines once per step, outside the loop: inside, XLA on CPU makes them anew for the
  # queries, keys and cached keys of every layer. What a finished completion gets is of no use.
  behind = jnp.repeat(prompt_lengths, group_size)  # [X * n]
  rope_tables = transformer.make_rope_tables(
      config, (behind + start - 1)[None] + jnp.arange(steps)[:, None])  # [K, X * n, ...]

  def step(carry, rope_tables):
    own, part = carry
    index = part.length - 1  # [X * n], of the token being run
    positions = behind + index

    def run(weights, store, own):
      hidden, caches = transformer.forward(
          config, weights, part.last, positions,
          attention.decode(config, prompt_lengths, index, group_size),
          caches=cache.join(store, own), rope_tables=rope_tables)
      return transformer.logits(config, weights, hidden), cache.own_part(caches)

    logits, own = zip(*map(run, weights, store, own))
    part, log_probs = _draw(options, part, _mixed(options, logits))
    return (list(own), part), (part.last, log_probs)

  (own_part, part), (tokens, log_probs) = lax.scan(
      step, (own_part, part), rope_tables, length=steps)
  own = [cache.put_back(whole, one, slots, start - 1, steps)
         for whole, one in zip(own, own_part)]
  # A live slot adds a token per step, so its new tokens are one run from where it started; the
  # K spare columns take what a finished one writes past its end.
  columns = start.reshape(shards, n, 1) + jnp.arange(steps)[None, None]  # [X, n, K]
  place = rows[..., None], columns
  return own, made.replace(
      tokens=_put(made.tokens, place, tokens.T), log_probs=_put(made.log_probs, place, log_probs.T),
      **{name: _put(getattr(made, name), (rows,), getattr(part, name))
         for name in ('last', 'length', 'done', 'stopped')})


def finish(options, made, cuts, *, num_prompts):
  """Cuts what went past a stop string and blanks all that is no token of a completion."""
  rows = num_prompts * options.group_size
  length = jnp.minimum(made.length, cuts)[:rows]
  mask = jnp.arange(options.max_tokens)[None] < length[:, None]  # [B, T]
  clean = lambda x: jnp.where(mask, x[:rows, :options.max_tokens], 0)
  stopped = made.stopped | (cuts <= options.max_tokens)
  return types.Rollouts(tokens=clean(made.tokens), loss_mask=mask,
                        log_probs=clean(made.log_probs), truncated=~stopped[:rows])


def newest(made, start, rows, steps):
  """The tokens [X * n, K] drawn since the completions `rows` had `start` [B] tokens."""
  take = jax.vmap(lambda row, i: lax.dynamic_slice(row, (i,), (steps,)))
  return take(_take(made.tokens, rows), _take(start, rows))


def _take(tree, index):
  """Rows [X * n, ...] of arrays [X * N, ...]; `index` [X, n] counts within each shard."""
  def one(x):
    shards = x.reshape(index.shape[0], -1, *x.shape[1:])
    return jax.vmap(lambda shard, i: shard[i])(shards, index).reshape(-1, *x.shape[1:])
  return jax.tree.map(one, tree)


def _put(x, place, values):
  """Sets x [X * N, ...] at `place`, [X, n, ...] within each shard, to values [X * n, ...]."""
  shards = len(place[0])
  split = lambda y: y.reshape(shards, -1, *y.shape[1:])
  put = jax.vmap(lambda shard, index, new: shard.at[index].set(new, unique_indices=True))
  return put(split(x), place, split(values)).reshape(x.shape)


def _mixed(options, logits):
  """The logits of a geometric mixture of models, or those of the only one."""
  if not options.mixture:
    return logits[0]
  log_probs = [jax.nn.log_softmax(x / (options.temperature or 1.0), axis=-1) for x in logits]
  mixed = sum(share * x for share, x in zip(options.mixture, log_probs))
  return mixed * (options.temperature or 1.0)  # by which the draw divides again


def _draw(options, part, logits):
  """Appends one token to every completion that is not done.

  Returns:
    The completions, and the log-probs [B] of `last`.
  """
  keys = jax.vmap(jax.random.fold_in)(part.keys, part.length)
  tokens, log_probs = sampling.sample(
      logits, keys, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
      min_p=options.min_p)
  tokens = jnp.where(part.done, part.last, tokens)
  length = part.length + ~part.done
  is_stop = jnp.zeros(tokens.shape, bool)
  for stop_id in options.stop_ids:
    is_stop |= tokens == stop_id
  stopped = part.stopped | (is_stop & ~part.done)
  done = part.done | stopped | (length >= part.limits)
  return part.replace(last=tokens, length=length, done=done, stopped=stopped), log_probs
