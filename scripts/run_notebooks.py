"""Runs notebooks and saves what their cells print and draw, with no Jupyter installed.

    python scripts/run_notebooks.py                                      # all of them, in place
    python scripts/run_notebooks.py experiments/notebooks/unified_table.ipynb
"""

import argparse
import base64
import contextlib
import io
import json
import pathlib

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

FOLDER = pathlib.Path(__file__).resolve().parents[1] / 'experiments' / 'notebooks'


def run(path):
  """Executes the code cells of a notebook in order; returns it with fresh outputs.

  A cell's outputs are what it prints and the figures it leaves open. An error ends the run, with
  the notebook and the number of the cell in its traceback.
  """
  notebook = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  names = {'__name__': '__main__'}
  count = 0
  for cell in notebook['cells']:
    if cell['cell_type'] != 'code':
      continue
    count += 1
    program = compile(''.join(cell['source']), f'{path}, cell {count}', 'exec')
    with contextlib.redirect_stdout(io.StringIO()) as printed:
      exec(program, names)  # a notebook of ours, run because the caller asked for it
    cell['execution_count'] = count
    cell['outputs'] = _stream(printed.getvalue()) + [_figure(i) for i in plt.get_fignums()]
    plt.close('all')
  return notebook


def _stream(text):
  if not text:
    return []
  return [{'output_type': 'stream', 'name': 'stdout', 'text': text.splitlines(keepends=True)}]


def _figure(number):
  buffer = io.BytesIO()
  plt.figure(number).savefig(buffer, format='png', dpi=70, bbox_inches='tight')
  image = base64.b64encode(buffer.getvalue()).decode()
  return {'output_type': 'display_data', 'metadata': {},
          'data': {'image/png': image + '\n', 'text/plain': ['<Figure>']}}


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('notebooks', nargs='*', default=sorted(FOLDER.glob('*.ipynb')))
  for path in parser.parse_args().notebooks:
    notebook = run(path)
    pathlib.Path(path).write_text(
        json.dumps(notebook, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    print(f'{path}: saved')


if __name__ == '__main__':
  main()
