"""Checkpoints of processes: whole after one is killed, and the same for all of several."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.training import checkpoint

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

KILLED = textwrap.dedent('''
    import sys
    import jax.numpy as jnp
    from ptjax.training import checkpoint
    saver = checkpoint.Checkpointer(sys.argv[1], keep=2)
    for step in range(1, 10_000):
      saver.save(step, {'a': jnp.full((1 << 20,), step, jnp.float32), 'step': jnp.int32(step)},
                 {'step': step})
      print(step, flush=True)
''')


@pytest.mark.parametrize('delay', [0.0, 0.05])
def test_kill_9_while_saving_leaves_a_restorable_folder(tmp_path, delay):
  process = subprocess.Popen(
      [sys.executable, '-c', KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True,
      env={**os.environ, 'PYTHONPATH': str(REPOSITORY), 'JAX_PLATFORMS': 'cpu'})
  try:
    started = 0
    while started < 4:
      started = int(process.stdout.readline())
    time.sleep(delay)
  finally:
    process.send_signal(signal.SIGKILL)
    started = int((process.communicate()[0].split() or [started])[-1])
  target = {'a': jnp.zeros((1 << 20,)), 'step': jnp.int32(0)}
  with checkpoint.Checkpointer(tmp_path, keep=2) as saver:
    restored = saver.restore(target)
    # A save waits for the one before: at most the one in flight is lost.
    assert restored.step >= started - 1
    assert restored.metadata == {'step': restored.step}
    assert int(restored.arrays['step']) == restored.step
    assert (np.asarray(restored.arrays['a']) == restored.step).all()
    assert saver.save(restored.step + 1, restored.arrays, {})
  left = sorted(p.name for p in tmp_path.iterdir())
  assert all(name.isdigit() for name in left), left  # the half-written folder is gone


TWO_PROCESSES = textwrap.dedent('''
    import shutil, sys
    import jax, numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    folder, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(f'localhost:{port}', 2, rank)
    from ptjax.training import checkpoint
    mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec('fsdp'))
    def state(step):
      host = np.arange(64, dtype=np.float32).reshape(8, 8) * step
      return {'a': jax.make_array_from_callback(host.shape, sharding, lambda i: host[i])}
    with checkpoint.Checkpointer(folder, keep=3) as saver:
      for step in (1, 2):
        assert saver.save(step, state(step), {'step': step}, experience={'x': np.arange(step)})
    multihost_utils.sync_global_devices('saved')
    if rank == 0:
      shutil.rmtree(f'{folder}/2/experience/d')
    multihost_utils.sync_global_devices('torn')
    with checkpoint.Checkpointer(folder, keep=3) as saver:
      restored = saver.restore(state(0))
      assert restored.step == 1 and restored.metadata == {'step': 1}, restored
      assert restored.experience['x'].tolist() == [0]
      wanted = state(1)['a']
      for mine, other in zip(restored.arrays['a'].addressable_shards, wanted.addressable_shards):
        np.testing.assert_array_equal(mine.data, other.data)
      assert saver.save(2, state(5), {'step': 2})
      assert saver.restore(state(0)).step == 2
    print('done', flush=True)
''')


@pytest.mark.slow
def test_two_processes_agree_on_what_to_restore(tmp_path):
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  processes = [
      subprocess.Popen(
          [sys.executable, '-c', TWO_PROCESSES, str(tmp_path / 'shared'), str(port), str(rank)],
          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
          env={**os.environ, 'PYTHONPATH': str(REPOSITORY), 'JAX_PLATFORMS': 'cpu',
               'XLA_FLAGS': '--xla_force_host_platform_device_count=2'})
      for rank in range(2)]
  try:
    outputs = [p.communicate(timeout=180)[0] for p in processes]
  finally:
    for process in processes:
      process.kill()
  assert [p.returncode for p in processes] == [0, 0], outputs
  assert 'experience/d' in outputs[0] and 'see process 0' in outputs[1]
