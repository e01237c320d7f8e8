"""A run that was interrupted in any way and resumed equals one that never stopped, to the bit."""

import pathlib
import random
import re
import shlex
import shutil
import signal
import sys
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import job_runs

# Three supervised steps, then rollouts of four updates each (two mini-batches, two passes), with
# a reference that differs from both the first and the last policy.
SETTINGS = dict(warm_start__steps=3, training__mini_batches=2, training__epochs=2,
                loss__kl_coefficient=0.04, eval__every_steps=3, log__samples_every=1)
STEPS = 10
LAST = 3 + STEPS


@pytest.fixture(scope='module')
def run(tmp_path_factory, compile_cache):
  """Makes the arguments of a run; all runs differ only in what cannot change the result."""
  root = tmp_path_factory.mktemp('runs')
  model = job_runs.export_model(root / 'model')

  def make(name, *more, **settings):
    return root / name, job_runs.arguments(
        model, root / name, compile_cache, f'--steps={STEPS}', *more, **{**SETTINGS, **settings})
  return make


@pytest.fixture(scope='module')
def straight(run):
  """The run that nothing interrupts."""
  out_dir, argv = run('straight')
  job_runs.finish(job_runs.start(argv))
  records = job_runs.metrics(out_dir)
  assert [r['step'] for r in records] == list(range(LAST + 1))
  # What the comparisons below rest on: rewards vary, the reference matters, the policy moves.
  assert all(r['grad_norm'] > 0 for r in records[1:])
  assert records[-1]['kl'] > 1e-4
  return out_dir


@pytest.mark.slow
def test_kill_9_at_random_moments(run, straight):
  rng = random.Random(0)
  out_dir, _ = run('killed')
  kills = [  # (wait for the record of this step, steps between checkpoints)
      (1, 1),  # in the warm start, or between the stages
      (rng.randint(6, 7), 3),  # in the middle of the first rollout's updates
      (rng.randint(9, 10), 1),  # of the second's
  ]
  for step, every in kills:
    _, argv = run('killed', checkpoint__every_steps=every)
    process = job_runs.start(argv)
    job_runs.wait_for_step(process, out_dir, step)
    time.sleep(rng.uniform(0, 0.1))
    process.kill()
    job_runs.finish(process, code=-signal.SIGKILL)
    assert not (out_dir / 'model').exists()
  _, argv = run('killed', checkpoint__every_steps=3)
  job_runs.finish(job_runs.start(argv))
  job_runs.assert_same_run(straight, out_dir)
  assert (out_dir / 'samples.jsonl').read_text() == (straight / 'samples.jsonl').read_text()


@pytest.mark.slow
def test_sigterm_says_how_to_go_on_and_a_torn_checkpoint_costs_only_time(run, straight):
  out_dir, argv = run('stopped', '--resume=never')
  process = job_runs.start(argv)
  job_runs.wait_for_step(process, out_dir, 5)
  process.send_signal(signal.SIGTERM)
  out, _ = job_runs.finish(process, code=0)
  stopped = job_runs.metrics(out_dir)[-1]['step']
  assert 5 <= stopped < LAST and not (out_dir / 'model').exists()
  assert sorted(p.name for p in (out_dir / 'checkpoints').iterdir()) == ['3', str(stopped)]
  command = shlex.split(re.search('To go on: (.*)', out)[1])
  assert command[:3] == ['python', '-m', 'ptjax.launch']

  torn, torn_argv = run('torn')
  shutil.copytree(out_dir, torn)
  whole = job_runs.start(command[3:])
  damaged = max((torn / 'checkpoints' / str(stopped) / 'arrays').rglob('*'),
                key=lambda path: path.stat().st_size if path.is_file() else 0)
  damaged.write_bytes(damaged.read_bytes()[:100])
  fallen_back = job_runs.start(torn_argv)
  job_runs.finish(whole)
  job_runs.assert_same_run(straight, out_dir)
  _, err = job_runs.finish(fallen_back)
  assert f'{torn}/checkpoints/{stopped} cannot be read' in err and 'falling back' in err
  job_runs.assert_same_run(straight, torn)


@pytest.mark.slow
def test_a_finished_run_is_not_lost_to_another_command(run, straight, capsys):
  def refused(*more, **settings):
    _, argv = run('straight', *more, **settings)
    assert job_runs.launch_here(argv) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1, err
    return err[0]
  def files():
    return {path: path.stat().st_mtime_ns for path in straight.rglob('*')
            if path.is_file() and path.name != '.lock'}
  before = files()
  message = refused('--seed=1', optimizer__learning_rate=1e-5, loss__kl_coefficient=0.1)
  for words in ('seed was 0, now 1', 'optimizer.learning_rate was 0.003, now 1e-05',
                'loss.kl_coefficient was 0.04, now 0.1', f'step {LAST}', '--out_dir'):
    assert words in message
  assert '--resume=never' in refused('--resume=never')
  assert files() == before
