"""What a token sees: each layout of rows is a function that builds an `attend` for the model.

`attend(query [N, heads, D], key [N, kv, D], value [N, kv, D], window, cache) -> (out [N, heads, D],
new_cache)`. A key at position j is visible to the query at position i iff j <= i and, where
window > 0, i - window < j. Heads share key/value heads in order (query head h reads h // R, with
R = heads / kv); keys and values are never expanded. Softmax is in float32.
"""

import chex
import jax
from jax import lax
import jax.numpy as jnp

from ptjax.models import cache as cache_lib
from ptjax.models import flash
from ptjax.models import layers

_MASKED = -1e30  # finite, so that a wholly masked part merges away instead of making NaN

# Causal attention goes by blocks of queries, each multiplied by the keys up to its own end alone.
# Measured on two CPU cores, value and gradient: 1.8x at 544 tokens, 2.0x at 1088; smaller blocks
# gain nothing more, and eight already leave out 7/16 of the square.
_BLOCK_QUERIES = 128
_MOST_BLOCKS = 8


def grouped_positions(prompt_lengths, prompt_width, group_size, completion_width):
  """Positions [P * (S + G * T)] int32 of the rows that `grouped` expects."""
  num_prompts = prompt_lengths.shape[0]
  in_prompt = jnp.broadcast_to(jnp.arange(prompt_width)[None], (num_prompts, prompt_width))
  after = prompt_lengths[:, None, None] + jnp.arange(completion_width)[None, None]  # [P, 1, T]
  after = jnp.broadcast_to(after, (num_prompts, group_size, completion_width))
  return jnp.concatenate(
      [in_prompt, after.reshape(num_prompts, -1)], axis=1).reshape(-1).astype(jnp.int32)


