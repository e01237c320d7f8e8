"""A user's own file loads, or says in one line why not."""

import pytest

from ptjax import config
from ptjax.rewards import user


def test_loads_a_function_and_its_neighbours(tmp_path, monkeypatch):
  monkeypatch.setattr('sys.path', list(__import__('sys').path))
  (tmp_path / 'neighbour_of_reward.py').write_text('VALUE = 0.5')
  file = tmp_path / 'mine.py'
  file.write_text('import dataclasses\nimport neighbour_of_reward\n'
                  '@dataclasses.dataclass\nclass Point:\n  x: "int" = 0\n'
                  'def half(prompts, completions, **columns):\n'
                  '  return [neighbour_of_reward.VALUE for _ in completions]\n')
  assert user.load_function(str(file), 'half')(None, ['a', 'b']) == [0.5, 0.5]


def test_files_of_the_same_name_stay_apart(tmp_path):
  for folder, value in (('a', 1), ('b', 2)):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / 'same.py').write_text(f'def f(completions): return {value}')
  first = user.load_function(tmp_path / 'a' / 'same.py', 'f')
  second = user.load_function(tmp_path / 'b' / 'same.py', 'f')
  assert (first([]), second([])) == (1, 2)


@pytest.mark.parametrize('source, name, message', [
    (None, 'f', 'no such file: .*mine.py'),
    ('def accuracy(): pass\ndef other(): pass', 'acuracy', "no 'acuracy'; did you mean accuracy?"),
    ('def one(): pass\ndef two(): pass\nfrom math import sin', 'zzz', 'known: one, two$'),
    ('x = 3', 'f', "no 'f'; the file defines no function"),
    ('f = 3', 'f', "'f' is of type int, expected a function"),
    ('class f: pass', 'f', "'f' is a class, expected a function"),
    ('def f(:', 'f', 'importing the file failed: SyntaxError'),
    ('import no_such_module_at_all', 'f', 'failed: ModuleNotFoundError: No module named'),
    ('raise SystemExit(3)', 'f', 'failed: SystemExit: 3'),
])
def test_bad_files(tmp_path, source, name, message):
  file = tmp_path / 'mine.py'
  if source is not None:
    file.write_text(source)
  with pytest.raises(config.UserError, match=message) as caught:
    user.load_function(str(file), name)
  assert f'reward {file}:{name}: ' in str(caught.value)


def test_a_folder_and_a_file_that_is_not_python(tmp_path):
  with pytest.raises(config.UserError, match='is a folder'):
    user.load_function(tmp_path, 'f')
  (tmp_path / 'notes.txt').write_text('hello')
  with pytest.raises(config.UserError, match='not a Python file'):
    user.load_function(tmp_path / 'notes.txt', 'f')
