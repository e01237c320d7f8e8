"""Progress lines and the final table, from given metrics and a given clock."""

import io

import pytest

from ptjax.training import metrics
from ptjax.training import progress


class _Clock:
  now = 100.0

  def __call__(self):
    return self.now


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_without_a_terminal_a_line_now_and_then():
  stream, clock = io.StringIO(), _Clock()
  with progress.Progress(100, initial=20, every_seconds=10, stream=stream, clock=clock) as shown:
    for step in range(21, 101):
      clock.now += 1.0
      shown.update(step, {'reward': step / 100})
  lines = stream.getvalue().splitlines()
  assert lines[0] == 'step 21/100  reward 0.21  1:19 left'
  assert lines[1] == 'step 31/100  reward 0.31  1:09 left'
  assert lines[-1] == 'step 100/100  reward 1  0:00 left'
  assert len(lines) == 9


def test_the_record_of_step_0_shows_without_a_rate():
  stream = io.StringIO()
  progress.Progress(10, stream=stream).update(0, {'stage': 'start', 'eval/a/acc_strict': 0.25,
                                                  'eval/a/acc_strict_low': 0.2})
  assert stream.getvalue() == 'step 0/10  start  a/acc_strict 0.25\n'


def test_a_terminal_gets_a_bar():
  stream = _Terminal()
  with progress.Progress(4, stream=stream) as shown:
    for step in range(0, 5):
      shown.update(step, {'loss': step / 2, 'perf/train_tokens_per_second': 1234.5})
  assert '4/4' in stream.getvalue() and 'loss 2  1,234 tokens/s' in stream.getvalue()


def test_other_processes_are_quiet(monkeypatch):
  monkeypatch.setattr(progress.jax, 'process_index', lambda: 1)
  stream = io.StringIO()
  with progress.Progress(3, stream=stream) as shown:
    shown.update(1, {'loss': 1.0})
  assert stream.getvalue() == ''


@pytest.mark.parametrize('given,line', [
    ({'stage': 'grpo', 'reward': 0.53125, 'loss': -1e-9, 'kl': 1.0,
      'perf/rollout_tokens_per_second': 12345.6, 'perf/train_tokens_per_second': 1.0},
     'grpo  reward 0.5312  loss -1e-09  12,346 tokens/s'),
    ({'reward': None, 'loss': float('nan')}, 'loss nan'),
    ({}, '')])
def test_summary(given, line):
  assert progress.summary(given) == line


def test_final_table(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    acc = lambda value, low, high: {
        'eval/sum/acc_strict': value, 'eval/sum/acc_strict_se': 0.01,
        'eval/sum/acc_strict_low': low, 'eval/sum/acc_strict_high': high}
    writer.write(0, {'stage': 'start', **acc(0.0, 0.0, 0.0148)})
    writer.write(1, {'stage': 'sft', 'loss': 2.5})
    writer.write(2, {'stage': 'sft', 'loss': 1.5, **acc(0.414, 0.355, 0.475)})
    writer.write(3, {'stage': 'grpo', 'loss': 0.0, 'reward': 0.25, 'eval/sum/pass@4': 0.75})
    writer.write(4, {'stage': 'grpo', 'loss': float('nan'), 'reward': 0.96875,
                     **acc(0.9375, 0.90066, 0.9613)})
  assert progress.final_table(tmp_path).splitlines() == [
      '                        start                   sft                   grpo',
      'sum/acc_strict  0 [0, 0.0148]  0.414 [0.355, 0.475]  0.9375 [0.901, 0.961]',
      'sum/pass@4                                                            0.75',
      'grpo, 2 steps  first        last',
      'reward          0.25      0.9688',
      'loss               0  not finite']


def test_final_table_of_nothing(tmp_path):
  assert progress.final_table(tmp_path) == 'no step was taken'


@pytest.mark.parametrize('seconds,text', [(0, '0:00'), (59.6, '1:00'), (65, '1:05'),
                                          (3725, '1:02:05')])
def test_spell_seconds(seconds, text):
  assert progress.spell_seconds(seconds) == text
