"""Pictures are written for every kind of loss."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from ptjax import config
from ptjax import inspect
from ptjax.inspect import example


@pytest.mark.parametrize('name, kind', [
    ('grpo', 'png'), ('dpo', 'svg'), ('kto', 'png'), ('gkd', 'png'), ('reward_bt', 'png')])
def test_plot(name, kind, tmp_path, taken_apart):
  path = tmp_path / 'deep' / f'{name}.{kind}'
  with jax.enable_x64(True):
    inspect.plot(taken_apart(name), path)
  start = path.read_bytes()[:100]
  assert start.startswith(b'\x89PNG' if kind == 'png' else b'<?xml')


def test_weights_that_are_all_zero(tmp_path):
  arrays = {**example.batch(), 'rewards': np.zeros(example.B)}
  inspect.plot(inspect.inspect_loss('grpo', arrays), tmp_path / 'tied.png')
  assert (tmp_path / 'tied.png').stat().st_size > 1000


def test_unknown_format(tmp_path, taken_apart):
  with pytest.raises(config.UserError, match='grpo.jpeg: expected a name that ends in .png'):
    inspect.plot(taken_apart('grpo'), tmp_path / 'grpo.jpeg')


def test_matplotlib_loads_with_the_first_picture_only():
  code = 'import sys; from ptjax import inspect; print("matplotlib" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                        check=True).stdout.strip() == 'False'
