"""HOUSE.md says what the files say of themselves."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'scripts'))
import make_house_page


def test_page_is_up_to_date():
  assert make_house_page.PAGE.read_text() == make_house_page.render(), (
      'run python scripts/make_house_page.py')


def test_every_file_says_what_it_is():
  files = [path for room in make_house_page.ROOMS
           for path in (make_house_page.ROOT / 'ptjax' / room).glob('*.py')]
  silent = [path.name for path in files
            if path.name != '__init__.py' and not make_house_page.first_sentence(path)]
  assert files and not silent


def test_no_room_is_forgotten():
  folders = {path.parent.name for path in (make_house_page.ROOT / 'ptjax').glob('*/*.py')}
  assert folders == set(filter(None, make_house_page.ROOMS))
