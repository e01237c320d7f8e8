"""`python -m ptjax.inspect --algo=grpo --algo=dapo`: prints what losses do to tokens, and saves it.

For each algorithm `<out>/<name>.txt`, `.json` (the numbers) and `.png`; for several, also how far
their gradients point the same way.
"""

import argparse
import itertools
import json
import pathlib
import re
import sys

import jax

from ptjax import algorithms
from ptjax import config
from ptjax.inspect import example
from ptjax.inspect import picture
from ptjax.inspect import samples
from ptjax.inspect import weights


def _arguments(argv):
  parser = argparse.ArgumentParser(
      prog='python -m ptjax.inspect', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--algo', action='append', required=True, metavar='NAME', help=(
      'a name of the table, with modifiers as in grpo+tis, or file.py:function; repeatable'))
  parser.add_argument('--samples', metavar='FILE', help=(
      "a run's samples.jsonl, or its folder, in place of the built-in batch"))
  parser.add_argument('--step', type=int, help='the step of --samples; the last one by default')
  parser.add_argument('--set', action='append', default=[], metavar='NAME=VALUE', help=(
      'a hyperparameter, e.g. loss.clip_high=0.28, for the algorithms that have it; repeatable'))
  parser.add_argument('--out', default='runs/inspect', metavar='DIR', help=(
      'where the files go (default: %(default)s)'))
  return parser.parse_args(argv)


def _hyperparameters(assignments, rows):
  """{row's name: its hyperparameters} of `loss.name=value` texts."""
  given = {row.name: {} for row in rows}
  for assignment in assignments:
    name, equals, text = assignment.removeprefix('loss.').partition('=')
    if not equals:
      raise config.UserError(f'--set={assignment}: expected NAME=VALUE')
    takers = [row for row in rows if name in row.hyperparameters()]
    if not takers:
      raise config.UserError(
          f'--set={assignment}: no hyperparameter of {", ".join(given)}' + config.near_names(
              name, [known for row in rows for known in row.hyperparameters()]))
    try:
      value = json.loads(text)
    except ValueError:
      value = text
    for row in takers:
      given[row.name][name] = value
  return given


def _save(inspection, table, folder):
  """Writes text, numbers and picture of one inspection; returns the paths."""
  folder.mkdir(parents=True, exist_ok=True)
  stem = folder / re.sub(r'[^\w.+-]+', '_', inspection.name)
  paths = [pathlib.Path(f'{stem}{suffix}') for suffix in ('.txt', '.json', '.png')]
  paths[0].write_text(table + '\n', encoding='utf-8')
  numbers = {
      'name': inspection.name, 'split': inspection.split, 'summary': inspection.summary,
      'not_a_policy_gradient': inspection.others, 'rows': inspection.sides,
      'loss_mask': inspection.loss_mask.tolist(), 'weights': inspection.weights.tolist(),
      'parts': {name: {piece: getattr(part, piece).tolist() for piece in (
          'stable', 'ratio', 'advantages', 'reduction')}
                for name, part in inspection.parts.items()}}
  paths[1].write_text(json.dumps(numbers) + '\n', encoding='utf-8')
  picture.plot(inspection, paths[2])
  return paths


def run(argv):
  """Prints and saves; raises UserError for what a user can set wrong."""
  arguments = _arguments(argv)
  rows = [algorithms.get(name) for name in dict.fromkeys(arguments.algo)]
  hyperparameters = _hyperparameters(arguments.set, rows)
  pull_back, batch = example.pull_back, None
  if arguments.samples is not None:
    batch, tokens, title = samples.load(arguments.samples, arguments.step)
    pull_back = None  # the samples hold no model to pull anything back to
  else:
    tokens = example.tokens()
    title = f'the built-in batch: {example.B} completions of {example.P} prompts'
  print(title)
  found = {}
  for row in rows:
    arrays = example.batch(row.loss) if batch is None else batch
    inspection = weights.inspect_loss(
        row, arrays, tokens=tokens, pull_back=pull_back, **hyperparameters[row.name])
    table = inspection.table()
    paths = _save(inspection, table, pathlib.Path(arguments.out))
    print(f'\n{table}\n  saved: {", ".join(map(str, paths))}')
    found[row.name] = inspection
  for first, second in itertools.combinations(found, 2):
    gradients = found[first].gradients, found[second].gradients
    if pull_back is not None:
      vectors = [pull_back(g) for g in gradients]
    elif set(gradients[0]) == set(gradients[1]) == {'log_probs'}:
      vectors = [g['log_probs'] for g in gradients]
    else:
      continue
    print(f'\ncosine of the gradients of {first} and {second}: {weights.cosine(*vectors):.5f}')


def main(argv=None):
  """Returns the exit code."""
  try:
    with jax.enable_x64(True):
      run(argv)
    return 0
  except ValueError as error:
    print(f'ptjax: {error}', file=sys.stderr)
    return 2


if __name__ == '__main__':
  sys.exit(main())
