"""Shared test set-up: eight virtual CPU devices, and the data folder beside the repository.

Nearly all test time is compilation of tiny programs, so LLVM's optimisations, which would cost
more than they save here, are off, and so are fusions made by MLIR, which take half of what is left;
`.ci/run` also runs the launcher with them on.
"""

import gc
import importlib.metadata
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
    ' --xla_backend_optimization_level=0')
if importlib.metadata.version('jaxlib').startswith('0.10.'):  # later ones may not know the flags
  # Generating a program's code in parts pays only where there are idle cores.
  os.environ['XLA_FLAGS'] += (
      ' --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
  """Keeps the tests of a file on one worker: what they share is made and compiled once."""
  if config.getvalue('dist') != 'load':  # another way was asked for
    return None
  from xdist import scheduler
  config.option.loadscopereorder = False  # the last files are short ones, so workers end together
  return scheduler.LoadFileScheduling(config, log)


def pytest_collection_finish(session):
  """Tracing makes millions of objects that live on; looking for cycles among them is in vain."""
  del session
  gc.freeze()
  gc.set_threshold(20_000, 10, 20)


@pytest.fixture(scope='session')
def shared_data():
  """The folder of real data and a real small checkpoint, beside the repository."""
  path = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'data'
  if not path.is_dir():
    pytest.skip(f'no shared data folder at {path}')
  return path


@pytest.fixture(scope='session')
def compile_cache(tmp_path_factory):
  """A folder of compiled programs that all runs of a test session share."""
  base = tmp_path_factory.getbasetemp()
  folder = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / 'compile_cache'
  folder.mkdir(exist_ok=True)
  return folder
