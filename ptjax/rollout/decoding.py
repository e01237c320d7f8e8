"""The compiled parts of a rollout, as pure functions: prefill, a chunk of steps, the result.

A slot is the place of one completion. Slots of a group lie together and share their prompt's
keys and values. Nothing here asks that slots be at the same step: each has its own length.
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
class Slots:
  """The completions in the making, K steps per chunk."""
  prompt_lengths: Any  # [P] int32
  keys: Any  # [B] PRNG keys, one per completion
  last: Any  # [B] int32; the newest token, whose key and value are not yet in the cache
  length: Any  # [B] int32; tokens so far; 0 where the slot only fills the mesh
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


def prefill(config, options, params, prompts, key, *, num_prompts, steps, capacity):
  """Runs every prompt once and draws the first token of each of its completions.

  Args:
    config: TransformerConfig.
    options: SamplingOptions.
    params: a list of parameter trees, layers stacked: of one model or of a mixture's.
    prompts: types.Prompts, P rows.
    key: the rollout's key.
    num_prompts: rows that count; the rest only fills the mesh.
    steps: K, steps of a chunk.
    capacity: tokens for which each completion's own cache has room at first.
  Returns:
    The prompt stores and the own caches, a list of a model's each, and the slots.
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
  unused = jnp.arange(p * g) >= num_prompts * g  # [B]
  slots = Slots(
      prompt_lengths=prompts.lengths,
      keys=streams.per_sequence(key, prompts.ids, prompts.sample_ids),
      last=jnp.zeros(p * g, jnp.int32), length=jnp.zeros(p * g, jnp.int32),
      done=unused, stopped=unused,
      tokens=jnp.zeros((p * g, options.max_tokens + steps), jnp.int32),
      log_probs=jnp.zeros((p * g, options.max_tokens + steps), jnp.float32))
  slots, log_probs = _draw(options, slots, logits)
  slots = slots.replace(tokens=slots.tokens.at[:, 0].set(slots.last),
                        log_probs=slots.log_probs.at[:, 0].set(log_probs))
  return list(stores), [cache.init_own(config, p * g, capacity) for _ in params], slots


def run_chunk(config, options, weights, store, own, slots, cuts, *, steps):
  """Decodes `steps` tokens in every slot; those that are done stand still.

  The loop is counted, not `while any slot lives`: a GPU would wait for the host at every step.

  Args:
    config, options: as in `prefill`.
    weights: a list, a model's from `decode_weights` each.
    store, own: lists of a model's per-layer prompt and own caches; own has room for all steps.
    slots: Slots.
    cuts: [B] int32; a completion of so many tokens is done (see stop.py).
    steps: K.
  Returns:
    The own caches and the slots.
  """
  start = slots.length
  slots = slots.replace(done=slots.done | (slots.length >= cuts))
  kept = slots.tokens, slots.log_probs  # written once per chunk, so kept out of the loop
  slots = slots.replace(tokens=None, log_probs=None)

  def step(carry, _):
    own, slots = carry
    index = slots.length - 1  # [B], of the token being run
    positions = jnp.repeat(slots.prompt_lengths, options.group_size) + index

    def run(weights, store, own):
      hidden, caches = transformer.forward(
          config, weights, slots.last, positions,
          attention.decode(config, slots.prompt_lengths, index, options.group_size),
          caches=cache.join(store, own))
      return transformer.logits(config, weights, hidden), cache.own_part(caches)

    logits, own = zip(*map(run, weights, store, own))
    slots, log_probs = _draw(options, slots, _mixed(options, logits))
    return (list(own), slots), (slots.last, log_probs)

  (own, slots), new = lax.scan(step, (own, slots), None, length=steps)
  # A live slot adds a token per step, so its new tokens are one run from where it started; the
  # K spare columns take what a finished slot writes past its end.
  place = jax.vmap(lambda row, run, i: lax.dynamic_update_slice(row, run, (i,)))
  tokens, log_probs = (place(old, run.T, start) for old, run in zip(kept, new))
  return own, slots.replace(tokens=tokens, log_probs=log_probs)


def finish(options, slots, cuts, *, num_prompts):
  """Cuts what went past a stop string and blanks all that is no token of a completion."""
  rows = num_prompts * options.group_size
  length = jnp.minimum(slots.length, cuts)[:rows]
  mask = jnp.arange(options.max_tokens)[None] < length[:, None]  # [B, T]
  clean = lambda x: jnp.where(mask, x[:rows, :options.max_tokens], 0)
  stopped = slots.stopped | (cuts <= options.max_tokens)
  return types.Rollouts(tokens=clean(slots.tokens), loss_mask=mask,
                        log_probs=clean(slots.log_probs), truncated=~stopped[:rows])


def newest(slots, start, steps):
  """The tokens [B, K] drawn since the slots had `start` [B] tokens."""
  take = jax.vmap(lambda row, i: lax.dynamic_slice(row, (i,), (steps,)))
  return take(slots.tokens, start)


def _mixed(options, logits):
  """The logits of a geometric mixture of models, or those of the only one."""
  if not options.mixture:
    return logits[0]
  log_probs = [jax.nn.log_softmax(x / (options.temperature or 1.0), axis=-1) for x in logits]
  mixed = sum(share * x for share, x in zip(options.mixture, log_probs))
  return mixed * (options.temperature or 1.0)  # by which the draw divides again


def _draw(options, slots, logits):
  """Appends one token to every slot that is not done.

  Returns:
    The slots, and the log-probs [B] of `slots.last`.
  """
  keys = jax.vmap(jax.random.fold_in)(slots.keys, slots.length)
  tokens, log_probs = sampling.sample(
      logits, keys, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
      min_p=options.min_p)
  tokens = jnp.where(slots.done, slots.last, tokens)
  length = slots.length + ~slots.done
  is_stop = jnp.zeros(tokens.shape, bool)
  for stop_id in options.stop_ids:
    is_stop |= tokens == stop_id
  stopped = slots.stopped | (is_stop & ~slots.done)
  done = slots.done | stopped | (length >= options.max_tokens)
  return slots.replace(last=tokens, length=length, done=done, stopped=stopped), log_probs
