"""Writes ptjax/HOUSE.md: every file of the package with the first sentence it says of itself.

    python scripts/make_house_page.py
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / 'ptjax' / 'HOUSE.md'

# In the order in which data walks through them.
ROOMS = {
    '': 'The front door and what joins the rooms',
    'pieces': 'Array mathematics: `[B, T]` in, `[B, T]` out',
    'losses': 'Pieces composed under published names',
    'models': 'What belongs to weights',
    'data': 'Rows, tokens, doors',
    'rollout': 'Prompts in, completions out',
    'rewards': 'Text in, numbers out',
    'training': 'Prompts to batch to gradient to checkpoint',
    'evaluation': 'How good a policy is, with intervals',
    'inspect': 'What a loss does to each token',
    'plan': 'What a run would need, and what would fit',
}

_HEAD = '''# The house

Made by `scripts/make_house_page.py` from the files' own first sentences; a test fails when they
differ. Imports run downhill: pieces and types at the bottom, launch at the top;
`tests/house_test.py` holds that.
'''


def render():
  """Returns the text of HOUSE.md."""
  parts = [_HEAD]
  for room, says in ROOMS.items():
    folder = ROOT / 'ptjax' / room
    lines = [f'| `{path.name}` | {first_sentence(path)} |' for path in sorted(folder.glob('*.py'))
             if path.name != '__init__.py']
    parts.append('\n'.join([f'## {says}: `{"/".join(filter(None, ("ptjax", room)))}/`', '',
                            '| file | |', '| --- | --- |', *lines, '']))
  return '\n'.join(parts)


def first_sentence(path):
  """The first paragraph of a file's docstring, on one line, up to its first full stop."""
  docstring = ast.get_docstring(ast.parse(path.read_text())) or ''
  text = ' '.join(docstring.partition('\n\n')[0].split())
  sentence, stop, _ = text.partition('. ')
  return (sentence + stop).strip().replace('|', '\\|')


if __name__ == '__main__':
  PAGE.write_text(render())
  print(PAGE)
