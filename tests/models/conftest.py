"""A tiny model's directory, for the tests of loading and exporting."""

import pathlib
import shutil
import sys

import pytest

from ptjax.data import tokenizer as data_tokenizer
from ptjax.models import hub

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import hub_models


@pytest.fixture(scope='session')
def characters():
  return data_tokenizer.characters('abcdef')


@pytest.fixture(scope='session')
def exported(tmp_path_factory, characters):
  """A random llama's directory; copy it before changing anything."""
  directory = tmp_path_factory.mktemp('hub') / 'model'
  hub.export(directory, hub_models.CONFIG, hub_models.random_params(hub_models.CONFIG), characters)
  return directory


@pytest.fixture
def model(exported, tmp_path):
  """A copy of it to spoil."""
  return shutil.copytree(exported, tmp_path / 'model')
