"""Two real processes train together and give what one process with as many devices gives."""

import json
import pathlib
import re
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import job_runs


def free_port():
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    return probe.getsockname()[1]


def start_pair(argv):
  """Starts two processes of two devices each that make one run."""
  port = free_port()
  return [job_runs.start([*argv, f'--coordinator=localhost:{port}', '--num_processes=2',
                          f'--process_id={rank}'], devices=2)
          for rank in range(2)]


SHARING = textwrap.dedent('''
    import os, signal, sys
    import jax
    import numpy as np
    rank = int(sys.argv[2])
    jax.distributed.initialize(f'localhost:{sys.argv[1]}', 2, rank)
    from ptjax import sharding
    from ptjax.training import loop
    whole = np.random.default_rng(0).normal(size=(5, 2))
    whole[3] = np.nan
    mine = sharding.local_rows(5)
    assert (mine.stop - mine.start) == (3, 2)[rank]
    for array in (whole, whole[:, 0], whole > 0, whole.astype(np.float32)):
      together = sharding.gather_rows(array[mine], 5)
      assert together.dtype == array.dtype and together.tobytes() == array.tobytes()
    one = whole[:1]  # process 1 has no row of it
    assert sharding.gather_rows(one[sharding.local_rows(1)], 1).tobytes() == one.tobytes()
    values = sharding.gather_json({'rank': rank, 'text': 'ä' * (3 + 40 * rank), 'none': None})
    assert [v['rank'] for v in values] == [0, 1] and len(values[1]['text']) == 43
    with loop.Interrupt() as interrupt:
      assert not interrupt.agreed()
      if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
      assert interrupt.agreed()  # one is asked, both stop
    print('done', flush=True)
''')


@pytest.mark.slow
def test_rows_objects_and_a_signal_reach_every_process():
  port = free_port()
  pair = [subprocess.Popen(
      [sys.executable, '-c', SHARING, str(port), str(rank)], stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, text=True, env=job_runs.environment()) for rank in range(2)]
  for process in pair:
    assert 'done' in job_runs.finish(process)[0]


SCORING = textwrap.dedent("""
    import functools, json, sys
    import jax
    import numpy as np
    port, rank, count, policy, rewards, out = sys.argv[1:]
    if count == '2':
      jax.distributed.initialize(f'localhost:{port}', 2, int(rank))
    from ptjax import assembly, config, learned, sharding
    from ptjax.rewards import combine
    from ptjax.training import scoring
    settings = config.Config(model=policy)
    load = functools.partial(learned.load_reward, config=settings, mesh=sharding.make_mesh(),
                             policy=assembly.load_policy(settings))
    seen = []
    def own_rows(prompts, completions):
      seen.extend(completions)
      return [float(len(c)) for c in completions]
    texts = ['1', '23', '456', '7', '89']
    with combine.load([own_rows, f'model:{rewards}*2'], learned=load) as reward_set:
      table = scoring.score(reward_set, ['1+2='] * 5, texts, {})
    assert seen == (texts if count == '1' else [texts[:3], texts[3:]][int(rank)])
    with open(f'{out}_{rank}', 'w') as file:
      json.dump([table.names, table.values.tolist(), table.total.tolist()], file)
""")


@pytest.mark.slow
def test_a_reward_model_scores_all_rows_on_all_processes(tmp_path):
  policy = job_runs.export_model(tmp_path / 'policy', num_layers=1)
  rewards = job_runs.export_model(tmp_path / 'rewards', num_layers=1, num_labels=1)

  def start(port, rank, count, devices):
    return subprocess.Popen(
        [sys.executable, '-c', SCORING, str(port), str(rank), str(count), str(policy),
         str(rewards), str(tmp_path / f'scores_{count}')], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=job_runs.environment(devices))
  port = free_port()
  for process in [start(port, 0, 2, 2), start(port, 1, 2, 2), start(port, 0, 1, 4)]:
    job_runs.finish(process)
  found = [json.loads((tmp_path / f'scores_{name}').read_text()) for name in ('1_0', '2_0', '2_1')]
  assert found[1] == found[2]  # to the bit: what follows must be the same everywhere
  assert found[0][0] == found[1][0] == ['own_rows', 'model']
  for one, two in zip(found[0][1:], found[1][1:]):
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)


# Fails in process 1 alone, on the second rollout, while a file named `down` lies beside it.
REWARD = """
import pathlib
import jax
calls = 0

def short(prompts, completions, **columns):
  global calls
  calls += 1
  if jax.process_index() == 1 and calls > 1 and (pathlib.Path(__file__).parent / 'down').exists():
    raise OSError('the judge is down')
  return [-0.1 * len(c) for c in completions]
"""


@pytest.mark.slow
def test_two_processes_fail_resume_and_end_like_one(tmp_path, compile_cache):
  model = job_runs.export_model(tmp_path / 'model', num_layers=1)
  (tmp_path / 'judge.py').write_text(REWARD)
  (tmp_path / 'down').touch()

  def arguments(name):
    return job_runs.arguments(
        model, tmp_path / name, compile_cache, '--mesh=data=2,tensor=2', '--steps=4',
        f'--reward={tmp_path}/judge.py:short', loss__kl_coefficient=0.04,
        training__mini_batches=2)
  out_dir, alone = tmp_path / 'pair', tmp_path / 'alone'
  for process in start_pair(arguments('pair')):  # one fails, and neither waits for ever
    _, err = job_runs.finish(process, code=2)
    assert "reward 'short': raised OSError: 'the judge is down'" in err.splitlines()[-1]
  assert [r['step'] for r in job_runs.metrics(out_dir)] == [0, 1, 2]
  assert [p.name for p in (out_dir / 'checkpoints').iterdir()] == ['2']
  (tmp_path / 'down').unlink()
  outputs = [job_runs.finish(process) for process in start_pair(arguments('pair'))]
  job_runs.finish(job_runs.start(arguments('alone'), devices=4))

  # Process 0 speaks and writes; the other does neither. (Gloo's threads write over each other.)
  said = [[line for line in out.splitlines() if not re.search(r'\[Gloo\]|peer ranks', line)]
          for out, _ in outputs]
  assert said[0][-1] == f'report  {out_dir}/report.html' and said[1] == []
  assert 'step 4/4' in outputs[0][1] and 'step' not in outputs[1][1]
  assert files(out_dir) == files(alone)
  records, expected = job_runs.metrics(out_dir), job_runs.metrics(alone)
  assert [r['step'] for r in records] == [r['step'] for r in expected] == [0, 1, 2, 3, 4]
  for record, wanted in zip(records, expected):
    assert record.keys() == wanted.keys()
    for name, value in wanted.items():
      if isinstance(value, str):
        assert record[name] == value
      else:  # sums run in another order; tokens and rewards are the same
        np.testing.assert_allclose(record[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
  assert job_runs.samples(out_dir) == job_runs.samples(alone)
  weights, wanted = job_runs.weights(out_dir), job_runs.weights(alone)
  for name in wanted:
    np.testing.assert_allclose(weights[name], wanted[name], rtol=1e-4, atol=1e-5, err_msg=name)


def files(out_dir):
  """What a run left, without names that hold a time, a random part or a step."""
  found = {str(path.relative_to(out_dir)) for path in out_dir.rglob('*')}
  return {name for name in found
          if not name.startswith(('checkpoints/', 'reference/', 'events.'))}
