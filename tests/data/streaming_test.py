import functools
import json

import jax
import numpy as np
import pytest

from ptjax import config
from ptjax.data import demonstrations
from ptjax.data import examples as examples_lib
from ptjax.data import offline
from ptjax.data import packing
from ptjax.data import preferences
from ptjax.data import sources
from ptjax.data import streaming
from ptjax.data import tokenizer as tokenizers

pytest.importorskip('transformers')

CHARACTERS = tokenizers.characters()


@pytest.fixture
def path(tmp_path):
  rows = [{'prompt': f'{i:03d}', 'completion': 'x' * (1 + i * 7 % 11)} for i in range(100)]
  path = tmp_path / 'a.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  return path


def _door(path, *, packed=False, seed=1, window=24, **limits):
  read = lambda rows: demonstrations.read(
      rows, CHARACTERS, limits=examples_lib.Limits(**limits))
  if packed:
    open_door = functools.partial(packing.PackedDoor, batch_size=8, tokens=32)
  else:
    open_door = functools.partial(offline.OfflineDoor, batch_size=8)
  return streaming.StreamingDoor(sources.load(path, lazy=True), read, open_door, window=window,
                                 seed=seed)


def _numbers(batch):
  """The rows in a batch, from its prompts."""
  text = [CHARACTERS.decode(tokens, skip_special_tokens=True) for tokens in batch.prompt_tokens]
  return sorted(int(part[:3]) for line in text for part in line.replace('x', ' ').split())


def test_every_row_comes_once_per_epoch(path):
  door = _door(path, window=20)
  assert door.steps_per_window == 3  # of 20 rows by 8
  for epoch in range(2):
    drawn = []
    for w in range(5):
      rows = np.concatenate([door.rows(epoch * 15 + 3 * w + s) for s in range(3)])
      drawn += list(rows[:20])  # the last batch of a window is filled up with its own examples
      assert set(rows[20:]) <= set(rows[:20])
    assert sorted(drawn) == list(range(100))
  assert (door.epoch(0), door.epoch(15), door.steps_per_epoch, len(door)) == (0.0, 1.0, 15, 100)


@pytest.mark.parametrize('packed', [False, True])
def test_a_batch_is_a_pure_function_of_the_step(path, packed):
  door = _door(path, packed=packed)
  straight = [door.batch(step) for step in range(20)]
  shapes = {jax.tree.map(np.shape, batch).__repr__() for batch in straight}
  assert len(shapes) <= 4
  for step in (19, 0, 7, 13):  # each as after a resume
    again = _door(path, packed=packed)
    jax.tree.map(np.testing.assert_array_equal, again.batch(step), straight[step])
    assert _numbers(straight[step]) == sorted(again.rows(step))
  assert [_door(path, seed=2).rows(s) for s in range(3)] != [door.rows(s) for s in range(3)]


def test_no_more_than_three_windows_are_in_memory_and_each_is_read_once(path):
  alive, read = [], []
  def read_window(rows):
    read.append(rows.where(0))
    found = demonstrations.read(rows, CHARACTERS)
    alive.append(__import__('weakref').ref(found.completions[0][0]))
    return found
  door = streaming.StreamingDoor(
      sources.load(path, lazy=True), read_window,
      functools.partial(offline.OfflineDoor, batch_size=8), window=10, seed=0)
  for step in range(20):
    door.batch(step)
    assert sum(ref() is not None for ref in alive) <= 3 + 1  # one may be in the making
  door._executor.shutdown()
  assert len(read) == len(set(read)) == 11  # ten windows and the one prepared


def test_what_was_dropped_adds_up(path):
  door = _door(path, window=25, max_completion_tokens=6)
  for step in range(4 * door.steps_per_window):
    door.batch(step)
  expected = sum(1 + i * 7 % 11 + 1 > 6 for i in range(100))
  assert (door.intake.rows, door.intake.kept) == (100, 100 - expected)
  assert door.intake.dropped == {'longer than rollout.max_completion_tokens=6': expected}


def test_a_window_with_fewer_rows_repeats_its_own(path):
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  for row in rows[50:]:
    row['completion'] = '' if int(row['prompt']) % 2 else row['completion']
  path.write_text('\n'.join(map(json.dumps, rows)))
  door = _door(path, seed=None, window=50)
  assert door.steps_per_window == 7
  second = np.concatenate([door.rows(7 + s) for s in range(7)])
  assert set(second) == set(range(50, 100, 2)) and len(second) == 56


def test_errors_in_later_windows_name_the_row(path):
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  rows[60]['completion'] = 7
  path.write_text('\n'.join(map(json.dumps, rows)))
  door = _door(path, seed=None, window=25)
  with pytest.raises(config.UserError, match=f'{path}, row 61: after a prompt given as text'):
    for step in range(3 * door.steps_per_window):
      door.batch(step)


def test_a_mixture_is_streamed_by_weight(path, tmp_path):
  other = tmp_path / 'b.jsonl'
  other.write_text('\n'.join(
      json.dumps({'prompt': f'{900 + i}', 'completion': 'y'}) for i in range(20)))
  rows = sources.load(f'{path}*1 + {other}*1', lazy=True)
  door = streaming.StreamingDoor(
      rows, lambda rows: demonstrations.read(rows, CHARACTERS),
      functools.partial(offline.OfflineDoor, batch_size=10), window=60, seed=0)
  drawn = [row for step in range(door.steps_per_epoch) for row in door.rows(step)]
  assert len(drawn) == 120 and sum(row >= 100 for row in drawn) == 60
  assert sorted(row for row in drawn if row >= 100) == sorted(list(range(100, 120)) * 3)


def test_pairs_and_parquet(tmp_path, monkeypatch):
  datasets = pytest.importorskip('datasets')
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
  path = tmp_path / 'a.parquet'
  datasets.Dataset.from_list([{'prompt': f'{i:03d}', 'chosen': 'a' * (1 + i % 5), 'rejected': 'b'}
                              for i in range(64)]).to_parquet(path)
  door = streaming.StreamingDoor(
      sources.load(path), lambda rows: preferences.read(rows, CHARACTERS),
      functools.partial(offline.OfflineDoor, batch_size=8), window=16, seed=0)
  drawn = [row for step in range(8) for row in door.rows(step)]
  assert sorted(drawn) == list(range(64))
  assert door.batch(3).tokens.shape[0] == 16
