#!/usr/bin/env python
"""Mutation test of the loss library: are its tests sharp enough to see a planted fault?

Faults are put one at a time into `ptjax/pieces` and `ptjax/losses`, in copies of the tree: a flipped
sign, a dropped stop_gradient, another reduction, a forgotten mask, another ddof, a shift by one,
swapped bounds or sides, a dropped factor, a sum for a mean, `<` for `>`, another default. Each runs
against the fast tests of its family until one fails.

  python scripts/mutate_losses.py --sample=160 --seed=0
  python scripts/mutate_losses.py --file=ptjax/pieces/link.py

Prints caught and survived by kind, and every survivor. Survivors listed in EQUIVALENT change nothing
that a test could see; they are printed with the reason and count neither way.
"""

import argparse
import ast
import collections
import concurrent.futures
import copy
import dataclasses
import os
import pathlib
import queue
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROOMS = ('ptjax/pieces', 'ptjax/losses')
CPU_SECONDS = 600  # of one mutant's tests, which take a tenth

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

# (file, the source line it begins on, `before`, why no test can see it).
EQUIVALENT = (
    ('reward_model.py', "return mean(losses), {'accuracy': jax.lax.stop_gradient(mean(right))}",
     'jax.lax.stop_gradient(mean(right))', 'a comparison has no gradient'),
    ('likelihood.py', 'probe = record.add(name, jax.lax.stop_gradient(pieces))',
     'jax.lax.stop_gradient(pieces)', 'an auxiliary output, which nothing differentiates'),
    ('reward_model.py', 'margins = bounds.per_row(chosen.shape, chosen.dtype, margins=margins)',
     'chosen', 'both sides have been checked to have one shape and dtype'),
)


@dataclasses.dataclass(frozen=True)
class Mutant:
  """One fault: the bytes [start, end) of a file replaced."""
  path: str  # from the root
  line: int
  function: str
  kind: str
  before: str
  after: str
  start: int
  end: int
  text: str  # the source line it begins on

  def __str__(self):
    return f'{self.path}:{self.line} {self.kind}: {self.before} -> {self.after}'

  @property
  def equivalent(self):
    for path, text, before, reason in EQUIVALENT:
      if self.path.endswith(path) and (self.text, self.before) == (text, before):
        return reason
    return ''


# Faults: each yields `(kind, replacement)` for an expression node.

_SWAPS = {'token_mean': 'sequence_mean', 'sequence_mean': 'token_mean',
          'sequence_sum': 'sequence_mean', 'sum': 'mean', 'mean': 'sum', 'minimum': 'maximum',
          'maximum': 'minimum', 'min': 'max', 'max': 'min', 'argmin': 'argmax', 'argmax': 'argmin'}
_REDUCTIONS = ('token_mean', 'sequence_mean', 'sequence_sum')
_OPPOSITE = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
             ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE, ast.Eq: ast.NotEq,
             ast.NotEq: ast.Eq}
_SIDES = re.compile(r'^(chosen|rejected)(?=_|$)')


def _changed(node, **fields):
  node = copy.copy(node)
  for name, value in fields.items():
    setattr(node, name, value)
  return node


def _other_side(name):
  return _SIDES.sub(lambda m: 'rejected' if m[1] == 'chosen' else 'chosen', name)


def _is_number(node):
  return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _of_operators(node):
  if isinstance(node, ast.BinOp):
    if any(isinstance(x, (ast.Tuple, ast.List, ast.JoinedStr)) or (
        isinstance(x, ast.Constant) and not _is_number(x)) for x in (node.left, node.right)):
      return
    if type(node.op) in _OPPOSITE:
      kind = 'flip a sign' if isinstance(node.op, (ast.Add, ast.Sub)) else 'change the mask'
      yield kind, _changed(node, op=_OPPOSITE[type(node.op)]())
    elif isinstance(node.op, ast.Mult):
      yield 'drop a factor', node.left
      yield 'drop a factor', node.right
    elif isinstance(node.op, (ast.Div, ast.Pow)):
      yield 'drop a factor', node.left
  elif isinstance(node, ast.UnaryOp):
    if isinstance(node.op, ast.USub):
      yield 'flip a sign', node.operand
    elif isinstance(node.op, ast.Invert):
      yield 'change the mask', node.operand
  elif isinstance(node, ast.Compare) and type(node.ops[0]) in _OPPOSITE:
    yield '< to >', _changed(node, ops=[_OPPOSITE[type(node.ops[0])](), *node.ops[1:]])


