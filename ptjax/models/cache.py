"""Keys and values kept for decoding.

Two parts per layer. The prompt store holds each distinct prompt once: K [P, kv, D, S] and
V [P, kv, S, D], made by `attention.prefill`. Each completion's own part is K [B, kv, D, C] and
V [B, kv, C, D]. In these layouts scores and weighted values are plain matrix products, measured
2.8x over [B, S, kv, D] on CPU; nobody outside models/ should rely on them.
"""

import jax
from jax import lax
import jax.numpy as jnp


def to_store(key, value):
  """Lays keys and values [X, Y, kv, D] out as (K [X, kv, D, Y], V [X, kv, Y, D])."""
  return key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)


def split(stacked):
  """Splits the prompt store of a scanned prefill into a list of per-layer (K, V)."""
  count = stacked[0].shape[0]
  return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count)]


def init_own(config, batch, capacity, dtype=None):
  """Empty own parts for `batch` completions of up to `capacity` tokens: a list of (K, V)."""
  dtype = jnp.dtype(dtype or config.dtype)
  kv, dim = config.num_kv_heads, config.head_dim
  shapes = (batch, kv, dim, capacity), (batch, kv, capacity, dim)
  return [tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(config.num_layers)]


def select(own, window, take=None):
  """Own parts of the rows that `take` picks of an array (None: all), the first `window` tokens."""
  take = take or (lambda x: x)
  return [(take(key[..., :window]), take(value[:, :, :window])) for key, value in own]


def put_back(own, part, rows, start, steps):
  """Copies the columns that `part`, from `select`, has got since into own parts.

  Args:
    own: list of (K, V), X * M rows.
    part: list of (K, V), X * n rows, no wider. Of the same shape it takes the place of `own`.
    rows: [X, n] int32; where in its shard of M rows each row of `part` belongs.
    start: [X * n] int32; index of the first new column of each row; clamped, which only befalls
      rows whose content no longer matters.
    steps: new columns.
  Returns:
    The own parts.
  """
  def put(whole, one, axis):
    width = one.shape[axis]
    if one.shape == whole.shape:
      return one
    at = jnp.clip(start, 0, width - steps)
    new = jax.vmap(lambda row, i: lax.dynamic_slice_in_dim(row, i, steps, axis - 1))(one, at)
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3), inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, axis))
    scatter = jax.vmap(lambda shard, index, new: lax.scatter(
        shard, index, new, numbers, unique_indices=True,
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS))
    split = lambda x: x.reshape(len(rows), -1, *x.shape[1:])
    index = jnp.stack([rows, at.reshape(rows.shape)], axis=-1)
    return scatter(split(whole), index, split(new)).reshape(whole.shape)
  return [(put(key, new_key, 3), put(value, new_value, 2))
          for (key, value), (new_key, new_value) in zip(own, part, strict=True)]


def join(store, own):
  """The per-layer (prompt K, prompt V, own K, own V) that `attention.decode` takes."""
  return [(*prompt, *mine) for prompt, mine in zip(store, own, strict=True)]


def own_part(caches):
  """The own parts of what a decode step returned."""
  return [cache[2:] for cache in caches]


def write(own_key, own_value, key, value, step):
  """Writes one token's key and value [B, kv, D] at index `step` [B]; returns (K, V)."""
  # Clamped here: out-of-range offsets have been mishandled by XLA on GPU (xla#49120).
  step = jnp.clip(step, 0, own_value.shape[2] - 1)
  zero = jnp.zeros_like(step[0])
  put_key = lambda buffer, new, i: lax.dynamic_update_slice(
      buffer, new[:, :, None], (zero, zero, i))
  put_value = lambda buffer, new, i: lax.dynamic_update_slice(
      buffer, new[:, None, :], (zero, i, zero))
  return (jax.vmap(put_key)(own_key, key.astype(own_key.dtype), step),
          jax.vmap(put_value)(own_value, value.astype(own_value.dtype), step))
