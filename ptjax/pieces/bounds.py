"""Range checks on hyperparameters, so that a wrong one fails while tracing and not at step 400."""

import jax.numpy as jnp


def positive(**values):
  """Raises a ValueError unless every Python number in `values` is above 0."""
  for name, value in values.items():
    if not value > 0:
      raise ValueError(f'{name}={value}: expected a number above 0')


def within(low, high, **values):
  """Raises a ValueError unless low <= value < high; `low` None means an open (0, high)."""
  for name, value in values.items():
    above = value > 0 if low is None else value >= low
    if not (above and value < high):
      interval = f'(0, {high})' if low is None else f'[{low}, {high})'
      raise ValueError(f'{name}={value}: expected a number in {interval}')


def fraction(**values):
  """Raises a ValueError unless every Python number in `values` lies in [0, 1]."""
  for name, value in values.items():
    if not 0 <= value <= 1:
      raise ValueError(f'{name}={value}: expected a number in [0, 1]')


def choice(names, **values):
  """Raises a ValueError unless every value is one of `names`."""
  for name, value in values.items():
    if value not in names:
      raise ValueError(f'{name}={value!r}: expected one of {", ".join(names)}')


def boolean(shape, **arrays):
  """Raises a ValueError unless every array is bool and has `shape`."""
  for name, array in arrays.items():
    if jnp.result_type(array) != jnp.bool_ or jnp.shape(array) != shape:
      raise ValueError(f'{name} is {jnp.result_type(array)}{list(jnp.shape(array))}: '
                       f'expected bool{list(shape)}')


def per_row(shape, dtype, **arrays):
  """Returns the arrays as `dtype`; a ValueError where one is missing or has not `shape`."""
  for name, array in arrays.items():
    if array is None or jnp.shape(array) != shape:
      came = 'nothing' if array is None else f'shape {list(jnp.shape(array))}'
      raise ValueError(f'{name}: expected one number per response, shape {list(shape)}; got {came}')
  arrays = [jnp.asarray(array, dtype) for array in arrays.values()]
  return arrays[0] if len(arrays) == 1 else arrays


def two_rows(array, reason):
  """Raises a ValueError for a batch of fewer than two rows, and says why two are needed."""
  if array.shape[0] < 2:
    raise ValueError(f'a batch of {array.shape[0]}: expected at least 2, because {reason}')
