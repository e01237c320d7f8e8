"""The mutation script on a planted module of which the tests see one half."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'mutate_losses.py'
sys.path.insert(0, str(SCRIPT.parent))
import faults

PLANTED = '''
def margin(chosen_reward, base):
  """A docstring: 1 + 1."""
  if base is None:
    raise ValueError(f'base={base}: expected a number above {0 + 1}')
  return base - chosen_reward
'''
TEST = '''
from ptjax.pieces import planted

def test_margin():  # blind to the sign
  assert planted.margin(0.0, 3.0) == 3.0
'''


@pytest.fixture(scope='module')
def script():
  spec = importlib.util.spec_from_file_location('mutate_losses', SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def run(root, test):
  """The script's (exit code, output) on a planted module with this test of it."""
  for path, text in (('ptjax/__init__.py', ''), ('ptjax/pieces/__init__.py', ''),
                     ('ptjax/pieces/planted.py', PLANTED), ('tests/pieces/planted_test.py', test),
                     ('setup.cfg', '[tool:pytest]\naddopts = --import-mode=importlib\n')):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)
  done = subprocess.run(
      [sys.executable, SCRIPT, '--root', root, '--file', 'ptjax/pieces/planted.py'],
      capture_output=True, text=True)  # it forks, which a process that has run JAX must not
  return done.returncode, done.stdout + done.stderr


def test_faults_are_planted_and_survivors_named(script, tmp_path):
  code, text = run(tmp_path, TEST)
  found = faults.mutants_of(tmp_path, 'ptjax/pieces/planted.py')
  assert [(m.line, m.before, m.after) for m in found] == [
      (6, 'base - chosen_reward', 'base + chosen_reward'), (6, 'chosen_reward', 'rejected_reward')]
  assert code == 1, f'half is below the bar: {text}'
  assert 'caught 1 of 2 (50.0%)' in text
  assert 'SURVIVED ptjax/pieces/planted.py:6 flip a sign: base - chosen_reward' in text
  assert (tmp_path / 'ptjax/pieces/planted.py').read_text() == PLANTED, 'faults go into copies'
  assert script.report(found, [])[1] == 1.0


def test_failing_tests_stop_the_run(tmp_path):
  code, text = run(tmp_path, TEST.replace('== 3.0', '== 4.0'))
  assert code == 1 and 'the tests fail without any fault' in text and 'assert 3.0 == 4.0' in text


def test_every_module_of_losses_and_pieces_has_tests(script):
  for room in script.ROOMS:
    for path in (script.ROOT / room).glob('*.py'):
      if path.name != '__init__.py':
        assert path.stem in script.FAMILIES or script.tests_of(
            script.ROOT, str(path.relative_to(script.ROOT))), path


def test_every_kind_of_fault(tmp_path):
  source = '''
def f(x, mask, a=0.5):
  m = jnp.where(mask, x, 0.0).std(ddof=1) + jnp.sum(x, where=~mask)
  y = lax.stop_gradient(reduction.token_mean(x, mask)) * jnp.maximum(x, 2)
  return -masking.clean(mask, x=x) if x < y else clip(x, clip_low=a, clip_high=m).chosen
'''
  (tmp_path / 'one.py').write_text(source)
  found = {m.kind: f'{m.before} -> {m.after}' for m in faults.mutants_of(tmp_path, 'one.py')}
  assert set(found) == {
      'flip a sign', 'drop a stop_gradient', 'swap a reduction', 'forget the mask', 'change ddof',
      'shift by one', 'min for max', 'swap bounds', 'swap the sides', 'drop a factor',
      'sum for mean', '< to >', 'change the mask', 'change a default'}
  assert found['change ddof'].endswith('.std()') and found['change a default'] == '0.5 -> 1.0'
