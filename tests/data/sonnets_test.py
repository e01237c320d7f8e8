"""Numbered poems are read whole, and cut behind the third line."""

import pytest

from ptjax import config
from ptjax.data import sonnets


def test_the_shared_sonnets(shared_data):
  path = shared_data / 'shakespeare' / 'sonnets.txt'
  rows = sonnets.sonnets(path)
  assert [row['number'] for row in rows] == list(range(1, 132))
  assert rows[0]['prompt'] == ("From fairest creatures we desire increase,\nThat thereby beauty's "
                               'rose might never die,\nBut, as the riper should by time decease,')
  assert rows[0]['completion'].startswith('\nHis tender heir might bear his memory.\nBut thou')
  assert rows[0]['completion'].endswith("\n  To eat the world's due, by the grave and thee.")
  text = path.read_text().replace('\r\n', '\n')
  for row in rows:  # nothing of the poems is lost
    assert row['prompt'] + row['completion'] in text
  assert rows[-1]['completion'].endswith('And thence this slander as I think proceeds.')


def test_held_out_sonnets_go_with_their_beginnings(shared_data):
  folder = shared_data / 'shakespeare'
  given = sonnets.sonnets(folder / 'sonnets_held_out_dev.txt')
  true = sonnets.sonnets(folder / 'TRUE_sonnets_held_out_dev.txt')
  assert [row['number'] for row in true] == list(range(132, 144))
  assert [row['prompt'] for row in given] == [row['prompt'] for row in true]
  assert all(row['completion'] is None for row in given)
  assert all(row['completion'].count('\n') == 11 for row in true)


def test_recognition(shared_data):
  folder = shared_data / 'shakespeare'
  assert sonnets.recognise((folder / 'sonnets.txt').read_text())
  assert not sonnets.recognise((folder / 'tinyshakespeare.txt').read_text())
  assert not sonnets.recognise((shared_data / 'tinystories/tinystories_val_a.txt').read_text())
  assert not sonnets.recognise('7\n\na line\n\n3\n\nanother\n')  # counts down: no list of poems


def test_line_ends_and_blank_lines():
  rows = sonnets.parse('Title\r\n\r\n1\r\n\r\na\r\nb\r\nc\r\n  d\r\n\r\n 2 \r\n\r\n\r\ne\r\n')
  assert rows == [{'number': 1, 'prompt': 'a\nb\nc', 'completion': '\n  d'},
                  {'number': 2, 'prompt': 'e', 'completion': None}]


def test_no_poems(tmp_path):
  path = tmp_path / 'a.txt'
  with pytest.raises(config.UserError, match='a.txt: cannot be read'):
    sonnets.sonnets(path)
  path.write_text('prose\n')
  with pytest.raises(config.UserError, match='no poems; expected a number on a line of its own'):
    sonnets.sonnets(path)
  path.write_bytes(b'\xff\xfe1')
  with pytest.raises(config.UserError, match='not UTF-8'):
    sonnets.sonnets(path)
