"""The loop around the train step: it owns time, disk and interruptions; what it calls is pure."""

import collections
import contextlib
import dataclasses
import signal
import threading
import time

import jax

from ptjax import sharding


_ASK_EVERY_STEPS = 10


class TrainingFailed(RuntimeError):
  """Training cannot go on; what was learned so far is in the newest checkpoint."""


@dataclasses.dataclass(frozen=True)
class Stage:
  """One algorithm's share of a run.

  Attributes:
    name: shown in metrics and progress, e.g. 'sft'.
    index: place in the run.
    first_step: optimizer steps taken by the stages before it.
    steps: optimizer steps of this stage.
  """
  name: str
  index: int
  first_step: int
  steps: int


class Interrupt:
  """Notes Ctrl-C and SIGTERM so that the loop can save and leave; a second one is not caught."""

  def __init__(self):
    self.requested = False
    self._previous = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._previous[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *exception):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def agreed(self):
    """Whether any process was asked to stop; all processes call this at the same place."""
    return any(sharding.gather_json(self.requested))

  def _note(self, number, frame):
    del frame
    self.requested = True
    signal.signal(number, self._previous[number])


def run(stage, state, source, train_step, *, record, save, evaluate=None, eval_every=0,
        checkpoint_every, max_bad_steps, interrupt, counters):
  """Trains one stage from `state.step` to its end.

  Args:
    stage: the Stage.
    state: TrainState; its `step` counts within the stage.
    source: RolloutSource or DemonstrationSource.
    train_step: `(state, placed batch) -> (state, metrics)`.
    record: `record(step, metrics, samples)` with the global step; called once per optimizer step,
      in order.
    save: `save(step, state, pending, pending_metrics, counters)` writes a checkpoint.
    evaluate: `evaluate(params) -> metrics`, or None.
    eval_every: steps between evaluations; 0: only at the stage's end.
    checkpoint_every: steps between checkpoints; there is always one at the stage's end.
    max_bad_steps: skipped updates in a row that end the run.
    interrupt: Interrupt; when requested, the loop saves and returns early.
    counters: dict of running totals (`num_tokens`), updated in place.
  Returns:
    The last state, and True if the stage was completed.
  Raises:
    TrainingFailed: too many updates in a row were not finite.
  """
  waiting = collections.deque()  # (step, host metrics, device metrics, samples, start time)
  device_free = 0.0  # when the step before was done; one dispatched earlier has waited for it

  def report(leave=0):
    """Records the steps that are waiting, but for the last `leave`; returns the last bad_steps."""
    nonlocal device_free
    bad_steps = 0
    while len(waiting) > leave:
      step, metrics, on_device, samples, started = waiting[0]
      on_device = {k: v.item() for k, v in sharding.fetch(on_device).items()}
      source.complete(step, on_device)
      now = time.perf_counter()
      bad_steps = int(on_device.pop('bad_steps'))
      tokens = metrics.pop('train_tokens')
      counters['num_tokens'] += tokens
      metrics.pop('rollout_tokens', None)
      metrics.setdefault('timing_s/update', now - max(started, device_free))
      device_free = now
      total = sum(v for k, v in metrics.items() if k.startswith('timing_s/'))
      metrics.update(on_device, step_time=total, num_tokens=counters['num_tokens'],
                     stage=stage.name, **{'perf/train_tokens_per_second': tokens / total})
      if bad_steps:
        metrics['bad_steps'] = bad_steps
      metrics.update(counters.pop('once', {}))
      record(stage.first_step + step + 1, metrics, samples)
      waiting.popleft()  # only now: no checkpoint may claim a step without a record
    return bad_steps

  def flush(leave=0):
    bad_steps = report(leave)
    if bad_steps >= max_bad_steps:
      raise TrainingFailed(
          f'{bad_steps} updates in a row had a loss or gradient that was not finite; the '
          'parameters from before them are in the newest checkpoint')

  def checkpoint(step):
    pending, pending_metrics = source.pending(step)
    started = time.perf_counter()
    save(stage.first_step + step, state, pending, pending_metrics, dict(counters))
    counters['once'] = {'timing_s/checkpoint': time.perf_counter() - started}

  def take_step(step):
    nonlocal state
    if source.waits_for_params:
      flush()
    batch, metrics, samples = source.batch(state.params, step, state.loss_state)
    started = time.perf_counter()
    state, on_device = train_step(state, batch)
    waiting.append((step, metrics, on_device, samples, started))
    flush(leave=1)  # this step runs while the one before is recorded
    last = step + 1 == stage.steps
    if evaluate is not None and (last or (eval_every and (step + 1) % eval_every == 0)):
      jax.block_until_ready(on_device)
      metrics['timing_s/update'] = time.perf_counter() - max(started, device_free)
      eval_started = time.perf_counter()
      metrics.update(evaluate(state.params))
      metrics['timing_s/eval'] = time.perf_counter() - eval_started
    # Several processes ask each other, which waits for the device: not in every step of a source
    # that runs ahead.
    asks = (source.waits_for_params or step % _ASK_EVERY_STEPS == 0 or jax.process_count() == 1)
    stops = asks and interrupt.agreed()
    if last or stops or (step + 1) % checkpoint_every == 0:
      flush()
      checkpoint(step + 1)
    return stops

  first = int(sharding.fetch(state.step))
  for step in range(first, stage.steps):
    try:
      stops = take_step(step)
    except Exception:
      with contextlib.suppress(Exception):  # the first error is the one to report
        report()
        taken = int(sharding.fetch(state.step))
        if taken > first:  # else there is nothing to save, and settings may still change
          checkpoint(taken)
      raise
    if stops:
      return state, step + 1 == stage.steps
  return state, True
