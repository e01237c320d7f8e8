#!/usr/bin/env python
"""Mutation test of the loss library: are its tests sharp enough to see a planted fault?

Faults go one at a time into `ptjax/pieces` and `ptjax/losses`, in copies of the tree: a flipped
sign, a dropped stop_gradient, another reduction, a forgotten mask, another ddof, a shift by one,
swapped bounds or sides, a dropped factor, a sum for a mean, `<` for `>`, another default. Each runs
against the fast tests of its family until one fails.

  python scripts/mutate_losses.py --sample=160 --seed=0
  python scripts/mutate_losses.py --file=ptjax/pieces/link.py

Prints caught and survived by kind, and every survivor. Those listed in `faults.EQUIVALENT` change
nothing that a test could see; they are printed with the reason and count neither way. A mutant is a
fork of a process that has imported JAX, so that one takes a second or two.
"""

import argparse
import ast
import collections
import importlib
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback

import faults

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROOMS = ('ptjax/pieces', 'ptjax/losses')
CPU_SECONDS = 600  # of one mutant's tests, which take a tenth
PRELOADED = ('jax', 'jax.numpy', 'chex', 'numpy', 'pytest', '_pytest.assertion.rewrite')

_EVERY_ROW = 'losses/every_row_test.py'
_PREFERENCES = ('losses/preference_test.py', 'losses/preference_identities_test.py',
                'losses/unpaired_test.py', 'losses/online_preference_test.py',
                'losses/defaults_test.py')
_POLICY = ('losses/policy_gradient_test.py', 'losses/imitation_test.py', 'losses/hybrid_test.py',
           'losses/distillation_test.py', 'losses/modifiers_test.py',
           'losses/defaults_test.py')
# module -> the tests of its family, run after its own.
FAMILIES = {
    **dict.fromkeys(('link', 'score', 'running', 'preference_link', 'preference_score',
                     'preference_gap', 'preference_anchor', 'unpaired', 'online_preference'),
                    _PREFERENCES + ('losses/reward_model_test.py', 'losses/modifiers_test.py')),
    **dict.fromkeys(('advantage', 'returns', 'denominator', 'divergence', 'likelihood',
                     'stabilization', 'terms', 'policy_gradient', 'policy_gradient_sequence',
                     'imitation', 'distillation', 'hybrid', 'modifiers'), _POLICY),
    **dict.fromkeys(('masking', 'reduction', 'bounds'), _PREFERENCES + _POLICY),
    'reward_model': ('losses/defaults_test.py',)}


class _Selection:
  """A pytest plugin: leaves out what is slow, and cases of losses that cannot reach the fault.

  Tests named after what it can reach go first, and among cases the closed form does. Of the tests
  of every row all run that reach it, also the slow ones.
  """

  def __init__(self, affected):
    self.affected = set(affected)
    self.stems = [name.strip('_').removesuffix('_loss') for name in affected]

  def pytest_collection_modifyitems(self, items):
    items[:] = [item for item in items if self._reached(item)]
    items.sort(key=lambda item: (not any(stem in item.nodeid for stem in self.stems),
                                 'closed_form' not in item.name))

  def _reached(self, item):
    arguments = item.callspec.params if hasattr(item, 'callspec') else {}
    if _EVERY_ROW in item.nodeid and 'name' in arguments:
      row = sys.modules['ptjax.algorithms'].get(arguments['name'])
      functions = {getattr(f, '__name__', '') for f in (row.loss, row.advantage, row.divergence)}
      return not self.affected or bool({*functions, *row.name.split('+')} & self.affected)
    if item.get_closest_marker('slow'):
      return False
    case = arguments.get('case')
    names = {getattr(getattr(case, part, None), '__name__', None)
             for part in ('loss', 'divergence')}
    return not self.affected or names == {None} or bool(names & self.affected)


