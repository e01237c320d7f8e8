"""From a row of the algorithm table to what a stage trains with."""

import dataclasses
import functools
import inspect
from typing import Callable

from ptjax import config as settings


@dataclasses.dataclass(frozen=True)
class Bound:
  """An algorithm with its hyperparameters set.

  Attributes:
    row: algorithms.Algorithm.
    loss: the loss, hyperparameters bound.
    estimator: the advantage estimator, bound, or None.
    divergence: what the head computes for a loss that takes `divergence`, bound, or None.
    follow: how the reference moves, bound, or None where it stands still.
    own_turn: which batches of an offline row the policy draws itself, bound, or None.
    needs_reference: whether the frozen reference's log-probs are inputs.
    needs_old_log_probs: whether old log-probs are needed before the first update of a rollout.
  """
  row: object
  loss: Callable
  estimator: Callable | None
  divergence: Callable | None
  follow: Callable | None
  own_turn: Callable | None
  needs_reference: bool
  needs_old_log_probs: bool


def bind(row, hyperparameters, *, updates_per_rollout=1):
  """Binds `hyperparameters` to the functions of a row.

  Args:
    row: algorithms.Algorithm.
    hyperparameters: dict, the user's; the row's own defaults stand where it is silent.
    updates_per_rollout: optimizer steps per rollout; from 2 on, the policy has moved away from
      the old one, whose log-probs must then be kept.
  Raises:
    UserError: a name that none of them has; the accepted ones are listed.
  """
  known = row.hyperparameters()
  for name in hyperparameters:
    if name not in known:
      accepted = ', '.join(f'{k}={v!r}' for k, v in known.items())
      raise settings.UserError(f'--set loss.{name}: {row.name} has no such hyperparameter; '
                               f'it accepts {accepted or "none"}')
  values = {**known, **hyperparameters}
  models = row.models_for(hyperparameters)
  estimator = None
  if row.advantage is not None and 'advantages' in inspect.signature(row.loss).parameters:
    estimator = _partial(row.advantage, values)
  by_loss = 'old_log_probs' in inspect.signature(row.loss).parameters and updates_per_rollout > 1
  by_estimator = (estimator is not None and 'reference' in models
                  and 'old_log_probs' in inspect.signature(estimator).parameters)
  other = {name: None if function is None else _partial(function, values) for name, function in (
      ('divergence', row.divergence), ('follow', row.follow), ('own_turn', row.own_turn))}
  return Bound(row=row, loss=_partial(row.loss, values), estimator=estimator,
               needs_reference='reference' in models,
               needs_old_log_probs=by_loss or by_estimator, **other)


def _partial(function, values):
  names = inspect.signature(function).parameters
  chosen = {name: value for name, value in values.items() if name in names}
  return functools.partial(function, **chosen) if chosen else function