def grouped(config, prompt_lengths, prompt_width, group_size, completion_width):
  """Rows [P, S + G * T], flat: each prompt once, then its G completions.

  A completion's tokens see the prompt's first `prompt_lengths` tokens and, causally, their own
  completion; its token t stands at position prompt_length + t. What stands in the padding is
  never seen by a real token. No cache is made.

  Args:
    config: TransformerConfig; query_scale and attention_softcap are read.
    prompt_lengths: [P] int32.
    prompt_width, group_size, completion_width: S, G and T.
  """
  num_prompts, s, g, t = prompt_lengths.shape[0], prompt_width, group_size, completion_width

  def attend(query, key, value, window, cache):
    del cache
    _check(config, query, key, value, num_prompts * (s + g * t))
    if config.attention != 'xla':
      return flash.grouped(config, prompt_lengths, s, g, t, query, key, value, window), None
    heads, dim = query.shape[1:]
    kv = key.shape[1]
    query = query.reshape(num_prompts, s + g * t, kv, heads // kv, dim)
    key, value = (x.reshape(num_prompts, s + g * t, kv, dim) for x in (key, value))

    prompt_key, prompt_value = cache_lib.to_store(key[:, :s], value[:, :s])
    prompt_out = _normalized(_causal(
        config, query[:, :s].transpose(0, 2, 3, 1, 4), prompt_key, prompt_value, window))

    split = lambda x: x[:, s:].reshape(num_prompts, g, t, *x.shape[2:])
    query = split(query).transpose(0, 3, 1, 4, 2, 5)  # [P, kv, G, R, T, D]
    own = _causal(config, query, split(key).transpose(0, 3, 1, 4, 2),
                  split(value).transpose(0, 3, 1, 2, 4), window)
    shared = _on_prompt(config, query, prompt_key, prompt_value, prompt_lengths,
                        jnp.broadcast_to(jnp.arange(t)[None, None], (num_prompts, g, t)), window)
    out = _normalized(_merged(own, shared))  # [P, kv, G, R, T, D]

    prompt_out = prompt_out.transpose(0, 3, 1, 2, 4).reshape(num_prompts, s, heads, dim)
    out = out.transpose(0, 2, 4, 1, 3, 5).reshape(num_prompts, g * t, heads, dim)
    out = jnp.concatenate([prompt_out, out], axis=1).reshape(-1, heads, dim)
    return out.astype(config.dtype), None

  return attend


def prefill(config, prompt_lengths, prompt_width):
  """Rows [P, S], flat, causal; each layer's new cache is its part of the prompt store.

  Padding stands on the right, where causality hides it from real tokens and `decode` masks it
  by length.
  """
  num_prompts, s = prompt_lengths.shape[0], prompt_width

  def attend(query, key, value, window, cache):
    del cache
    _check(config, query, key, value, num_prompts * s)
    heads, dim = query.shape[1:]
    kv = key.shape[1]
    key, value = (x.reshape(num_prompts, s, kv, dim) for x in (key, value))
    store = cache_lib.to_store(key, value)
    if config.attention != 'xla':
      query = query.reshape(num_prompts, s, heads, dim)
      return flash.causal(config, query, key, value, window).reshape(-1, heads, dim), store
    query = query.reshape(num_prompts, s, kv, heads // kv, dim).transpose(0, 2, 3, 1, 4)
    out = _normalized(_causal(config, query, *store, window))  # [P, kv, R, S, D]
    out = out.transpose(0, 3, 1, 2, 4).reshape(-1, heads, dim)
    return out.astype(config.dtype), store

  return attend


def packed(config, packing):
  """Rows [B, S], flat, each holding several sequences side by side, causal within a sequence.

  Args:
    config: TransformerConfig; query_scale and attention_softcap are read.
    packing: types.Packing. Padding sees padding alone. A sequence's tokens stand together; where
      it has branches, a completion sees its prompt, which comes first, and itself. No cache is
      made.
  """
  rows, s = packing.segments.shape

  def attend(query, key, value, window, cache):
    del cache
    _check(config, query, key, value, rows * s)
    heads, dim = query.shape[1:]
    kv = key.shape[1]
    key, value = (x.reshape(rows, s, kv, dim) for x in (key, value))
    if config.attention != 'xla':
      everything = slice(0, s)
      out = flash.masked(config, query.reshape(rows, s, heads, dim), key, value,
                         _visible(packing, everything, everything, window))
      return out.reshape(-1, heads, dim), None
    query = query.reshape(rows, s, kv, heads // kv, dim).transpose(0, 2, 3, 1, 4)
    key, value = cache_lib.to_store(key, value)
    out = _normalized(_causal(config, query, key, value, window, packing))  # [B, kv, R, S, D]
    out = out.transpose(0, 3, 1, 2, 4).reshape(-1, heads, dim)
    return out.astype(config.dtype), None

  return attend


def decode(config, prompt_lengths, step, group_size):
  """One token for each of B = P * G completions, prompt-major.

  The cache of a layer is (prompt K, prompt V, own K, own V), see cache.py; the returned one holds
  the new token's key and value at own index `step`. The queries of a group are one matrix against
  the one copy of their prompt's keys.

  Args:
    config: TransformerConfig.
    prompt_lengths: [P] int32.
    step: [B] int32; own index of the token being run, whose position is prompt_length + step.
    group_size: G.
  """
  num_prompts, g = prompt_lengths.shape[0], group_size
  chex.assert_shape(step, (num_prompts * g,))

  def attend(query, key, value, window, cache):
    _check(config, query, key, value, num_prompts * g)
    heads, dim = query.shape[1:]
    kv = key.shape[1]
    prompt_key, prompt_value, own_key, own_value = cache
    own_key, own_value = cache_lib.write(own_key, own_value, key, value, step)

    query = query.reshape(num_prompts * g, kv, heads // kv, dim)
    at = jnp.arange(own_key.shape[-1])[None]  # [1, C]
    visible = (at <= step[:, None]) & _in_window(step[:, None] - at, window)  # [B, C]
    scores = _masked(_scores(config, query, own_key), visible[:, None, None])  # [B, kv, R, C]
    own = _partial(config, scores, own_value)

    query = query.reshape(num_prompts, g, kv, heads // kv, 1, dim).transpose(0, 2, 1, 3, 4, 5)
    shared = _on_prompt(config, query, prompt_key, prompt_value, prompt_lengths,
                        step.reshape(num_prompts, g, 1), window)  # [P, kv, G, R, 1, ...]
    shared = jax.tree.map(
        lambda x: x.swapaxes(1, 2).reshape(num_prompts * g, kv, heads // kv, x.shape[-1]), shared)
    out = _normalized(_merged(own, shared)).reshape(-1, heads, dim)
    return out.astype(config.dtype), (prompt_key, prompt_value, own_key, own_value)

  return attend


def _check(config, query, key, value, rows):
  """Programmer errors, found while tracing."""
  chex.assert_shape(query, (rows, config.num_heads, config.head_dim))
  chex.assert_shape([key, value], (rows, config.num_kv_heads, config.head_dim))


def _in_window(distance, window):
  """Whether a key `distance` tokens back is near enough."""
  if isinstance(window, int) and window == 0:
    return jnp.ones_like(distance, bool)
  return (distance < window) | (jnp.asarray(window) == 0)


def _scores(config, query, key):
  """query [..., M, D] by key [..., D, K], scaled and capped: [..., M, K] float32."""
  scores = layers.product(query, key, config.dtype) * config.query_scale
  if config.attention_softcap is not None:
    scores = jnp.tanh(scores / config.attention_softcap) * config.attention_softcap
  return scores


def _masked(scores, visible):
  return jnp.where(visible, scores, _MASKED)


def _partial(config, scores, value):
  """Softmax statistics over part of the keys.

  Args:
    scores: [..., M, K] float32, masked.
    value: [..., K, D].
  Returns:
    (maximum [..., M, 1], total [..., M, 1], weighted values [..., M, D]), float32: exponentials
    are relative to the maximum, which is a constant to the gradient (it cancels).
  """
  maximum = lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.exp(scores - maximum)
  return maximum, weights.sum(-1, keepdims=True), layers.product(weights, value, config.dtype)


def _merged(one, other):
  """Statistics over the keys of both parts; a part without visible keys gets weight zero."""
  maximum = jnp.maximum(one[0], other[0])
  scales = [jnp.exp(part[0] - maximum) for part in (one, other)]
  return maximum, *(one[i] * scales[0] + other[i] * scales[1] for i in (1, 2))


def _normalized(statistics):
  _, total, values = statistics
  return values / total


def causal_blocks(length):
  """Where `length` causal queries are cut: (start, stop) of each block."""
  count = min(-(-length // _BLOCK_QUERIES), _MOST_BLOCKS)
  size = -(-length // count)
  return [(start, min(start + size, length)) for start in range(0, length, size)]


def _causal(config, query, key, value, window, packing=None):
  """Tokens over their own sequence.

  Args:
    query: [..., R, T, D]. key: [..., D, T]. value: [..., T, D].
    packing: types.Packing of rows [B, T] that hold several sequences, B being the first axis;
      None: one each.
  Returns:
    Statistics as `_partial`, leading axes [..., R, T].
  """
  *batch, r, t, dim = query.shape
  branched = packing is not None and packing.branches is not None
  blocks = []
  for start, stop in causal_blocks(t):
    # A window known while tracing also cuts the keys that are too far back for the whole block:
    # but for branches, whose prompt is nearer than it stands.
    cuts = isinstance(window, int) and window and not branched
    first = max(0, start - window + 1) if cuts else 0
    shape = stop - start, stop - first
    visible = _visible(packing, slice(start, stop), slice(first, stop), window)
    visible = visible.reshape(-1, *(1,) * len(batch), *shape)
    scores = _scores(config, query[..., start:stop, :].reshape(*batch, r * shape[0], dim),
                     key[..., first:stop]).reshape(*batch, r, *shape)
    scores = _masked(scores, visible).reshape(*batch, r * shape[0], shape[1])
    statistics = _partial(config, scores, value[..., first:stop, :])
    blocks.append([x.reshape(*batch, r, shape[0], x.shape[-1]) for x in statistics])
  return tuple(jnp.concatenate(parts, axis=-2) for parts in zip(*blocks))


def _visible(packing, queries, keys, window):
  """[B, queries, keys] bool, for slices of the rows of `packing`; [1, ...] without one."""
  places = lambda x: jnp.arange(x.start, x.stop)[None]
  compare = lambda function, query, key: function(query[:, :, None], key[:, None])
  visible = compare(jnp.greater_equal, places(queries), places(keys))
  if packing is None or packing.branches is None:
    distance = compare(jnp.subtract, places(queries), places(keys))
  else:
    distance = compare(jnp.subtract, packing.positions[:, queries], packing.positions[:, keys])
    branches = packing.branches[:, keys]
    visible &= compare(jnp.equal, packing.branches[:, queries], branches) | (branches == 0)[:, None]
  if packing is not None:
    visible &= compare(jnp.equal, packing.segments[:, queries], packing.segments[:, keys])
  return visible & _in_window(distance, window)


def _on_prompt(config, query, key, value, prompt_lengths, step, window):
  """Completion tokens over their group's prompt.

  Args:
    query: [P, kv, G, R, T, D]. key: [P, kv, D, S]. value: [P, kv, S, D].
    prompt_lengths: [P]. step: [P, G, T], own index of each query.
  Returns:
    Statistics as `_partial`, leading axes [P, kv, G, R, T].
  """
  p, kv, g, r, t, dim = query.shape
  s = key.shape[-1]
  at = jnp.arange(s)[None, None, None]
  lengths = prompt_lengths[:, None, None, None]
  distance = lengths + step[..., None] - at  # [P, G, T, S]
  visible = (at < lengths) & _in_window(distance, window)
  scores = _scores(config, query.reshape(p, kv, g * r * t, dim), key).reshape(p, kv, g, r, t, s)
  scores = _masked(scores, visible[:, None, :, None]).reshape(p, kv, g * r * t, s)
  statistics = _partial(config, scores, value)
  return tuple(x.reshape(p, kv, g, r, t, x.shape[-1]) for x in statistics)
