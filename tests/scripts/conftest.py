"""Scripts as modules, with what lies beside them, and runs of them on one device."""

import importlib.util
import pathlib
import sys

import jax
import pytest

from ptjax import process
from ptjax import sharding

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / 'scripts'
sys.path.insert(0, str(SCRIPTS))


@pytest.fixture(scope='session')
def load_script():
  """Returns `load(name)`: the script of that name as a module of its own."""
  def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
  return load


@pytest.fixture
def one_device(monkeypatch):
  """Models on one device; the user's cache of programs is left alone."""
  make_mesh = sharding.make_mesh
  monkeypatch.setattr(sharding, 'make_mesh', lambda text='': make_mesh(text, jax.devices()[:1]))
  monkeypatch.setattr(process, 'use_compile_cache', lambda folder: None)
