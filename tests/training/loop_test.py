"""The loop: what it records and saves, in which order, and how it ends."""

import dataclasses
import os
import signal
import types

import numpy as np
import pytest

from ptjax.training import loop


@dataclasses.dataclass
class State:
  step: int
  params: str = ''
  loss_state: str = 'statistics'


class Source:
  """Gives the step number as the batch; `fails` maps steps to what is raised there."""

  def __init__(self, waits_for_params=True, fails=None):
    self.waits_for_params = waits_for_params
    self.fails = fails or {}
    self.log = []

  def batch(self, params, step, loss_state):
    assert loss_state == 'statistics'
    self.log.append(f'batch {step} of {params!r}')
    if step in self.fails:
      raise self.fails[step]
    return step, {'train_tokens': 10, 'timing_s/rollout': 0.5}, [f'sample {step}']

  def complete(self, step, metrics):
    metrics['completed'] = step

  def pending(self, step):
    return {'x': step}, {'reward': step}


class Run:
  """One call of the loop, with everything around it recorded in one list."""

  def __init__(self, source, *, steps=4, first=0, bad=(), **options):
    self.log = source.log
    self.records, self.saved = {}, []
    self.counters = {'num_tokens': 100}
    self.interrupt = options.pop('interrupt', None) or types.SimpleNamespace(agreed=lambda: False)

    def train_step(state, batch):
      count = 0
      while batch - count in bad:  # how many updates in a row were bad
        count += 1
      self.log.append(f'train {batch}')
      return State(batch + 1, f'p{batch + 1}'), {
          'loss': np.float32(batch), 'bad_steps': np.int32(count)}

    def record(step, metrics, samples):
      self.log.append(f'record {step}')
      if step == options.get('full_at'):
        raise OSError('full')
      self.records[step] = {**metrics, 'samples': samples}

    def save(step, state, pending, pending_metrics, counters):
      self.log.append(f'save {step}')
      self.saved.append((step, state.params, pending, pending_metrics, counters))
    self.call = lambda: loop.run(
        loop.Stage('sft', 0, 20, steps), State(first, f'p{first}'), source, train_step,
        record=record, save=save, evaluate=options.get('evaluate'),
        eval_every=options.get('eval_every', 0),
        checkpoint_every=options.get('checkpoint_every', 100),
        max_bad_steps=options.get('max_bad_steps', 9), interrupt=self.interrupt,
        counters=self.counters)

  def named(self, word):
    return [int(entry.split()[1]) for entry in self.log if entry.startswith(word)]


def test_online_steps_are_recorded_before_the_next_batch_is_asked_for():
  source = Source()
  run = Run(source, steps=2, checkpoint_every=1)
  state, completed = run.call()
  assert completed and state.params == 'p2'
  assert run.log == ["batch 0 of 'p0'", 'train 0', 'record 21', 'save 21',
                     "batch 1 of 'p1'", 'train 1', 'record 22', 'save 22']
  first, second = run.records[21], run.records[22]
  assert (first['num_tokens'], second['num_tokens']) == (110, 120)
  assert first['loss'] == 0.0 and first['stage'] == 'sft' and first['samples'] == ['sample 0']
  assert first['completed'] == 0 and second['completed'] == 1
  assert not {'bad_steps', 'train_tokens'} & first.keys()
  assert 'timing_s/checkpoint' in second and 'timing_s/checkpoint' not in first
  assert first['step_time'] == pytest.approx(0.5 + first['timing_s/update'])
  assert run.saved[0] == (21, 'p1', {'x': 1}, {'reward': 1}, {'num_tokens': 110})


def test_offline_steps_run_ahead_of_their_records():
  run = Run(Source(waits_for_params=False), steps=3)
  run.call()
  assert run.log == ["batch 0 of 'p0'", 'train 0', "batch 1 of 'p1'", 'train 1', 'record 21',
                     "batch 2 of 'p2'", 'train 2', 'record 22', 'record 23', 'save 23']


@pytest.mark.parametrize('waits', [True, False])
def test_checkpoints_and_evaluations_come_when_asked_and_at_the_end(waits):
  run = Run(Source(waits), steps=5, checkpoint_every=2, eval_every=3,
            evaluate=lambda params: {'eval/score': params})
  run.call()
  assert [step for step, *_ in run.saved] == [22, 24, 25]
  assert {s: r['eval/score'] for s, r in run.records.items() if 'eval/score' in r} == {
      23: 'p3', 25: 'p5'}
  assert all('timing_s/eval' in run.records[step] for step in (23, 25))
  assert run.named('record') == [21, 22, 23, 24, 25]