def affected_by(root, function):
  """Names of the functions that may reach `function`: whoever mentions one that does."""
  mentions = {}
  for room in ROOMS:
    for path in (root / room).glob('*.py'):
      for node in ast.parse(path.read_text()).body:
        names = {getattr(x, 'attr', None) or getattr(x, 'id', None) for x in ast.walk(node)}
        target = getattr(node, 'name', '')
        if isinstance(node, ast.Assign):
          target = getattr(node.targets[0], 'id', '')
        mentions.setdefault(target, set()).update(names)
  found, grown = {function}, True
  while grown:
    grown = {name for name, names in mentions.items() if names & found} - found
    found |= grown
  return found if function else set()


def tests_of(root, path):
  """The tests to run for a file: its own first, then its family's."""
  room, module = pathlib.PurePath(path).parts[-2:]
  module = module.removesuffix('.py')
  tests = dict.fromkeys((f'{room}/{module}_test.py', *FAMILIES.get(module, ()), _EVERY_ROW))
  return [f'tests/{test}' for test in tests if (root / 'tests' / test).is_file()]


def copy_tree(root, target):
  for name in ('ptjax', 'tests'):
    shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns('__pycache__'))
  for name in ('setup.cfg', 'pyproject.toml'):
    if (root / name).is_file():
      shutil.copy(root / name, target / name)
  return target


