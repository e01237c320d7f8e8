"""The house plan, held: imports run downhill and each outside package has its home."""

import ast
import io
import pathlib
import subprocess
import sys
import tokenize

ROOT = pathlib.Path(__file__).resolve().parents[1] / 'ptjax'
TESTS = ROOT.parent / 'tests'

# Room -> its floor; a module outside a room counts by its own name.
FLOORS = {
    'types': 1, 'config': 1, 'keys': 1, 'pieces': 1, 'process': 1, 'sharding': 1,
    'algorithm': 2, 'losses': 2, 'models': 2, 'data': 2, 'rewards': 2,
    'algorithms': 3, 'rollout': 3,
    'training': 4, 'evaluation': 4,
    'algorithm_table': 5, 'asking': 5, 'assembly': 5, 'doors': 5, 'experiment': 5, 'gpu': 5,
    'huge_pages': 5, 'inspect': 5, 'job': 5, 'launch': 5, 'learned': 5, 'overrides': 5, 'plan': 5,
    'reference': 5, 'remat': 5, 'stage_run': 5, 'stages': 5,
}
HOMES = {  # outside package -> where it may be imported
    'absl.flags': ('launch',),
    'datasets': ('data/sources',),
    'orbax': ('training/checkpoint',),
    'tensorboardX': ('training/metrics',),
    'math_verify': ('rewards/',),
    'matplotlib': ('inspect/picture',),
    'sacrebleu': ('evaluation/chrf',),
    'lm_eval': ('evaluation/harness',),
    'torch': (),
}


def imports(path):
  """Yields the dotted names a file imports, anywhere in it."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        yield f'{node.module}.{alias.name}'


def modules():
  return [(path.relative_to(ROOT).with_suffix('').as_posix(), path)
          for path in sorted(ROOT.rglob('*.py')) if path.name != '__init__.py']


def test_imports_run_downhill():
  wrong = []
  for name, path in modules():
    room = name.split('/')[0]
    assert room in FLOORS, f'{name} is in no room; add it to the house plan'
    for target in imports(path):
      parts = target.split('.')
      if parts[0] != 'ptjax' or len(parts) < 2:
        continue
      other = parts[1]
      if other not in FLOORS or other == room or other == '__version__':
        continue
      same_floor_free = FLOORS[room] in (1, 5)
      if FLOORS[other] > FLOORS[room] or (FLOORS[other] == FLOORS[room] and not same_floor_free):
        wrong.append(f'{name} imports {target}')
  assert not wrong, wrong


def test_outside_packages_have_one_home():
  wrong = []
  for name, path in modules():
    for target in imports(path):
      for package, homes in HOMES.items():
        if (target == package or target.startswith(package + '.')) and not any(
            name.startswith(home) for home in homes):
          wrong.append(f'{name} imports {target}')
  assert not wrong, wrong


def test_files_can_be_held_in_the_head():
  lines = {name: len(path.read_text().splitlines()) for name, path in modules()}
  lines |= {f'tests/{path.relative_to(TESTS)}': len(path.read_text().splitlines())
            for path in TESTS.rglob('*.py')}
  long = {name: count for name, count in lines.items() if count > 400}
  assert not long, long


def test_lines_fit_on_a_page():
  long = [f'{path.relative_to(ROOT.parent)}:{number}'
          for folder in ('ptjax', 'scripts', 'tests', 'experiments')
          for path in sorted((ROOT.parent / folder).rglob('*.py'))
          for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
  assert not long, long


def code_lines(path):
  """How many lines of a file hold code: neither blank, nor comments, nor docstrings."""
  text = path.read_text()
  silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
            tokenize.ENDMARKER}
  code = {line for token in tokenize.generate_tokens(io.StringIO(text).readline)
          if token.type not in silent for line in range(token.start[0], token.end[0] + 1)}
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
      code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
  return len(code)


def test_code_lines_are_counted_by_hand(tmp_path):
  path = tmp_path / 'a.py'
  path.write_text('"""Says\n\nwhat."""\n\n# why\ndef f(x,\n      y):\n  """Says."""\n'
                  '  return """a\n  b"""  # a text, no docstring\n')
  assert code_lines(path) == 4


def test_the_mathematics_of_preferences_stays_small():
  """Some forty methods: as many slots of a few lines, not as many programs."""
  files = [*(ROOT / 'losses').glob('preference_*.py'), ROOT / 'losses' / 'online_preference.py',
           ROOT / 'losses' / 'unpaired.py', ROOT / 'pieces' / 'score.py',
           ROOT / 'pieces' / 'link.py']
  counts = {path.name: code_lines(path) for path in files}
  assert len(counts) >= 8 and min(counts.values()) > 10
  assert sum(counts.values()) < 1000, counts


def test_losses_load_with_jax_and_chex_alone():
  code = ('import sys; from ptjax import algorithms, losses, pieces; '
          'heavy = {"flax", "optax", "orbax", "transformers", "datasets", "torch"}; '
          'print(sorted(heavy & set(sys.modules)))')
  found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                         cwd=ROOT.parent)
  assert found.stdout.strip() == '[]', found.stdout
