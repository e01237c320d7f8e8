"""What training remembers between steps."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from ptjax import sharding

_MEMORY = 'memory/'


@struct.dataclass
class TrainState:
  """Everything an optimizer step reads and writes; also what a checkpoint holds."""
  step: Any  # [] int32; optimizer steps taken in this stage
  params: Any  # the policy's parameters
  opt_state: Any  # optax state
  loss_state: Any  # running statistics of the loss, {} for most
  bad_steps: Any  # [] int32; updates skipped in a row because something was not finite
  reference: Any  # parameters of a reference that follows the policy, {} where none does


def init(params, optimizer, loss_state=None, *, follows=False):
  """Returns the state before the first step; `follows` says whether a reference does."""
  return TrainState(
      step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params),
      loss_state={} if loss_state is None else loss_state,
      bad_steps=jnp.zeros((), jnp.int32),
      reference=jax.tree.map(jnp.copy, params) if follows else {})


def shardings(mesh, params, optimizer, loss_state=None, *, follows=False):
  """The sharding of every leaf of the state, from the one table."""
  shapes = jax.eval_shape(lambda p: init(p, optimizer, loss_state, follows=follows), params)
  return sharding.tree_sharding(mesh, shapes)


def memories(learners):
  """What objects with a `memory` have learnt, in a dict of JSON's types that goes with metrics."""
  return {_MEMORY + name: learner.memory for name, learner in learners.items()}


def remember(learners, metrics):
  """Gives the objects back what `memories` found; takes it out of `metrics`."""
  for name, learner in learners.items():
    learner.memory = metrics.pop(_MEMORY + name)