def preload(cache):
  """Imports, once for all mutants, what every test needs and no fault is put into."""
  os.environ.update(JAX_PLATFORMS='cpu', OPENBLAS_NUM_THREADS='1')
  for name in PRELOADED:
    importlib.import_module(name)
  jax = sys.modules['jax']  # of which nothing may run before the fork
  # Most losses do not hold the fault, and need no new compilation.
  jax.config.update('jax_compilation_cache_dir', str(cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def start_tests(tree, tests, affected=()):
  """Starts tests in a copy of the tree, until the first failure, in a fork; returns its pid.

  The output is in `output.txt` of the copy.
  """
  sys.stdout.flush()
  if pid := os.fork():
    return pid
  code = 70
  try:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, 2 * CPU_SECONDS))
    os.chdir(tree)
    output = os.open('output.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
      os.dup2(output, stream)
    os.environ['PYTHONPATH'] = str(tree)
    sys.path.insert(0, str(tree))
    code = int(sys.modules['pytest'].main(
        ['-x', '-q', '-m', '', '--tb=line', '-p', 'no:cacheprovider',
         '-p', 'no:hypothesispytest', *tests],
        plugins=[_Selection(affected)]))
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    os._exit(code)


def outcome_of(tree, status):
  """'passed', 'failed' or 'endless' (over CPU_SECONDS; by the clock a busy machine would be)."""
  if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
    return 'endless'
  code = os.waitstatus_to_exitcode(status)
  if code in (0, 5):  # passed, no tests
    return 'passed'
  if code in (1, 2):  # a failure, an error while importing
    return 'failed'
  raise RuntimeError(f'the tests ended with {code}: {(tree / "output.txt").read_text()[-2000:]}')


def plant(mutant, tree):
  """Puts the fault into the copy, and returns a function that takes it out again."""
  target = tree / mutant.path
  original = target.read_bytes()
  def write(content):
    target.write_bytes(content)
    for stale in target.parent.glob(f'__pycache__/{target.stem}.*.pyc'):
      stale.unlink()  # bytecode is dated to the second, and a mutant may take less
  write(b''.join(
      (original[:mutant.start], b'(', mutant.after.encode(), b')', original[mutant.end:])))
  return lambda: write(original)


def examine(root, mutants, *, parallel, cache, log=print):
  """Runs all mutants, `parallel` at a time; returns the survivors."""
  preload(cache)
  with tempfile.TemporaryDirectory(prefix='mutants') as work:
    free = [copy_tree(root, pathlib.Path(work, str(i))) for i in range(parallel)]
    every_test = list(dict.fromkeys(t for m in mutants for t in tests_of(root, m.path)))
    _, status = os.waitpid(start_tests(free[0], every_test), 0)
    if outcome_of(free[0], status) != 'passed':
      raise SystemExit(
          f'the tests fail without any fault:\n{(free[0] / "output.txt").read_text()[-2000:]}')
    waiting, running, found = list(reversed(mutants)), {}, {}
    while waiting or running:
      while waiting and free:
        mutant, tree = waiting.pop(), free.pop()
        remove = plant(mutant, tree)
        pid = start_tests(tree, tests_of(root, mutant.path), affected_by(root, mutant.function))
        running[pid] = mutant, tree, remove
      pid, status, used = os.wait3(0)
      mutant, tree, remove = running.pop(pid)
      remove()
      free.append(tree)
      found[mutant] = outcome_of(tree, status)
      word = {'passed': 'SURVIVED', 'failed': 'caught'}.get(found[mutant], found[mutant])
      log(f'{len(found)}/{len(mutants)} {word} {mutant} '
          f'({used.ru_utime + used.ru_stime:.1f} CPU s)', flush=True)
  return [m for m in mutants if found[m] == 'passed']


def report(mutants, survivors):
  """The table as text, and the fraction caught of those that are not equivalent."""
  rows = collections.Counter(m.kind for m in mutants)
  alive = collections.Counter(m.kind for m in survivors if not m.equivalent)
  equal = collections.Counter(m.kind for m in survivors if m.equivalent)
  lines = [f'{"fault":24}{"mutants":>8}{"caught":>8}{"survived":>10}{"equivalent":>12}']
  for kind in sorted(rows):
    lines.append(f'{kind:24}{rows[kind]:8}{rows[kind] - alive[kind] - equal[kind]:8}'
                 f'{alive[kind]:10}{equal[kind]:12}')
  total, kept = len(mutants) - equal.total(), alive.total()
  fraction = (total - kept) / max(total, 1)
  lines.append(f'caught {total - kept} of {total} ({fraction:.1%}), and {equal.total()} equivalent')
  for mutant in survivors:
    lines.append(f'  {"equivalent" if mutant.equivalent else "SURVIVED"} {mutant}'
                 + (f'  ({mutant.equivalent})' if mutant.equivalent else ''))
  return '\n'.join(lines), fraction


def main(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--sample', type=int, help='how many mutants to draw; default all')
  parser.add_argument('--seed', type=int, default=0, help='of the draw')
  parser.add_argument('--file', action='append', help='only this file, from the root; repeatable')
  parser.add_argument('--match', default='', help='only mutants whose printed line holds this')
  parser.add_argument('--parallel', type=int, default=1, help='how many at a time')
  parser.add_argument('--at_least', type=float, default=0.95, help='fraction caught, else exit 1')
  parser.add_argument('--root', type=pathlib.Path, default=ROOT)
  parser.add_argument('--cache', help='folder of compiled programs to keep between runs')
  parser.add_argument('--list', action='store_true', help='print the mutants and stop')
  options = parser.parse_args(arguments)
  files = options.file or sorted(
      str(path.relative_to(options.root)) for room in ROOMS
      for path in (options.root / room).glob('*.py') if path.name != '__init__.py')
  mutants = [m for path in files for m in faults.mutants_of(options.root, path)
             if options.match in str(m)]
  if options.sample and options.sample < len(mutants):
    mutants = random.Random(options.seed).sample(mutants, options.sample)
  if options.list:
    print(*mutants, sep='\n')
    return 0
  started = time.time()
  with tempfile.TemporaryDirectory(prefix='compiled') as cache:
    survivors = examine(options.root, mutants, parallel=options.parallel,
                        cache=options.cache or cache)
  text, fraction = report(mutants, survivors)
  print(f'\n{text}\n{time.time() - started:.0f} s')
  return int(fraction < options.at_least)


if __name__ == '__main__':
  sys.exit(main())
