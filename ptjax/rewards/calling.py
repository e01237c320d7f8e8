"""Calls a reward function and answers for what it returns: finite numbers or None, one per
completion, or an error that names the function and the completion it failed on.
"""

import asyncio
import concurrent.futures
import inspect
import math
import numbers
import pathlib
import threading
import time
import traceback

import numpy as np

from ptjax import config

_TEXTS = ('prompts', 'completions')
_MAX_FAILURES_IN_A_ROW = 8  # then a function is down, and retrying costs its time-outs


class RewardError(config.UserError):
  """A reward function raised, timed out or returned what is no reward.

  `function` is its name, `index` the position of the completion (None where it is all of them).
  """

  def __init__(self, function, problem, index=None, completion=None):
    message = f'reward {function!r}: {problem}'
    if index is not None:
      message += f'; completion {index}: {shorten(completion)}'
    super().__init__(message)
    self.function = function
    self.index = index


def shorten(value, characters=200):
  """Returns `repr(value)` with its middle left out beyond about `characters`."""
  text = repr(value)
  half = characters // 2
  if len(text) <= characters:
    return text
  return f'{text[:half]}...({len(text) - 2 * half} characters)...{text[-half:]}'


def required_columns(function):
  """Returns the data columns `function` cannot do without, by its signature."""
  return [name for name, parameter in _parameters(function).items()
          if name in _columns(function) and parameter.default is parameter.empty]


def bind(function, prompts, completions, columns):
  """Returns `(args, kwargs)` that call `function` with what it takes of the texts and columns.

  A function that names a parameter `completions` gets everything by name, so that
  `f(completions, **columns)` works too; another gets prompts and completions by position.
  """
  parameters = _parameters(function)
  takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
  wanted = _columns(function)
  named = {name: values for name, values in columns.items()
           if name not in _TEXTS and (takes_all or name in wanted)}
  by_name = parameters.get('completions')
  if by_name is not None and by_name.kind is not by_name.POSITIONAL_ONLY:
    if 'prompts' in parameters or takes_all:
      named['prompts'] = prompts
    return (), {**named, 'completions': completions}
  if parameters and all(p.kind is p.VAR_KEYWORD for p in parameters.values()):
    return (), {**named, 'prompts': prompts, 'completions': completions}
  return (prompts, completions), named


def is_async(function):
  """Whether calling `function` gives a coroutine."""
  return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
      getattr(function, '__call__', None))


class LoopThread:
  """An event loop in a thread of its own, alive between calls.

  So async functions may keep a client that belongs to one loop, and notebooks, whose main thread
  already runs a loop, work as well.
  """

  def __init__(self):
    self._loop = None

  def submit(self, coroutine):
    """Returns the `concurrent.futures.Future` of a coroutine."""
    if self._loop is None:
      self._loop = asyncio.new_event_loop()
      threading.Thread(target=_serve, args=(self._loop,), daemon=True).start()
    return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

  def close(self):
    """Stops the loop; a later `submit` starts another."""
    if self._loop is not None:
      self._loop.call_soon_threadsafe(self._loop.stop)
      self._loop = None


class Call:
  """One function's pass over one batch. An async function starts at once, in `loop`."""

  def __init__(self, name, function, prompts, completions, columns, *, loop, timeout_seconds):
    self._name = name
    self._function = function
    self._batch = (prompts, completions, columns)
    self._loop = loop
    self._timeout_seconds = timeout_seconds
    self._future = self._submit(*self._batch) if is_async(function) else None
    self.seconds = 0.0  # until its result was there
    self.failures = 0  # completions that got 0 because of an error

  def cancel(self):
    """Gives up waiting for an async function."""
    if self._future is not None:
      self._future.cancel()

  def rewards(self, on_error):
    """Waits for the function and returns its rewards.

    Args:
      on_error: 'raise', or 'zero' to give 0 to each completion the function fails on. A function
        that raises is then called again with one completion at a time, to find the others' values.
    Returns:
      [B] float64; NaN where the function has no opinion.
    Raises:
      RewardError: see there; only when `on_error` is 'raise'.
    """
    size = len(self._batch[1])
    try:
      result, self.seconds = self._run(self._batch, self._future)
      values, problems = check(result, size)
    except Unusable as error:  # nothing to learn from single completions
      return self._all_failed(str(error), size, on_error)
    except (Exception, SystemExit) as error:  # pylint: disable=broad-except; it is the user's code
      return self._one_by_one(error, on_error)
    for index, problem in problems.items():
      if on_error == 'raise':
        raise RewardError(self._name, problem, index, self._batch[1][index])
      values[index] = 0.0
    self.failures += len(problems)
    return values

  def _submit(self, *batch):
    args, kwargs = bind(self._function, *batch)
    return self._loop.submit(
        _timed(lambda: self._function(*args, **kwargs), self._timeout_seconds))

  def _run(self, batch, future=None):
    """Returns `(result, seconds)` of the function on `batch`."""
    if future is None and is_async(self._function):
      future = self._submit(*batch)
    if future is not None:
      return future.result()
    args, kwargs = bind(self._function, *batch)
    start = time.perf_counter()
    if self._timeout_seconds is None:  # in this thread: some functions need the main one
      result = self._function(*args, **kwargs)
    else:
      result = _in_thread(lambda: self._function(*args, **kwargs), self._timeout_seconds)
    if inspect.isawaitable(result):  # a plain function that hands on a coroutine
      awaitable = result
      result, _ = self._loop.submit(_timed(lambda: awaitable, self._timeout_seconds)).result()
    return result, time.perf_counter() - start

  def _all_failed(self, problem, size, on_error):
    if on_error == 'raise':
      raise RewardError(self._name, problem)
    self.failures += size
    return np.zeros(size)

  def _one_by_one(self, error, on_error):
    prompts, completions, columns = self._batch
    values = np.zeros(len(completions))
    in_a_row = 0
    for index, completion in enumerate(completions):
      single = ([prompts[index]], [completion],
                {name: [column[index]] for name, column in columns.items()})
      try:
        single_values, problems = check(self._run(single)[0], 1)
        problem, cause = problems.get(0), None
        values[index] = 0.0 if problem else single_values[0]
      except (Exception, SystemExit) as single_error:  # pylint: disable=broad-except
        problem, cause = _describe(single_error), single_error
      if problem and on_error == 'raise':
        raise RewardError(self._name, problem, index, completion) from cause
      self.failures += bool(problem)
      in_a_row = in_a_row + 1 if problem else 0
      if in_a_row == _MAX_FAILURES_IN_A_ROW:
        self.failures += len(completions) - index - 1
        return values
    if on_error == 'raise':
      raise RewardError(
          self._name, f'{_describe(error)} on the batch of {len(completions)}, though not on any '
          'of its completions alone') from error
    return values


