"""Tests of what a GPU is told before JAX starts it."""

import os
import pathlib
import subprocess
import sys

import pytest

from ptjax import config as settings
from ptjax import gpu
from ptjax import job
from ptjax.plan import planner

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import job_runs


def test_the_users_own_flags_win():
  found = gpu.environment(settings.DeviceSettings(), {
      'XLA_FLAGS': '--xla_gpu_enable_pipelined_all_gather=false --xla_dump_to=/x'})
  flags = found['XLA_FLAGS'].split()
  assert flags[:2] == ['--xla_gpu_enable_pipelined_all_gather=false', '--xla_dump_to=/x']
  names = [flag.partition('=')[0] for flag in flags]
  assert sorted(names) == sorted(['--xla_dump_to', *(f'--{name}' for name in gpu.XLA_FLAGS)])


def test_memory_as_set_but_not_against_the_environment():
  device = settings.DeviceSettings(memory_fraction=0.9, preallocate=False, xla_flags='none')
  assert gpu.environment(device, {}) == {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
                                         'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.9'}
  given = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'true', 'XLA_PYTHON_CLIENT_MEM_FRACTION': '.5'}
  assert gpu.environment(device, given) == {}


def test_nothing_is_set_for_a_machine_without_one(monkeypatch):
  monkeypatch.setattr(gpu.importlib.util, 'find_spec', lambda name: None)
  monkeypatch.delenv('XLA_PYTHON_CLIENT_PREALLOCATE', raising=False)
  gpu.prepare(settings.DeviceSettings())
  assert 'XLA_PYTHON_CLIENT_PREALLOCATE' not in os.environ


def test_nor_where_jax_is_told_to_stay_on_the_cpu(monkeypatch):
  monkeypatch.setattr(gpu.importlib.util, 'find_spec', lambda name: object())
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert not gpu.has_plugin()


@pytest.mark.parametrize('platforms', ['cuda,cpu', 'cpu,cuda', 'gpu', 'cpu,gpu', '', None])
def test_every_way_of_asking_jax_for_a_gpu_counts(monkeypatch, platforms):
  monkeypatch.setattr(gpu.importlib.util, 'find_spec', lambda name: object())
  if platforms is None:
    monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  else:
    monkeypatch.setenv('JAX_PLATFORMS', platforms)
  assert gpu.has_plugin()


@pytest.mark.parametrize('arguments, taken', [(['--plan'], 'false'), ([], 'true')])
def test_a_plan_takes_no_memory_beforehand_for_a_job_may_run_there(
    monkeypatch, arguments, taken):
  monkeypatch.setenv('XLA_FLAGS', os.environ.get('XLA_FLAGS', ''))  # so that it is put back
  monkeypatch.setenv('XLA_PYTHON_CLIENT_PREALLOCATE', '')
  monkeypatch.delenv('XLA_PYTHON_CLIENT_PREALLOCATE')
  monkeypatch.setattr(gpu, 'has_plugin', lambda: True)
  found = []
  look = lambda *_, **__: found.append(os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'])
  monkeypatch.setattr(planner, 'plan', look)
  monkeypatch.setattr(job, 'run', look)
  assert job_runs.launch_here(arguments) == 0
  assert found == [taken]


@pytest.mark.slow
def test_xla_knows_every_flag():  # it ends the process at one it does not know
  flags = gpu.environment(settings.DeviceSettings(), {})['XLA_FLAGS']
  subprocess.run([sys.executable, '-c', 'import jax; jax.devices()'], check=True,
                 env={**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'})
