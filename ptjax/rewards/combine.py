"""Several reward functions as one: parse `--reward` specs, run the functions, add up what they say.

A spec is `name`, `name(option=value)`, `path/to/file.py:function`, or what a model says:
`model:DIR`, `process:DIR`, `judge:DIR` or `judge:URL(model='name')`; each with an optional weight:
`length(target=40)*0.5`. Functions are `f(prompts, completions, **columns) -> list[float | None]`,
plain or async; `None` is "no opinion".

A function with a true attribute `collective` is a program of all processes: each of them calls it
on all rows, where others are called on each process's own.
"""

import ast
import collections
import dataclasses
import functools
import inspect
import logging
import math
import re
from typing import Callable

import numpy as np

from ptjax import config
from ptjax.rewards import arithmetic
from ptjax.rewards import calling
from ptjax.rewards import format_checks
from ptjax.rewards import length
from ptjax.rewards import math_answers
from ptjax.rewards import user

RewardError = calling.RewardError
_LOGGER = logging.getLogger(__name__)

# name -> a function that makes the reward function from the spec's options.
BUILT_INS = {
    'arithmetic': lambda: arithmetic.strict,
    'arithmetic_flexible': lambda: arithmetic.flexible,
    'gsm8k': functools.partial(math_answers.MathReward, 'hash', 'strict'),
    'gsm8k_flexible': functools.partial(math_answers.MathReward, 'hash', 'flexible'),
    'math': functools.partial(math_answers.MathReward, 'boxed', 'strict'),
    'math_flexible': functools.partial(math_answers.MathReward, 'boxed', 'flexible'),
    'length': length.make_length,
    'tags': format_checks.make_tags,
    'regex': format_checks.make_regex,
}

# What a task is rewarded by when `--reward` says nothing.
TASK_DEFAULTS = {'arithmetic': ('arithmetic',), 'gsm8k': ('gsm8k',), 'math': ('math',)}

LEARNED = ('model', 'process', 'judge')  # kinds of specs for which a model is loaded