def check(result, size):
  """Returns what a function returned as numbers.

  Args:
    result: list, tuple or array of numbers, booleans or None (also NumPy, JAX or torch scalars).
    size: how many are expected.
  Returns:
    [size] float64 with NaN for None, and a dict index -> problem for entries that are no reward.
  """
  if isinstance(result, (str, bytes, dict, set)) or not hasattr(result, '__iter__') or (
      getattr(result, 'shape', None) == ()):
    raise Unusable(f'returned {shorten(result, 80)} of type {type(result).__name__}; expected a '
                    f'list of {size} numbers, one per completion')
  result = list(result)
  if len(result) != size:
    raise Unusable(f'returned {len(result)} values for {size} completions; expected one each')
  values, problems = np.full(size, np.nan), {}
  for index, value in enumerate(result):
    if value is None:
      continue
    if getattr(value, 'shape', None) == () and hasattr(value, 'item'):
      value = value.item()
    if not isinstance(value, numbers.Real):
      problems[index] = (f'returned {shorten(value, 80)} of type {type(value).__name__}; '
                         'expected a number or None')
      continue
    try:
      values[index] = float(value)
    except OverflowError:
      values[index] = math.inf
    if not math.isfinite(values[index]):
      problems[index] = f'returned {values[index]}; expected a finite number or None'
  return values, problems


class Unusable(Exception):
  """The function gave no usable answer for the whole batch."""


def _serve(loop):
  try:
    loop.run_forever()
  finally:
    loop.close()


async def _timed(call, timeout_seconds):
  """Awaits what `call()` returns; gives `(result, seconds)`."""
  start = time.perf_counter()
  try:
    result, error = await asyncio.wait_for(_settled(call), timeout_seconds)
  except TimeoutError:  # ours alone: one that the function raised comes settled
    raise Unusable(f'gave no answer within {timeout_seconds:g} s') from None
  if error is not None:
    raise error
  return result, time.perf_counter() - start


async def _settled(call):
  try:
    return await call(), None
  except (Exception, SystemExit) as error:  # pylint: disable=broad-except; raised by `_timed`
    return None, error


def _in_thread(call, timeout_seconds):
  """Returns `call()`, run in a thread that is left behind if it takes too long."""
  future = concurrent.futures.Future()

  def run():
    try:
      future.set_result(call())
    except BaseException as error:  # pylint: disable=broad-except; raised again by the waiter
      future.set_exception(error)

  threading.Thread(target=run, daemon=True, name='ptjax-reward-call').start()
  done, _ = concurrent.futures.wait([future], timeout_seconds)
  if not done:
    raise Unusable(f'gave no answer within {timeout_seconds:g} s')
  return future.result()


def _describe(error):
  """Says what was raised and, from the deepest frame, where."""
  if isinstance(error, Unusable):
    return str(error)
  frames = traceback.extract_tb(error.__traceback__)
  where = f' at {pathlib.Path(frames[-1].filename).name}:{frames[-1].lineno}' if frames else ''
  return f'raised {type(error).__name__}: {shorten(str(error))}{where}'


def _parameters(function):
  try:
    return dict(inspect.signature(function).parameters)
  except (TypeError, ValueError):  # some built-ins have none: give them everything
    return {'columns': inspect.Parameter('columns', inspect.Parameter.VAR_KEYWORD)}


def _columns(function):
  """Returns the names of the parameters that stand for data columns."""
  parameters = _parameters(function)
  positional = [name for name, p in parameters.items()
                if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
  taken = set(_TEXTS) if 'completions' in parameters else set(positional[:2])
  return [name for name, p in parameters.items()
          if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in taken]
