"""Stop strings: the cut is where the text says, whatever the pieces it came in."""

import numpy as np
import pytest

from ptjax.rollout import stop

LETTERS = 'abcdefghijklmnopqrstuvwxyz .'


def decode(ids):
  return ''.join(LETTERS[i] for i in ids)


def encode(text):
  return [LETTERS.index(c) for c in text]


def cuts(texts, strings, *, chunk, max_tokens=40, decode_text=decode):
  """Feeds whole completions in pieces of `chunk`, as the sampler does."""
  watch = stop.StopStrings(strings, decode_text, len(texts), max_tokens)
  ids = [encode(t) for t in texts]
  for start in range(0, max(map(len, ids)), chunk):
    lengths = np.array([min(len(row), start + chunk) for row in ids])
    tokens = np.array([(row + [99] * 100)[min(start, len(row)):][:chunk] for row in ids])
    watch.feed(np.arange(len(ids)), tokens, lengths, lengths == [len(row) for row in ids])
  return watch.cuts.tolist()


@pytest.mark.parametrize('chunk', [1, 3, 8, 40])
def test_cuts_after_the_token_that_completes_a_string(chunk):
  texts = ['the end. and more of it', 'no stop here at all', 'stop', 'a stop stop stop', 'sto',
           'p at the very end stop', '']
  assert cuts(texts, ('stop', 'end.'), chunk=chunk) == [8, 7, 4, 6, 41, 22, 41]


@pytest.mark.parametrize('chunk', [1, 5, 40])
def test_a_string_may_end_inside_a_token(chunk):
  pairs = lambda ids: decode(ids).replace('a', 'xy!z')  # token 'a' is four characters long
  assert cuts(['bbba bb', 'bbbbbbb'], ('y!',), chunk=chunk, decode_text=pairs) == [4, 41]


@pytest.mark.parametrize('chunk', [1, 2, 7, 40])
def test_text_that_changes_backwards_cuts_alike_in_any_chunks(chunk):
  # Like a clean-up of spaces: ' .' becomes '.' once the period is there.
  clean = lambda ids: decode(ids).replace(' .', '.')
  texts = ['abcdef .gh ij', 'a b .c']
  assert cuts(texts, ('f ', 'j'), chunk=chunk, decode_text=clean) == cuts(
      texts, ('f ', 'j'), chunk=40, decode_text=clean)


def test_finished_completions_are_not_decoded_again():
  calls = []
  def counting(ids):
    calls.append(len(ids))
    return decode(ids)
  watch = stop.StopStrings(('zz',), counting, 1, 40)
  watch.feed([0], np.array([encode('abc')]), np.array([3]), np.array([True]))
  before = len(calls)
  watch.feed([0], np.array([[5, 5, 5]]), np.array([3]), np.array([True]))
  assert before and len(calls) == before
