"""The pool survives functions that hang, raise, crash, flood the output and eat memory."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from ptjax.rewards import pool as pool_lib

_ROOT = pathlib.Path(__file__).resolve().parents[2]

_FUNCTIONS = '''
import os, signal, sys, time

def work(kind, value):
  if kind == 'sleep':
    time.sleep(value)
  elif kind == 'ignore signals':
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
      signal.signal(number, signal.SIG_IGN)
    while True:
      pass
  elif kind == 'kill':
    os.kill(os.getpid(), signal.SIGKILL)
  elif kind == 'exit':
    os._exit(value)
  elif kind == 'raise':
    raise KeyError(value)
  elif kind == 'memory':
    return len(bytearray(value))
  elif kind == 'print':
    print('noise' * 1000, flush=True)
    os.write(1, b'more noise')
  elif kind == 'modules':
    return sorted(name for name in ('jax', 'numpy', 'ptjax') if name in sys.modules)
  elif kind == 'pid':
    return os.getpid()
  return value
'''


@pytest.fixture(name='make_pool')
def make_pool_fixture(tmp_path):
  path = tmp_path / 'functions.py'
  path.write_text(_FUNCTIONS)
  pools = []

  def make_pool(function='work', **options):
    pools.append(pool_lib.WorkerPool(path, function, **options))
    return pools[-1]

  yield make_pool
  for pool in pools:
    pool.close()


def test_results_keep_their_order_and_unicode(make_pool):
  pool = make_pool()
  values = [1, 'two', None, [3.5], '\ud800 \U0001f600', True]
  outcomes = pool.map([('return', value) for value in values])
  assert [outcome.value for outcome in outcomes] == values
  assert {outcome.status for outcome in outcomes} == {'ok'}
  assert pool.map([]) == []


def test_workers_persist_and_import_little(make_pool):
  pool = make_pool(num_workers=1)
  first, = pool.map([('pid', 0)])
  second, modules = pool.map([('pid', 0), ('modules', 0)])
  assert first.value == second.value != os.getpid()
  assert modules.value == []


@pytest.mark.parametrize('kind', ['sleep', 'ignore signals'])
def test_a_hanging_item_costs_its_deadline_and_its_worker(make_pool, kind):
  pool = make_pool(num_workers=1, timeout_seconds=0.8)
  before, = pool.map([('pid', 0)])
  outcomes = pool.map([('return', 1), (kind, 100), ('return', 2), ('pid', 0)])
  assert [outcome.status for outcome in outcomes] == ['ok', 'timeout', 'ok', 'ok']
  assert outcomes[1].value is None and '0.8 s' in outcomes[1].detail
  assert outcomes[2].value == 2
  assert outcomes[3].value != before.value
  assert not _alive(before.value)


@pytest.mark.parametrize('item, detail', [
    (('kill', 0), 'killed by SIGKILL'), (('exit', 3), 'exit code 3')])
def test_a_dying_worker_is_replaced(make_pool, item, detail):
  pool = make_pool(num_workers=2)
  outcomes = pool.map([('return', 1), item, ('return', 2), ('return', 3)])
  assert [outcome.status for outcome in outcomes] == ['ok', 'died', 'ok', 'ok']
  assert detail in outcomes[1].detail


def test_a_worker_killed_from_outside_in_mid_task(make_pool):
  pool = make_pool(num_workers=1)
  worker, = pool.map([('pid', 0)])
  threading.Timer(0.2, os.kill, (worker.value, signal.SIGKILL)).start()
  outcomes = pool.map([('sleep', 100), ('return', 7)])
  assert [outcome.status for outcome in outcomes] == ['died', 'ok']


def test_a_worker_killed_while_idle_costs_nothing(make_pool):
  pool = make_pool(num_workers=1)
  worker, = pool.map([('pid', 0)])
  os.kill(worker.value, signal.SIGKILL)
  while _alive(worker.value):
    time.sleep(0.01)
  assert pool.map([('return', 7)])[0].value == 7


def test_errors_memory_and_noise(make_pool):
  pool = make_pool(num_workers=1, memory_bytes=2**30)
  raised, memory, printed = pool.map([('raise', 'x'), ('memory', 2**32), ('print', 5)])
  assert (raised.status, raised.detail) == ('error', "KeyError: 'x'")
  assert (memory.status, memory.detail.split(':')[0]) == ('error', 'MemoryError')
  assert printed.value == 5


def test_close_ends_the_workers_and_map_starts_new_ones(make_pool):
  pool = make_pool()
  worker, = pool.map([('pid', 0)])
  pool.close()
  assert not _alive(worker.value)
  assert pool.map([('return', 1)])[0].value == 1


def test_a_function_that_does_not_load(make_pool):
  with pytest.raises(RuntimeError, match='cannot load absent of .*AttributeError'):
    make_pool('absent').map([('return', 1)])


def test_a_file_that_never_finishes_loading(tmp_path, monkeypatch):
  started, popen = [], subprocess.Popen
  monkeypatch.setattr(subprocess, 'Popen', lambda *args, **options: started.append(
      popen(*args, **options)) or started[-1])
  path = tmp_path / 'slow.py'
  path.write_text('import time\ntime.sleep(100)')
  pool = pool_lib.WorkerPool(path, 'work', num_workers=3, start_timeout_seconds=0.2)
  with pytest.raises(RuntimeError, match='3 worker processes in a row did not start'):
    pool.map([(1,)] * 3)
  assert len(started) >= 3 and all(process.poll() is not None for process in started)


def test_an_interrupted_map_leaves_no_stale_answer(make_pool):
  pool = make_pool(num_workers=1)
  pool.map([('return', 0)])

  def interrupt(signum, frame):
    raise KeyboardInterrupt

  old = signal.signal(signal.SIGALRM, interrupt)
  try:
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
      pool.map([('sleep', 100)])
  finally:
    signal.signal(signal.SIGALRM, old)
  assert pool.map([('return', 'fresh')])[0].value == 'fresh'


def test_workers_end_with_a_trainer_that_is_killed(tmp_path):
  (tmp_path / 'functions.py').write_text(_FUNCTIONS)
  script = (f'import os, signal; from ptjax.rewards import pool\n'
            f'p = pool.WorkerPool({str(tmp_path / "functions.py")!r}, "work")\n'
            f'print(p.map([("pid", 0)])[0].value, flush=True)\n'
            f'os.kill(os.getpid(), signal.SIGKILL)')
  trainer = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True,
                           check=False, cwd=_ROOT, env={**os.environ, 'PYTHONPATH': str(_ROOT)})
  assert trainer.returncode == -signal.SIGKILL, trainer.stderr
  worker = int(trainer.stdout)
  deadline = time.monotonic() + 30
  while _alive(worker) and time.monotonic() < deadline:
    time.sleep(0.02)
  assert not _alive(worker)


def _alive(process_id):
  try:
    os.kill(process_id, 0)
    with open(f'/proc/{process_id}/stat', encoding='ascii') as stat:
      return stat.read().rpartition(')')[2].split()[0] != 'Z'
  except (ProcessLookupError, FileNotFoundError):
    return False
