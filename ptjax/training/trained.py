"""What a stage trains of a model: all of it, or low-rank adapters on a frozen base."""

import jax

from ptjax.models import lora


def start(settings, params, key):
  """Splits a model into what trains and what does not.

  Args:
    settings: config.LoraSettings; rank 0 trains the whole model.
    params: the model's parameter tree.
    key: PRNG key of fresh adapters.
  Returns:
    (trained, frozen): the tree that trains, and `{}` or `{'base': params}`.
  """
  if not settings.rank:
    return params, {}
  return lora.init(params, settings, key), {'base': params}


def whole(settings, trained, frozen):
  """The model's parameter tree again, adapters merged; for rollouts, evaluation and export."""
  return lora.merge(frozen['base'], trained, settings.scale) if settings.rank else trained


def shapes(settings, params_shapes):
  """The shapes of what trains, from those of the model."""
  if not settings.rank:
    return params_shapes
  return jax.eval_shape(lambda p: lora.init(p, settings, jax.random.key(0)), params_shapes)
