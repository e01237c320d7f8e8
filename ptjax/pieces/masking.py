"""The door of every piece and loss: shapes are checked and padding is made harmless."""

import jax.numpy as jnp


def clean(loss_mask, **arrays):
  """Checks `[B, T]` arrays against the mask and zeroes them off it.

  Padding may hold anything, NaN included, so arrays are cleaned before they meet `exp`, `log` or a
  division; cleaning afterwards would still leave NaN in the gradient.

  Args:
    loss_mask: [B, T] bool; True where the token counts.
    **arrays: name -> [B, T]; the names appear in the error. Half precision becomes float32.
  Returns:
    The arrays in the order given; a single array if one was given.
  """
  if loss_mask.ndim != 2 or loss_mask.dtype != bool:
    raise ValueError(
        f'loss_mask is {loss_mask.dtype}{list(loss_mask.shape)}: expected bool[B, T]')
  cleaned = []
  for name, array in arrays.items():
    if array.shape != loss_mask.shape:
      raise ValueError(
          f'{name} has shape {array.shape}: expected that of loss_mask, {loss_mask.shape}')
    cleaned.append(jnp.where(loss_mask, wide(array), 0.0))
  return cleaned[0] if len(cleaned) == 1 else tuple(cleaned)


def wide(array):
  """`array` in float32, or in float64 if it is; no implicit promotion, which tests forbid."""
  dtype = jnp.float64 if jnp.result_type(array) == jnp.float64 else jnp.float32
  return jnp.asarray(array, dtype)


def lengths(loss_mask, dtype=jnp.float32):
  """Tokens per sequence, [B], at least 1 so that an empty row divides to 0 and not to NaN."""
  return jnp.maximum(loss_mask.sum(axis=1), 1).astype(dtype)


def required(array, name, needed_by):
  """Returns `array`, or raises a ValueError that names what `needed_by` lacks."""
  if array is None:
    raise ValueError(f'{needed_by} needs {name}, which the batch does not hold.')
  return array


def non_negative(**coefficients):
  """Raises a ValueError for a negative coefficient; `coefficients` are Python numbers."""
  for name, value in coefficients.items():
    if value < 0:
      raise ValueError(f'{name}={value} must not be negative; use 0 to switch the term off.')


def in_groups(rewards, group_size, *, at_least=1):
  """Reshapes [B] to [B / group_size, group_size]; `at_least` is the size a baseline needs."""
  if group_size < at_least:
    raise ValueError(
        f'group_size={group_size} leaves no other completion to compare with, and this advantage '
        f'needs at least {at_least}; set rollout.group_size={at_least} or more.')
  if rewards.shape[0] % group_size:
    raise ValueError(
        f'{rewards.shape[0]} completions do not split into groups of group_size={group_size}; '
        'set rollout.group_size to a divisor, or rollout.num_prompts so that it divides.')
  return rewards.reshape(-1, group_size)
