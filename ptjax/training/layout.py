"""How a batch's rows lie for the forward pass: packed rows, and micro-batches of either."""

import jax
import jax.numpy as jnp

# A CPU likes an update's activations small: in parts of about so many tokens it takes 0.93 of the
# time and 0.35 of the temporaries (4,352 tokens, width 256).
CPU_PART_TOKENS = 1024


def rows_of(batch):
  """What the forward pass runs on: the batch, or its packed rows."""
  return batch if batch.packed is None else batch.packed.rows


def put_back(outputs, batch):
  """Outputs [R, M] of packed rows, put where the loss looks for them, [B, T]; zero elsewhere."""
  if batch.packed is None:
    return outputs
  places, shape = batch.packed.places.reshape(-1), batch.loss_mask.shape
  return jax.tree.map(
      lambda x: jnp.zeros(shape, x.dtype).reshape(-1).at[places].set(
          x.reshape(-1), mode='drop').reshape(shape), outputs)


def taken_from(arrays, batch):
  """Arrays [B, T] in the order of packed rows [R, M], zero on padding: `put_back`, transposed."""
  if batch.packed is None:
    return arrays
  places = batch.packed.places
  return jax.tree.map(
      lambda x: x.reshape(-1).at[places].get(mode='fill', fill_value=0), arrays)


def of_rows(derivative, batch):
  """A per_token.PerToken of [B, T] arrays as one of packed rows, zero on their padding."""
  if batch.packed is None:
    return derivative
  held = batch.packed.places < batch.loss_mask.size

  def apply(values, arrays, scalars):
    *arrays, held = arrays
    return jax.tree.map(
        lambda x: jnp.where(held, x, 0.0), derivative.apply(values, arrays, scalars))
  return derivative._replace(
      apply=apply, arrays=[*taken_from(derivative.arrays, batch), held])


def even_parts(batch, at_least, tokens):
  """The most parts of at least so many tokens each that a batch's rows split into evenly.

  Args:
    batch: types.TokenBatch that the forward pass runs on.
    at_least: how many parts to make at any rate, and the answer a multiple of it.
    tokens: of a part, padding among them.
  """
  rows = batch.prompt_lengths.shape[0]
  whole = batch.prompt_tokens.size + (batch.tokens.size if batch.packing is None else 0)
  fitting = range(at_least, whole // tokens + 1, at_least)
  return max((count for count in fitting if rows % count == 0), default=at_least)


def split(batch, parts):
  """Splits a batch along prompts into `parts` stacked parts, without moving rows across devices.

  Part i takes prompts i, i + parts, ...: with prompts lying on the devices in blocks, each device
  then holds its share of every part.
  """
  return split_arrays(batch, parts, batch.prompt_lengths.shape[0])


def split_arrays(tree, parts, num_prompts):
  def one(x):
    if x.ndim == 0:
      return jnp.broadcast_to(x, (parts,))
    group = x.shape[0] // num_prompts
    x = x.reshape(num_prompts // parts, parts, group, *x.shape[1:])
    return jnp.swapaxes(x, 0, 1).reshape(parts, num_prompts // parts * group, *x.shape[3:])
  return jax.tree.map(one, tree)


def join(x, batch):
  """Undoes `split_arrays` on one array [parts, B / parts, ...]."""
  num_prompts = batch.prompt_lengths.shape[0]
  parts, rows = x.shape[:2]
  group = parts * rows // num_prompts
  x = x.reshape(parts, num_prompts // parts, group, *x.shape[2:])
  return jnp.swapaxes(x, 0, 1).reshape(num_prompts * group, *x.shape[3:])