def test_a_restored_state_goes_on_where_it_was():
  run = Run(Source(), first=2)
  run.call()
  assert run.named('record') == [23, 24]
  done = Run(Source(), first=4)
  assert done.call()[1] and done.log == []


@pytest.mark.parametrize('waits', [True, False])
def test_an_interruption_saves_once_and_leaves(waits):
  asked = iter([False, True, False])
  run = Run(Source(waits), interrupt=types.SimpleNamespace(agreed=lambda: next(asked)))
  state, completed = run.call()
  assert not completed and state.step == 2
  assert run.named('record') == [21, 22] and [step for step, *_ in run.saved] == [22]
  at_the_end = Run(Source(waits), steps=1, interrupt=types.SimpleNamespace(agreed=lambda: True))
  assert at_the_end.call()[1]


@pytest.mark.parametrize('waits', [True, False])
def test_an_error_leaves_records_and_a_checkpoint_of_what_was_done(waits):
  run = Run(Source(waits, fails={2: KeyError('reward')}))
  with pytest.raises(KeyError, match='reward'):
    run.call()
  assert run.named('record') == [21, 22] and [step for step, *_ in run.saved] == [22]
  at_once = Run(Source(waits, fails={0: KeyError('reward')}))
  with pytest.raises(KeyError):
    at_once.call()
  assert at_once.saved == []


@pytest.mark.parametrize('waits', [True, False])
def test_no_checkpoint_claims_a_step_without_a_record(waits):
  run = Run(Source(waits), full_at=22)
  with pytest.raises(OSError, match='full'):
    run.call()
  assert list(run.records) == [21] and run.saved == []


@pytest.mark.parametrize('waits', [True, False])
def test_bad_updates_in_a_row_end_the_run(waits):
  run = Run(Source(waits), steps=9, bad=(1, 3, 4), max_bad_steps=2)
  with pytest.raises(loop.TrainingFailed, match='2 updates in a row'):
    run.call()
  assert [run.records[step].get('bad_steps') for step in range(21, 26)] == [None, 1, None, 1, 2]
  # What ran ahead is recorded as well, so that a resumed run leaves no gap.
  assert run.named('record')[-1] == run.saved[-1][0] == (25 if waits else 26)


def test_a_second_signal_is_not_caught():
  handler = lambda number, frame: None
  previous = signal.signal(signal.SIGTERM, handler)
  try:
    with loop.Interrupt() as interrupt:
      assert not interrupt.agreed()
      os.kill(os.getpid(), signal.SIGTERM)
      assert interrupt.agreed()
      assert signal.getsignal(signal.SIGTERM) is handler
    with loop.Interrupt() as interrupt:
      pass
    assert not interrupt.requested and signal.getsignal(signal.SIGTERM) is handler
  finally:
    signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize('waits', [True, False])
def test_the_times_of_steps_that_overlap_add_up_to_the_clocks(monkeypatch, waits):
  clock = types.SimpleNamespace(now=100.0, device_free=0.0)
  monkeypatch.setattr(loop, 'time', types.SimpleNamespace(perf_counter=lambda: clock.now))

  class Loss:
    """A number that the device has computed at a certain time."""

    def __init__(self, done_at):
      self.done_at = done_at

    def __array__(self, dtype=None, copy=None):
      clock.now = max(clock.now, self.done_at)
      return np.zeros((), np.float32)

  def train_step(state, batch):  # returns at once, and takes the device for two seconds
    clock.device_free = max(clock.now, clock.device_free) + 2.0
    return State(batch + 1), {'loss': Loss(clock.device_free), 'bad_steps': np.int32(0)}

  source, records = Source(waits), []
  source.batch = lambda params, step, loss_state: (step, {'train_tokens': 10}, None)
  loop.run(loop.Stage('sft', 0, 5, 5), State(0), source, train_step,
           record=lambda step, metrics, samples: records.append(metrics),
           save=lambda *_: None, checkpoint_every=100, max_bad_steps=3,
           interrupt=types.SimpleNamespace(agreed=lambda: False), counters={'num_tokens': 0})
  assert [record['step_time'] for record in records] == [2.0] * 5 and clock.now == 110.0
  assert [record['perf/train_tokens_per_second'] for record in records] == [5.0] * 5
