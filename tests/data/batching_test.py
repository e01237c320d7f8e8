import numpy as np

from ptjax.data import batching


def test_buckets_are_few_and_hold_their_length():
  sizes = [batching.bucket(length) for length in range(1, 513)]
  assert sorted(set(sizes)) == [8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512]
  assert all(size >= length for length, size in enumerate(sizes, start=1))


def test_bucket_stops_at_the_limit():
  assert batching.bucket(97, 100) == 100
  assert batching.bucket(3, 5) == 5
  assert batching.bucket(0, 100) == 8


def test_pad_right():
  tokens, lengths = batching.pad_right([[1, 2, 3], [], [4]], 4, fill=9)
  np.testing.assert_array_equal(tokens, [[1, 2, 3, 9], [9, 9, 9, 9], [4, 9, 9, 9]])
  np.testing.assert_array_equal(lengths, [3, 0, 1])
  assert tokens.dtype == lengths.dtype == np.int32


def _area(sizes):
  return sizes[..., 0] + 2 * sizes[..., 1]


def test_shapes_hold_every_batch_and_are_few():
  rng = np.random.default_rng(0)
  needs = rng.integers(1, 900, (300, 2))
  shapes = batching.Shapes(needs, _area, most=5)
  assert len(shapes.sizes) <= 5
  used = [shapes.cover(need) for need in needs]
  assert set(used) <= set(shapes.sizes)
  assert (np.array(used) >= needs).all()
  # The cheapest of those that hold it.
  for need, size in zip(needs, used):
    fitting = [s for s in shapes.sizes if s[0] >= need[0] and s[1] >= need[1]]
    assert _area(np.array(size)) == min(_area(np.array(s)) for s in fitting)


def test_shapes_are_kept_apart_only_where_that_pays():
  two_kinds = np.array([[8, 8]] * 50 + [[512, 8]] * 50)
  assert sorted(batching.Shapes(two_kinds, _area).sizes) == [(8, 8), (512, 8)]
  nearly_one = np.array([[504, 8]] * 2 + [[512, 8]] * 98)
  assert batching.Shapes(nearly_one, _area).sizes == [(512, 8)]


def test_joining_costs_as_little_as_the_best_choice_of_sizes():
  # Exhaustive search over which needs share a size, on a case small enough for it.
  needs = np.array([[8, 8], [16, 8], [64, 8], [72, 8], [200, 8]])
  counts = [5, 5, 3, 3, 1]
  def cost(groups):
    return sum(counts[i] * _area(needs[group].max(0)) for group in groups for i in group)
  best = min(cost([list(range(0, a)), list(range(a, b)), list(range(b, 5))])
             for a in range(1, 4) for b in range(a + 1, 5))
  many = np.repeat(needs, counts, axis=0)
  shapes = batching.Shapes(many, _area, most=3)
  assert sum(_area(np.array(shapes.cover(need))) for need in many) == best


def test_a_need_beyond_all_shapes_gets_the_same_whatever_came_before():
  needs = [((9, 3), (16, 16)), ((3, 97), (8, 100)), ((8, 8), (8, 16)), ((20, 17), (32, 32))]
  for order in (needs, needs[::-1]):
    shapes = batching.Shapes(np.array([[8, 16]]), _area, caps=(None, 100))
    for need, size in order:
      assert shapes.cover(need) == size  # (3, 97): no larger than the cap
    assert shapes.sizes == [(8, 16)]
