"""metrics.jsonl without gaps or double steps, whatever ended the run before."""

import json
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ptjax.training import metrics


def _records(folder, name=metrics.METRICS):
  return [json.loads(line, parse_constant=pytest.fail)
          for line in (folder / name).read_text().splitlines()]


def _write(folder, steps, resume_step=None):
  with metrics.MetricsWriter(folder, resume_step=resume_step, tensorboard=False) as writer:
    for step in steps:
      writer.write(step, {'loss': step / 7})
      writer.write_samples(step, [{'prompt': 'p', 'completion': f'c{step}'}] * 2)


def test_values_come_back_exactly_and_strictly_as_json(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(1, {
        'python': 0.1, 'integer': 3, 'flag': True, 'text': 'sft',
        'float32': np.float32(0.1), 'bfloat16': ml_dtypes.bfloat16(1.5), 'jax': jnp.float32(0.3),
        'jax_bfloat16': jnp.bfloat16(0.5), 'int32': np.int32(-4), 'one': np.asarray([2.5]),
        'bool_': np.bool_(False), 'nan': float('nan'), 'inf': jnp.inf, 'absent': None})
  (record,) = _records(tmp_path)
  assert record == {
      'step': 1, 'python': 0.1, 'integer': 3, 'flag': True, 'text': 'sft',
      'float32': float(np.float32(0.1)), 'bfloat16': 1.5, 'jax': float(np.float32(0.3)),
      'jax_bfloat16': 0.5, 'int32': -4, 'one': 2.5, 'bool_': False, 'nan': None, 'inf': None}
  assert record['bool_'] is False and record['flag'] is True
  assert list(record)[0] == 'step'


def test_a_record_is_in_the_file_when_write_returns(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, tensorboard=False)
  writer.write(1, {'loss': 1.0})
  writer.write_samples(1, [{'prompt': 'ä\n', 'completion': '\u2028</script>', 'reward': 0.5,
                            'rewards': {'exact': np.float32(1.0), 'none': None},
                            'log_probs': [-0.5, float('-inf')], 'tokens': ['a', 'b']}])
  assert metrics.read(tmp_path / metrics.METRICS) == [{'step': 1, 'loss': 1.0}]
  assert metrics.read(tmp_path / metrics.SAMPLES) == [
      {'step': 1, 'prompt': 'ä\n', 'completion': '\u2028</script>', 'reward': 0.5,
       'rewards': {'exact': 1.0}, 'log_probs': [-0.5, None], 'tokens': ['a', 'b']}]
  writer.close()


def test_text_that_utf8_cannot_hold_is_written(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write_samples(1, [{'prompt': 'a\ud800b'}])
  assert metrics.read(tmp_path / metrics.SAMPLES) == [{'step': 1, 'prompt': 'a\ud800b'}]
  metrics.truncate(tmp_path / metrics.SAMPLES, 1)
  assert metrics.read(tmp_path / metrics.SAMPLES) == [{'step': 1, 'prompt': 'a\ud800b'}]


@pytest.mark.parametrize('value', [np.zeros(2), [1, 2], object(), np.asarray(['x', 'y'])])
def test_a_value_that_is_no_scalar_is_refused_by_name(tmp_path, value):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    with pytest.raises(ValueError, match="'bad' is no scalar"):
      writer.write(1, {'bad': value})


@pytest.mark.parametrize('step', [2, 1])
def test_no_step_is_written_twice(tmp_path, step):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(2, {})
    with pytest.raises(ValueError, match=f'step {step} follow those of step 2'):
      writer.write(step, {})
  with metrics.MetricsWriter(tmp_path, resume_step=2, tensorboard=False) as writer:
    with pytest.raises(ValueError, match='follow'):
      writer.write(2, {})


def test_resuming_leaves_no_gap_and_no_double_step(tmp_path):
  _write(tmp_path, range(0, 9))  # the checkpoint is of step 5; the run was killed after step 8
  before = (tmp_path / metrics.METRICS).read_text().splitlines()
  _write(tmp_path, range(6, 12), resume_step=5)
  assert [r['step'] for r in _records(tmp_path)] == list(range(0, 12))
  assert (tmp_path / metrics.METRICS).read_text().splitlines()[:6] == before[:6]
  samples = _records(tmp_path, metrics.SAMPLES)
  assert [r['step'] for r in samples] == [s for s in range(0, 12) for _ in range(2)]


@pytest.mark.parametrize('tail', ['{"step": 4, "lo', '{"step": 4}garbage', '\x00' * 40, '4', '[]',
                                  '{"loss": 1}', '{"step": null}'])
@pytest.mark.parametrize('name', [metrics.METRICS, metrics.SAMPLES])
def test_a_torn_last_line_is_dropped(tmp_path, tail, name):
  _write(tmp_path, range(1, 4))
  with open(tmp_path / name, 'a') as f:
    f.write(tail)
  assert [r['step'] for r in metrics.read(tmp_path / name)][-1] == 3
  _write(tmp_path, range(4, 6), resume_step=3)
  assert [r['step'] for r in _records(tmp_path)] == [1, 2, 3, 4, 5]
  assert sorted({r['step'] for r in _records(tmp_path, metrics.SAMPLES)}) == [1, 2, 3, 4, 5]


def test_a_cut_inside_a_letter_is_no_error(tmp_path):
  (tmp_path / metrics.SAMPLES).write_bytes(
      '{"step": 1, "prompt": "ä"}\n{"step": 2, "prompt": "ä'.encode()[:-1])
  assert metrics.read(tmp_path / metrics.SAMPLES) == [{'step': 1, 'prompt': 'ä'}]


def test_a_fresh_run_starts_the_files_anew(tmp_path):
  _write(tmp_path, range(0, 4))
  _write(tmp_path, range(0, 2))
  assert [r['step'] for r in _records(tmp_path)] == [0, 1]
  assert len(_records(tmp_path, metrics.SAMPLES)) == 4


def test_lost_records_are_a_warning(tmp_path, caplog):
  _write(tmp_path, [1, 2])
  with caplog.at_level('WARNING'):
    _write(tmp_path, [6], resume_step=5)
  assert 'ends at step 2, before step 5' in caplog.text


def test_truncation_is_atomic(tmp_path, monkeypatch):
  _write(tmp_path, range(1, 6))
  before = (tmp_path / metrics.METRICS).read_bytes()
  def killed(*args):
    raise KeyboardInterrupt
  with monkeypatch.context() as patch:
    patch.setattr(metrics.os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
      metrics.truncate(tmp_path / metrics.METRICS, 2)
  assert (tmp_path / metrics.METRICS).read_bytes() == before
  assert metrics.truncate(tmp_path / metrics.METRICS, 2) == 2
  assert metrics.truncate(tmp_path / metrics.METRICS, 0) is None
  assert metrics.truncate(tmp_path / 'missing', 0) is None and metrics.read(tmp_path / 'no') == []


def test_tensorboard_holds_the_same_numbers(tmp_path):
  pytest.importorskip('tensorboardX')
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.write(1, {'loss': 0.25, 'stage': 'sft', 'bad': float('nan')})
    writer.write(2, {'loss': 0.125, 'eval/arithmetic/acc_strict': 0.5})
  found = {}
  for event in _events(tmp_path):
    for value in event.summary.value:
      found[value.tag, event.step] = value.simple_value
  assert found == {('loss', 1): 0.25, ('loss', 2): 0.125, ('eval/arithmetic/acc_strict', 2): 0.5}


def test_tensorboard_hides_the_steps_taken_again(tmp_path):
  pytest.importorskip('tensorboardX')
  with metrics.MetricsWriter(tmp_path) as writer:
    for step in (1, 2, 3):
      writer.write(step, {'loss': 1.0})
  with metrics.MetricsWriter(tmp_path, resume_step=1) as writer:
    writer.write(2, {'loss': 2.0})
  purges = [e.step for e in _events(tmp_path) if e.HasField('session_log')]
  assert 2 in purges


def _events(folder):
  from tensorboardX import event_file_writer
  from tensorboardX.proto import event_pb2
  assert event_file_writer
  for path in sorted(folder.glob('events.*')):
    data = path.read_bytes()
    while data:  # TFRecord framing: length, its checksum, record, its checksum
      length = int.from_bytes(data[:8], 'little')
      yield event_pb2.Event.FromString(data[12:12 + length])
      data = data[16 + length:]


def test_without_tensorboardx_the_metrics_are_still_written(tmp_path, monkeypatch, caplog):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  with caplog.at_level('WARNING'):
    with metrics.MetricsWriter(tmp_path) as writer:
      writer.write(1, {'loss': 1.0})
  assert 'tensorboardX is not installed' in caplog.text
  assert _records(tmp_path) == [{'step': 1, 'loss': 1.0}]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.jax, 'process_index', lambda: 1)
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.write(1, {'loss': 1.0})
    writer.write_samples(1, [{'prompt': ''}])
  assert list(tmp_path.iterdir()) == []


def test_opening_events_does_not_load_torch(tmp_path):
  """tensorboardX would, where there is one, though nothing here hands it tensors."""
  pytest.importorskip('tensorboardX')
  code = ('import sys; from ptjax.training import metrics; '
          'writer = metrics.MetricsWriter(sys.argv[1]); writer.__enter__(); '
          'writer.write(1, {"loss": 1.0}); writer.__exit__(None, None, None); '
          'assert "tensorboardX" in sys.modules; sys.exit("torch" in sys.modules)')
  done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert any(path.name.startswith('events.') for path in tmp_path.iterdir())
