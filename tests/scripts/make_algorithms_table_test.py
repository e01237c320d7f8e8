"""ALGORITHMS.md says what algorithms.py says."""

import importlib.util
import pathlib

from ptjax import algorithms

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'make_algorithms_table.py'


def load():
  spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_table_is_up_to_date():
  script = load()
  assert script.TABLE.read_text(encoding='utf-8') == script.render(), (
      'run `python scripts/make_algorithms_table.py`')
  assert script.PICTURE.is_file()


def test_every_row_has_its_line():
  lines = load().render().splitlines()
  for name, row in algorithms.TABLE.items():
    line, = (line for line in lines if line.startswith(f'| `{name}` | `'))
    assert line.count('|') == 9 and row.loss.__name__ in line
    for hyperparameter, value in row.hyperparameters().items():
      assert f'{hyperparameter} {value}' in line
