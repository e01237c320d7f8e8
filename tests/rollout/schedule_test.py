"""The schedule: every completion decoded once, in few and small programs."""

import numpy as np
import pytest

from ptjax.rollout import schedule


@pytest.mark.parametrize('tokens, expected', [
    (0, [8]), (20, [24]), (64, [64]), (80, [80]), (130, [64, 136]), (600, [64, 128, 256, 600])])
def test_windows_double_up_to_what_is_needed(tokens, expected):
  assert schedule.window_sizes(tokens) == expected


@pytest.mark.parametrize('slots, expected', [
    (1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (32, [4, 8, 16, 32]), (33, [5, 9, 17, 33])])
def test_slots_halve(slots, expected):
  assert schedule.slot_counts(slots) == expected


def follow(limits, slots, *, steps=4, windows=(8, 16, 64), first=1):
  """Decodes completions [X, N] of given lengths as the sampler would; returns the turns."""
  shards, each = limits.shape
  plan = schedule.Schedule(shards, each, slots, windows, steps)
  lengths = np.full(limits.shape, first)
  turns, place = [], {}
  while (turn := plan.turn(lengths.reshape(-1), (lengths >= limits).reshape(-1))) is not None:
    assert turn.slots.shape == turn.rows.shape
    for shard in range(shards):
      assert len(set(turn.rows[shard])) == len(set(turn.slots[shard])) == turn.rows.shape[1]
      for slot, row in zip(turn.slots[shard], turn.rows[shard]):
        if lengths[shard, row] < limits[shard, row]:
          # A completion stays in its slot, where its keys and values are.
          assert place.setdefault((shard, row), slot) == slot
          lengths[shard, row] = min(lengths[shard, row] + steps, limits[shard, row])
    turns.append(turn)
    assert len(turns) < 1000
  np.testing.assert_array_equal(lengths, np.maximum(limits, first))
  return turns


@pytest.mark.parametrize('shards, each, slots', [(1, 40, 8), (1, 8, 8), (4, 7, 3), (2, 5, 1)])
def test_every_completion_is_decoded_to_its_end(shards, each, slots):
  limits = np.minimum(np.random.default_rng(0).geometric(0.08, (shards, each)), 50)
  limits[0, :2] = 1, 50  # one that its first token ends
  turns = follow(limits, slots)
  counts = [turn.rows.shape[1] for turn in turns]
  assert counts[0] == slots and set(counts) <= set(schedule.slot_counts(slots))
  assert counts == sorted(counts, reverse=True)  # ranks close once nothing waits
  # The work: what one slot after the other would need, and at most a chunk's rounding and the
  # tail beyond.
  if shards == 1:
    needed = -(-np.maximum(limits - 1, 0) // 4)
    assert needed.sum() <= sum(counts) <= needed.sum() + slots * needed.max()


def test_the_window_follows_the_longest_that_lives():
  turns = follow(np.array([[60, 5, 5, 5, 20]]), 2)
  windows = [turn.window for turn in turns]
  assert windows == [8, 8, 16, 16, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64]
  # Once the long one is done, a refilled slot is narrow again.
  assert [turn.window for turn in follow(np.array([[20, 1, 1, 9]]), 1)] == [
      8, 8, 16, 16, 64, 8, 8]


def test_what_is_compiled_serves_where_it_can():
  plan = schedule.Schedule(2, 8, 8, [8, 16, 64], 4, compiled=[(16, 64), (8, 16), (16, 8)])
  lengths, done = np.full(16, 5), np.arange(16) % 8 >= 2  # two live in each shard
  turn = plan.turn(lengths, done)
  assert turn.window == 16 and turn.rows.shape == (2, 4)  # not (8, 8), nor two slots
  assert plan.turn(lengths + 20, done).window == 64
  with_more = plan.turn(lengths, np.zeros(16, bool))
  assert with_more.window == 8 and with_more.rows.shape == (2, 8)
  assert schedule.Schedule(1, 8, 8, [8, 16], 4, compiled=[(1, 64)]).turn(
      lengths[:8], done[:8]).rows.shape == (1, 2)  # none will do


def test_a_program_of_more_slots_than_are_used_will_not_do():
  plan = schedule.Schedule(1, 8, 8, [8, 16], 4, compiled=[(8, 16)], active=2)
  turn = plan.turn(np.full(8, 3), np.zeros(8, bool))
  # Its window would, but with two slots it would be another program, and a wider one.
  assert turn.rows.shape == (1, 2) and turn.window == 8


def test_the_longest_that_lives_decides_not_one_that_is_done():
  plan = schedule.Schedule(1, 4, 4, [8, 16, 64], 4)
  turn = plan.turn(np.array([40, 5, 6, 50]), np.array([True, False, False, True]))
  assert turn.window == 16
  np.testing.assert_array_equal(turn.rows, [[1, 2]])
  np.testing.assert_array_equal(turn.slots, [[1, 2]])
