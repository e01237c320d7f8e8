"""A loss with its arguments in place: all but the outputs of the model, which a gradient is for."""

import dataclasses
import functools
import inspect
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from ptjax import algorithms
from ptjax import config
from ptjax import types
from ptjax.training import algorithm as binding

# Keyword arguments that come from the model; positional ones always do.
_KEYWORD_OUTPUTS = ('demonstration_log_probs', 'corrupted_log_probs', 'divergence', 'entropy',
                    'values')


@dataclasses.dataclass(frozen=True)
class Bound:
  """A loss as a function of the model's outputs alone.

  Attributes:
    row: algorithms.Algorithm.
    loss: the function, hyperparameters bound.
    divergence: function of the logits alone, which gives the loss's `divergence`; None where the
      loss takes none or the batch holds it.
    arguments: name -> what it is called with.
    outputs: name -> array; what a gradient can flow through. `pair` gives `chosen` and `rejected`,
      `side` gives `responses`: their log-probs. A divergence that is computed gives `logits`.
  """
  row: Any
  loss: Callable
  divergence: Callable | None
  arguments: dict
  outputs: dict

  def __call__(self, outputs):
    """The scalar loss at these outputs."""
    arguments = {name: outputs.get(name, x) for name, x in self.arguments.items()}
    if 'pair' in arguments:
      pair = arguments['pair']
      arguments['pair'] = pair.replace(
          chosen=pair.chosen.replace(log_probs=outputs['chosen']),
          rejected=pair.rejected.replace(log_probs=outputs['rejected']))
    if 'side' in arguments:
      arguments['side'] = arguments['side'].replace(log_probs=outputs['responses'])
    if self.divergence is not None:
      arguments['divergence'] = self.divergence(outputs['logits'])
    result = self.loss(**arguments)
    return result[0] if isinstance(result, tuple) else result

  def masks(self):
    """{name: [., T] bool} of the outputs that are log-probs of tokens."""
    found = {'log_probs': lambda a: a['loss_mask'],
             'chosen': lambda a: a['pair'].chosen.loss_mask,
             'rejected': lambda a: a['pair'].rejected.loss_mask,
             'responses': lambda a: a['side'].loss_mask,
             'demonstration_log_probs': lambda a: a['demonstration_loss_mask'],
             'corrupted_log_probs': lambda a: a['pair'].chosen.loss_mask}
    return {name: np.asarray(found[name](self.arguments)) for name in self.outputs if name in found}


def bind(loss, batch, hyperparameters):
  """Puts the batch's arrays and the hyperparameters in their places, by name.

  Args:
    loss, batch, hyperparameters: see `weights.inspect_loss`.
  Returns:
    Bound.
  Raises:
    UserError: no such algorithm or hyperparameter, or an array is missing.
  """
  if isinstance(loss, str):
    row = algorithms.get(loss)
  elif isinstance(loss, algorithms.Algorithm):
    row = loss
  else:
    row = algorithms.from_loss(getattr(loss, '__name__', 'loss'), loss)
  bound = binding.bind(row, hyperparameters)
  arrays = batch
  if isinstance(batch, types.TokenBatch):
    arrays = {**batch.inputs, 'loss_mask': batch.loss_mask}
  arrays = {name: x if isinstance(x, (int, float, str)) else jax.tree.map(jnp.asarray, x)
            for name, x in {'key': jax.random.key(0), **arrays}.items()}
  if bound.estimator is not None and set(_required(bound.loss)) - set(arrays):
    made = bound.estimator(**_named(bound.estimator, arrays, f'the advantage of {row.name}'))
    arrays = {**(made if isinstance(made, dict) else {'advantages': made}), **arrays}
  divergence = None
  if bound.divergence is not None and 'divergence' not in arrays:
    teacher = _named(bound.divergence, arrays, f'the divergence of {row.name}')['teacher_logits']
    divergence = functools.partial(bound.divergence, teacher_logits=teacher)
    arrays = {**arrays, 'divergence': divergence(arrays['logits'])}
  arguments = _named(bound.loss, arrays, row.name)
  outputs = _outputs(bound.loss, arguments)
  if divergence is not None:
    del outputs['divergence']
    outputs['logits'] = arrays['logits']
  return Bound(row, bound.loss, divergence, arguments, outputs)


def _required(function):
  return [name for name, p in inspect.signature(function).parameters.items()
          if p.default is p.empty]


def _named(function, arrays, who):
  """Those of `arrays` that the function names; a running statistic keeps its initial value."""
  missing = [name for name in _required(function) if name not in arrays]
  if missing:
    raise config.UserError(f'{who} needs {", ".join(missing)}, but the batch holds only '
                           f'{", ".join(sorted(set(arrays) - {"key"}))}')
  bound = function.keywords if isinstance(function, functools.partial) else {}
  return {name: arrays[name] for name in inspect.signature(function).parameters
          if name in arrays and name not in bound and name != 'loss_state'}


def _outputs(loss, arguments):
  """The arguments that a model's gradient flows through."""
  parameters = inspect.signature(loss).parameters
  outputs = {}
  for name, x in arguments.items():
    if name == 'pair':
      outputs['chosen'], outputs['rejected'] = x.chosen.log_probs, x.rejected.log_probs
    elif name == 'side':
      outputs['responses'] = x.log_probs
    elif (parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
          or name in _KEYWORD_OUTPUTS):
      outputs[name] = x
  return outputs