def _of_calls(node):
  if not isinstance(node, ast.Call):
    return
  name = node.func.attr if isinstance(node.func, ast.Attribute) else ''
  if name == 'stop_gradient':
    yield 'drop a stop_gradient', node.args[0]
  if name == 'where' and len(node.args) == 3:
    _, first, second = node.args
    yield 'forget the mask', second if isinstance(first, ast.Constant) else first
  if name in ('sort', 'relu', 'abs'):
    yield f'drop {name}', node.args[0]
  if name == 'clip':
    x, low, high = node.args
    yield 'swap bounds', _changed(node, args=[x, high, low])
  if name == 'cumsum':
    yield 'shift by one', _rolled(node)
  keywords = {k.arg: k for k in node.keywords}
  for low, high in (('clip_low', 'clip_high'), ('low', 'high')):
    if low in keywords and high in keywords:
      other = {low: keywords[high].value, high: keywords[low].value}
      yield 'swap bounds', _changed(node, keywords=[
          _changed(k, value=other.get(k.arg, k.value)) for k in node.keywords])
  for keyword in node.keywords:
    rest = [k for k in node.keywords if k is not keyword]
    if keyword.arg == 'where':
      yield 'forget the mask', _changed(node, keywords=rest)
    if keyword.arg == 'ddof':
      yield 'change ddof', _changed(node, keywords=rest)
    if name == 'clean':
      shifted = _changed(keyword, value=_rolled(keyword.value))
      yield 'shift by one', _changed(node, keywords=[
          shifted if k is keyword else k for k in node.keywords])


def _rolled(node):
  return ast.parse(f"__import__('jax').numpy.roll({ast.unparse(node)}, 1, -1)", mode='eval').body


def _of_names(node):
  if isinstance(node, ast.Attribute) and node.attr in _SWAPS:
    kind = ('swap a reduction' if node.attr in _REDUCTIONS else
            'sum for mean' if node.attr in ('sum', 'mean') else 'min for max')
    yield kind, _changed(node, attr=_SWAPS[node.attr])
  for field in ('attr', 'id'):
    name = getattr(node, field, '')
    if _SIDES.match(name):
      yield 'swap the sides', _changed(node, **{field: _other_side(name)})


def _of_numbers(node):
  if isinstance(node, ast.Constant) and type(node.value) is int:
    yield 'shift by one', ast.Constant(node.value + 1)


_SKIPPED_KEYWORDS = ('axis', 'keepdims', 'name', 'custom_message', 'exception_type', 'dtype')


def _expressions(node, function=''):
  """Yields (expression, outermost function's name) of all that computes, parents first."""
  if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)):
    return
  if isinstance(node, ast.keyword) and node.arg in _SKIPPED_KEYWORDS:
    return
  if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
    return  # a docstring
  if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and (
      node.value.attr == 'shape'):
    return
  if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
    function = function or node.name
  if isinstance(node, ast.expr) and not isinstance(getattr(node, 'ctx', None), ast.Store):
    yield node, function
  for child in ast.iter_child_nodes(node):
    yield from _expressions(child, function)


def _defaults(tree):
  """Yields (default, function name) of all numeric defaults."""
  for function in ast.walk(tree):
    if isinstance(function, ast.FunctionDef):
      for node in (*function.args.defaults, *function.args.kw_defaults):
        if _is_number(node):
          yield node, function.name


def mutants_of(root, path):
  """Every fault that can be put into one file, a list of Mutant."""
  source = (root / path).read_bytes()
  tree = ast.parse(source)
  starts = [0]
  lines = source.splitlines(keepends=True)
  for line in lines:
    starts.append(starts[-1] + len(line))
  found = []
  def add(node, function, kind, replacement):
    before, after = ast.unparse(node), ast.unparse(replacement)
    found.append(Mutant(
        path=path, line=node.lineno, function=function, kind=kind, before=before, after=after,
        start=starts[node.lineno - 1] + node.col_offset,
        end=starts[node.end_lineno - 1] + node.end_col_offset,
        text=lines[node.lineno - 1].decode().strip()))
  defaults = {id(node): (node, function) for node, function in _defaults(tree)}
  for node, function in defaults.values():
    add(node, function, 'change a default', ast.Constant(2 * node.value or 1.0))
  for node, function in _expressions(tree):
    if id(node) not in defaults:
      for faults in (_of_operators, _of_calls, _of_names, _of_numbers):
        for kind, replacement in faults(node):
          add(node, function, kind, replacement)
  return found


# Running.

