"""Running statistics that a loss carries from step to step.

The convention of stateful losses: one that names a parameter `loss_state` takes the state there,
returns `(loss, metrics, new_state)` instead of `(loss, metrics)`, and the default of that parameter
is the state before the first step. Any pytree will do; the losses here share `Moments`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Moments(NamedTuple):
  """What is remembered about a number seen in every batch; scalars."""
  mean: Any
  std: Any  # with ddof 1 in each batch
  count: Any  # values seen so far


INITIAL = Moments(np.float32(0.0), np.float32(0.0), np.float32(0.0))


def exponential(state, values, *, decay, warm_start=False):
  """Exponential moving average of the batch's mean and standard deviation.

  Args:
    state: Moments before the batch.
    values: [B] float; no gradient flows through them.
    decay: weight of the past, in [0, 1).
    warm_start: whether the first batch replaces the initial zeros instead of being averaged with
      them.
  Returns:
    Moments after the batch, in the dtype of `values`. The standard deviation of one value is 0.
  """
  values = jax.lax.stop_gradient(values)
  state = _as_dtype(state, values.dtype)
  std = jnp.std(values, ddof=1) if values.size > 1 else jnp.zeros_like(state.std)
  keep = jnp.where(state.count > 0, decay, 0.0 if warm_start else decay).astype(values.dtype)
  return Moments(
      mean=keep * state.mean + (1.0 - keep) * values.mean(),
      std=keep * state.std + (1.0 - keep) * std,
      count=state.count + values.size)


def cumulative(state, values):
  """Mean of all values ever seen; arguments and result as in `exponential`, std left alone."""
  values = jax.lax.stop_gradient(values)
  state = _as_dtype(state, values.dtype)
  count = state.count + values.size
  return Moments(
      mean=state.mean + (values.mean() - state.mean) * (values.size / count),
      std=state.std, count=count)


def _as_dtype(state, dtype):
  return Moments(*(jnp.asarray(x, dtype) for x in state))