_SPEC = re.compile(r'(?P<body>.*?)(?:\*(?P<weight>[^*/():]*))?', re.DOTALL)
_BUILT_IN = re.compile(r'(?P<name>\w+)\s*(?P<options>\(.*\))?', re.DOTALL)
_PLACE = re.compile(r'(?P<place>.*?)\s*(?P<options>\([^()]*=.*\))?', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Component:
  """One reward function among several."""
  name: str
  function: Callable
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class RewardTable:
  """The rewards of one batch of B completions under F functions."""
  names: tuple  # F names
  values: np.ndarray  # [B, F] float64, before weighting; NaN where a function has no opinion
  total: np.ndarray  # [B] float64; the weighted sum of the opinions, NaN where there is none
  scored: np.ndarray  # [B] bool; False where there is none, so the completion must not train
  report: dict  # '<name>/<what happened>' -> how often; only what did happen
  seconds: dict  # name -> seconds until its values were there
  # Of process rewards: name -> B lists of (completion token that ends a step, its reward).
  steps: dict = dataclasses.field(default_factory=dict)


def load(specs, on_error='raise', *, timeout_seconds=5.0, workers=2,
         function_timeout_seconds=None, learned=None):
  """Returns the `RewardSet` of some specs.

  Args:
    specs: list of spec strings, functions or `Component`s.
    on_error: what a failing function leads to: 'raise' (a `RewardError`), or 'zero' (its value is
      0 for the completions it fails on, counted in the report).
    timeout_seconds: per maths answer that needs algebra; past it the answer has no verdict.
    workers: processes for that.
    function_timeout_seconds: per call of a function; None waits for ever. With it, plain functions
      run outside the main thread, where `signal.alarm` does not work.
    learned: `learned(kind, place, options) -> function` for the kinds of `LEARNED`; None: there
      are no models here.
  Raises:
    config.UserError: no spec, an unknown name (near ones listed), a bad option or weight, or a
      file that does not load.
  """
  if on_error not in ('raise', 'zero'):
    raise config.UserError(f'rewards.on_error={on_error!r}: expected raise or zero')
  if isinstance(specs, str) or callable(specs):
    specs = [specs]
  pool = math_answers.shared_pool(timeout_seconds, workers)
  components = [_component(spec, pool, learned) for spec in specs]
  if not components:
    raise config.UserError('no reward: name one, e.g. --reward=path/to/file.py:function')
  counts = collections.Counter()
  for position, component in enumerate(components):
    counts[component.name] += 1
    if counts[component.name] > 1:  # metrics need a name each
      components[position] = dataclasses.replace(
          component, name=f'{component.name}_{counts[component.name]}')
  return RewardSet(components, on_error, function_timeout_seconds)


def default_specs(task):
  """Returns the specs that `task` is rewarded by, or None if it has no reward of its own."""
  return TASK_DEFAULTS.get(task)


class RewardSet:
  """Reward functions with weights; made by `load`."""

  def __init__(self, components, on_error='raise', function_timeout_seconds=None):
    self.components = tuple(components)
    self._on_error = on_error
    self._function_timeout_seconds = function_timeout_seconds
    self._loop = calling.LoopThread()

  @property
  def names(self):
    """The functions' names, in order."""
    return tuple(component.name for component in self.components)

  def check_columns(self, columns):
    """Raises UserError if a function needs a data column that is not among the names `columns`."""
    for component in self.components:
      missing = [name for name in calling.required_columns(component.function)
                 if name not in columns]
      if missing:
        raise config.UserError(
            f'reward {component.name!r} needs the column {missing[0]!r}; found: '
            f'{", ".join(sorted(columns)) or "none"}; map one with '
            f'--set data.columns.{missing[0]}=<name>')

  def parts(self):
    """Returns [(RewardSet, whether its functions are collective)]: at most one of each kind."""
    found = []
    for collective in (False, True):
      own = [c for c in self.components if is_collective(c.function) == collective]
      if len(own) == len(self.components):
        return [(self, collective)]
      part = RewardSet(own, self._on_error, self._function_timeout_seconds)
      part._loop = self._loop  # clients of async functions belong to one loop
      found.append((part, collective))
    return found

  def join(self, tables):
    """Returns the `RewardTable` of all functions from those of `parts`."""
    names = [name for table in tables for name in table.names]
    order = [names.index(name) for name in self.names]
    together = lambda field: {k: v for table in tables for k, v in getattr(table, field).items()}
    values = np.concatenate([table.values for table in tables], axis=-1)[:, order]
    return self._table(values, together('report'), together('seconds'), together('steps'))

  def score(self, prompts, completions, columns=None):
    """Runs every function on a batch; async ones run at the same time.

    Args:
      prompts: list of B str.
      completions: list of B str.
      columns: dict name -> list of B values of the data's other columns.
    Returns:
      A `RewardTable`.
    Raises:
      RewardError: a function failed and `on_error` is 'raise'.
    """
    prompts, completions = list(prompts), list(completions)
    columns = {name: list(values) for name, values in (columns or {}).items()}
    for name, values in (('prompts', prompts), *columns.items()):
      if len(values) != len(completions):
        raise ValueError(f'{len(completions)} completions, but {len(values)} {name}')
    self.check_columns(columns)
    calls = []
    try:
      for component in self.components:  # starts the async ones
        calls.append(calling.Call(
            component.name, component.function, prompts, completions, columns,
            loop=self._loop, timeout_seconds=self._function_timeout_seconds))
      values = np.stack([call.rewards(self._on_error) for call in calls], axis=-1)  # [B, F]
    finally:
      for call in calls:
        call.cancel()
    report, steps = {}, {}
    for component, column, call in zip(self.components, np.isnan(values).T, calls):
      counts = {'none': int(column.sum()), 'errors': call.failures}
      if hasattr(component.function, 'take_report'):
        counts |= component.function.take_report()
      report |= {f'{component.name}/{what}': count for what, count in counts.items() if count}
      if hasattr(component.function, 'take_steps'):
        steps[component.name] = component.function.take_steps()
      if call.failures:
        _LOGGER.warning('reward %r failed on %d of %d completions, which count 0 in it',
                        component.name, call.failures, len(column))
    return self._table(values, report, {c.name: call.seconds
                                        for c, call in zip(self.components, calls)}, steps)

  def close(self):
    """Ends worker processes and the event loop; a later `score` starts them again."""
    self._loop.close()
    for component in self.components:
      if hasattr(component.function, 'close'):
        component.function.close()

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()

  def _table(self, values, report, seconds, steps):
    absent = np.isnan(values)
    weights = np.array([component.weight for component in self.components])
    scored = ~absent.all(axis=-1)
    total = np.where(absent, 0.0, values) @ weights
    return RewardTable(
        names=self.names, values=values, total=np.where(scored, total, np.nan), scored=scored,
        report=report, seconds=seconds, steps=steps)


def is_collective(function):
  """Whether all processes must call a reward function together, each on all rows."""
  return bool(getattr(function, 'collective', False))


def learned_place(spec):
  """Returns where the model of a spec of a kind of `LEARNED` is, else None."""
  kind, _, rest = _SPEC.fullmatch(spec.strip())['body'].strip().partition(':')
  return split_options(rest)[0] if rest and kind in LEARNED else None


def _component(spec, pool, learned):
  """Returns the `Component` a spec stands for."""
  if isinstance(spec, Component):
    return spec
  if callable(spec):
    return Component(getattr(spec, '__name__', type(spec).__name__), spec)
  match = _SPEC.fullmatch(spec.strip())
  body, weight = match['body'].strip(), _weight(spec, match['weight'])
  kind, colon, rest = body.partition(':')
  if colon and kind in LEARNED:
    if learned is None:
      raise config.UserError(f'reward {spec!r}: models give rewards in training alone')
    place, options = split_options(rest)
    return Component(kind, learned(kind, place, read_options(spec, options)), weight)
  built_in = _BUILT_IN.fullmatch(body)
  if built_in:
    name = built_in['name']
    return Component(name, _built_in(spec, name, built_in['options'], pool), weight)
  path, colon, name = body.rpartition(':')
  if colon and name.isidentifier():
    return Component(name, user.load_function(path, name), weight)
  raise config.UserError(
      f'reward {spec!r}: expected name, name(option=value), path/to/file.py:function or model:DIR, '
      f'each with an optional *weight; built-in names: {", ".join(BUILT_INS)}')


def _weight(spec, text):
  if text is None:
    return 1.0
  try:
    weight = float(text)
  except ValueError:
    weight = math.nan
  if not math.isfinite(weight):
    raise config.UserError(f'reward {spec!r}: the weight {text!r} is not a finite number')
  return weight


def _built_in(spec, name, options_text, pool):
  if name not in BUILT_INS:
    raise config.UserError(f'reward {spec!r}: no built-in {name!r}'
                           + config.near_names(name, BUILT_INS)
                           + '; your own is path/to/file.py:function')
  make = BUILT_INS[name]
  known = {option: parameter for option, parameter in inspect.signature(make).parameters.items()
           if option != 'pool'}
  options = read_options(spec, options_text)
  for option in options:
    if option not in known:
      hint = config.near_names(option, known) if known else '; it has none'
      raise config.UserError(f'reward {spec!r}: {name} has no option {option!r}{hint}')
  for option, parameter in known.items():
    if parameter.default is parameter.empty and option not in options:
      raise config.UserError(f'reward {spec!r}: say {name}({option}=...)')
  is_math = getattr(make, 'func', None) is math_answers.MathReward
  return make(**options, pool=pool) if is_math else make(**options)


def split_options(text):
  """Splits `place(name=value, ...)`; returns the place and its options as text, or None."""
  match = _PLACE.fullmatch(text.strip())
  return match['place'], match['options']


def read_options(spec, text):
  """Reads `(name=value, ...)`, or None; raises UserError naming `spec`."""
  try:
    call = ast.parse(f'f{text or "()"}', mode='eval').body
    if call.args:
      raise ValueError
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
  except (ValueError, SyntaxError, TypeError):
    raise config.UserError(f'reward {spec!r}: cannot read the options {text}; write them as '
                           '(name=value, ...) with numbers or quoted text') from None
