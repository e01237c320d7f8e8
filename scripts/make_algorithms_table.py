"""Writes ptjax/ALGORITHMS.md and ptjax/distinctness.png from ptjax/algorithms.py.

    python scripts/make_algorithms_table.py             # both, in about half a minute
    python scripts/make_algorithms_table.py --table     # the table alone
"""

import argparse
import json
import pathlib

from ptjax import algorithm_table
from ptjax import algorithms
from ptjax.inspect import distinctness
from ptjax.inspect import picture
from ptjax.losses import modifiers

FOLDER = pathlib.Path(__file__).resolve().parents[1] / 'ptjax'
TABLE, PICTURE = FOLDER / 'ALGORITHMS.md', FOLDER / 'distinctness.png'

_HEAD = '''# The algorithms

Made by `scripts/make_algorithms_table.py` from `algorithms.py`; a test fails when they differ.
`--algo=NAME` trains with one, `python -m ptjax.inspect --algo=NAME` shows what it does to tokens.
*Data* is where a batch comes from, *models* what must be loaded beside the policy, *fed by* what
makes the loss's advantages or its divergence, and the defaults are those of all three together.
Every loss is held against an independent closed form in float64; the last column names what else
it is held against.
'''
_COLUMNS = ('name', 'loss', 'data', 'models', 'fed by', 'defaults', 'source', 'also against')


def render():
  """Returns the text of ALGORITHMS.md."""
  rows = json.loads(algorithm_table.as_json())
  parts = [_HEAD]
  for family in dict.fromkeys(row['family'] for row in rows):
    lines = [_line(_COLUMNS), _line(['---'] * len(_COLUMNS))]
    lines += [_line(_cells(row)) for row in rows if row['family'] == family]
    parts.append('\n'.join([f'## {family[0].upper()}{family[1:]}', '', *lines, '']))
  parts.append('\n'.join([
      '## Modifiers', '', 'Any loss that takes advantages and a mask, as in `--algo=grpo+tis`.', '',
      _line(('name', 'what it does')), _line(('---', '---')),
      *(_line((f'`{name}`', f.__doc__.splitlines()[0]))
        for name, f in modifiers.MODIFIERS.items()),
      _line(('`reward_kl`', 'The KL to the reference comes off the reward (the row\'s own '
             'advantage then reads what is left).')),
      *(_line((f'`{name}`', f'Advantages instead of the row\'s own: {f.__doc__.splitlines()[0]}'))
        for name, f in algorithms.ADVANTAGES.items()), '']))
  parts.append('\n'.join([
      '## Which way they push', '',
      'The cosine between the gradients of every two algorithms, by the parameters of one small',
      'model on one batch of 24 completions (`ptjax.inspect.example`): demonstrations, rollouts',
      'and pairs are the same 24. Reward models train a head of their own. A test fails when two',
      'rows point the same way that are not listed here:', '',
      '![cosines between the gradients of all algorithms](distinctness.png)', '',
      _line(('the same direction', 'why')), _line(('---', '---')),
      *(_line((', '.join(f'`{name}`' for name in names), why))
        for names, why in distinctness.SAME), '']))
  return '\n'.join(parts)


def _cells(row):
  short = lambda *paths: ', '.join(f'`{path.split(".", 2)[2]}`' for path in paths if path)
  source = row['source']
  number, _, title = source.removeprefix('arXiv:').partition(', ')
  if source.startswith('arXiv:'):
    source = f'[{number}](https://arxiv.org/abs/{number}), {title}'
  data = f'{row["door"]}: {row["data"]}' if row['data'] else row['door']
  defaults = ', '.join(f'{name} {value}' for name, value in row['hyperparameters'].items())
  return (f'`{row["name"]}`', short(row['loss']), data, ', '.join(row['models']),
          short(row['advantage'], row['divergence']), defaults, source, row['tested_against'])


def _line(cells):
  return f'| {" | ".join(cell.replace("|", chr(92) + "|") for cell in cells)} |'


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--table', action='store_true', help='leave the picture as it is')
  arguments = parser.parse_args()
  TABLE.write_text(render(), encoding='utf-8')
  if not arguments.table:
    names, gradients = distinctness.directions()
    families = [algorithms.TABLE[name].family for name in names]
    picture.plot_matrix(names, families, distinctness.cosines(gradients), PICTURE)


if __name__ == '__main__':
  main()