# A plugin: cases of losses that cannot reach the fault are left out, those named after it go first.
_PLUGIN = '''
import os
def pytest_collection_modifyitems(items):
  affected = set(filter(None, os.environ['AFFECTED'].split(',')))
  stems = [name.strip('_').removesuffix('_loss') for name in affected]
  def reached(item):
    case = item.callspec.params.get('case') if hasattr(item, 'callspec') else None
    return getattr(getattr(case, 'loss', None), '__name__', None) in {None, *affected}
  if affected:
    items[:] = filter(reached, items)
  items.sort(key=lambda item: not any(stem in item.nodeid for stem in stems))
'''


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
  tests = dict.fromkeys((f'{room}/{module}_test.py', *FAMILIES.get(module, ())))
  return [f'tests/{test}' for test in tests if (root / 'tests' / test).is_file()]


def copy_tree(root, target):
  for name in ('ptjax', 'tests'):
    shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns('__pycache__'))
  for name in ('setup.cfg', 'pyproject.toml'):
    if (root / name).is_file():
      shutil.copy(root / name, target / name)
  (target / 'mutation_order.py').write_text(_PLUGIN)
  return target


def run_tests(tree, tests, affected=(), cache=None):
  """Runs tests in a copy until the first failure.

  Returns:
    'passed', 'failed' or 'endless' (over CPU_SECONDS; not by the clock, as the machine may be
    busy), and the last lines.
  """
  environment = {
      **os.environ, 'PYTHONPATH': str(tree), 'AFFECTED': ','.join(sorted(affected)), 'JAX_PLATFORMS': 'cpu',
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
  if cache:  # most losses do not hold the fault, and need no new compilation
    environment['JAX_COMPILATION_CACHE_DIR'] = str(cache)
  command = [sys.executable, '-m', 'pytest', '-x', '-q', '--tb=line', '-p', 'no:cacheprovider',
             '-p', 'no:hypothesispytest', '-p', 'mutation_order', *tests]
  limit = lambda: resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, 2 * CPU_SECONDS))
  done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True,
                        preexec_fn=limit)
  if done.returncode == -signal.SIGXCPU:
    return 'endless', ''
  if done.returncode in (0, 1, 2, 5):  # passed, a failure, an error while importing, no tests
    return ('passed' if done.returncode in (0, 5) else 'failed'), done.stdout[-2000:]
  raise RuntimeError(f'pytest ended with {done.returncode}: {done.stdout}{done.stderr}')


def outcome(mutant, tree, tests, cache):
  """What `run_tests` says with the fault in the copy `tree`, which is left as it was."""
  target = tree / mutant.path
  original = target.read_bytes()
  for stale in target.parent.glob(f'__pycache__/{target.stem}.*.pyc'):
    stale.unlink()  # bytecode is dated to the second, and a mutant may take less
  affected = affected_by(tree, mutant.function)
  try:
    target.write_bytes(b''.join(
        (original[:mutant.start], b'(', mutant.after.encode(), b')', original[mutant.end:])))
    return run_tests(tree, tests, affected, cache)[0]
  finally:
    target.write_bytes(original)
    for stale in target.parent.glob(f'__pycache__/{target.stem}.*.pyc'):
      stale.unlink()


def examine(root, mutants, *, parallel, cache, log=print):
  """Runs all mutants; returns the survivors."""
  trees = queue.SimpleQueue()
  with tempfile.TemporaryDirectory(prefix='mutants') as work:
    copies = [copy_tree(root, pathlib.Path(work, str(i))) for i in range(parallel)]
    every_test = list(dict.fromkeys(t for m in mutants for t in tests_of(root, m.path)))
    status, output = run_tests(copies[0], every_test, cache=cache)
    if status != 'passed':
      raise SystemExit(f'the tests fail without any fault:\n{output}')
    for tree in copies:
      trees.put(tree)
    done = 0
    def one(mutant):
      nonlocal done
      tree = trees.get()
      try:
        status = outcome(mutant, tree, tests_of(root, mutant.path), cache)
      finally:
        trees.put(tree)
      done += 1
      word = {'passed': 'SURVIVED', 'failed': 'caught'}.get(status, status)
      log(f'{done}/{len(mutants)} {word} {mutant}', flush=True)
      return status == 'passed'
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
      return [m for m, survived in zip(mutants, pool.map(one, mutants)) if survived]


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
  parser.add_argument('--parallel', type=int, default=2)
  parser.add_argument('--at_least', type=float, default=0.95, help='fraction caught, else exit 1')
  parser.add_argument('--root', type=pathlib.Path, default=ROOT)
  parser.add_argument('--cache', help='folder of compiled programs to keep between runs')
  parser.add_argument('--list', action='store_true', help='print the mutants and stop')
  options = parser.parse_args(arguments)
  files = options.file or sorted(
      str(path.relative_to(options.root)) for room in ROOMS
      for path in (options.root / room).glob('*.py') if path.name != '__init__.py')
  mutants = [m for path in files for m in mutants_of(options.root, path)
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
