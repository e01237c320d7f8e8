"""Rollouts feed several updates; what a checkpoint keeps of one continues it exactly."""

import jax
import numpy as np
import pytest

from ptjax import config as settings
from ptjax import types
from ptjax.training import experience
from ptjax.training import online
from ptjax.training import packing

P, G, T = 4, 2, 3


class Collector:
  """Numbers its rollouts; every array tells which one it is of."""

  def __init__(self, recomputed=True):
    self.calls = []
    self._recomputed = recomputed

  def __call__(self, params, index, loss_state):
    self.calls.append((params, index))
    fill = lambda *shape: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 100 * index
    inputs = {'advantages': fill(P * G), 'rollout_log_probs': fill(P * G, T)}
    if self._recomputed:
      inputs['old_log_probs'] = fill(P * G, T)
    batch = types.TokenBatch(
        prompt_tokens=np.zeros((P, 2), np.int32), prompt_lengths=np.ones(P, np.int32),
        tokens=fill(P * G, T).astype(np.int32), loss_mask=np.ones((P * G, T), bool),
        on_policy=np.asarray(self._recomputed), inputs=inputs)
    return experience.Experience(
        batch, {'reward': float(index), 'timing_s/rollout': 1.0, 'perf/x': 2.0}, ['sample'])


def source_of(collector=None, packer=None, **training):
  packs = {'lay_out': packer, 'learners': {'update': packer}} if packer else {}
  training = settings.TrainingSettings(**{'steps': 12, 'mini_batches': 2, 'epochs': 2, **training})
  return online.RolloutSource(
      collector or Collector(), training, seed=0, samples_every=3, **packs)


def leaves(batch):
  return [np.asarray(x) for x in jax.tree.leaves(batch)]


def test_one_rollout_feeds_epochs_times_mini_batches():
  collector = Collector()
  source = source_of(collector)
  drawn = [source.batch(f'p{step}', step) for step in range(8)]
  assert collector.calls == [('p0', 0), ('p4', 1)]
  assert [bool(batch.on_policy) for batch, _, _ in drawn] == [True, False, False, False] * 2
  assert [m['reward'] for _, m, _ in drawn] == [0.0] * 4 + [1.0] * 4
  assert ['timing_s/rollout' in m and 'perf/x' in m for _, m, _ in drawn] == (
      [True, False, False, False] * 2)
  assert all(m['train_tokens'] == P * G * T // 2 for _, m, _ in drawn)
  rows = lambda steps: sorted(
      x for step in steps for x in np.asarray(drawn[step][0].inputs['advantages']).tolist())
  assert rows((0, 1)) == rows((2, 3)) == list(range(P * G))


@pytest.mark.parametrize('packs', [False, True])
@pytest.mark.parametrize('stop', [1, 2, 3, 4, 5])
def test_a_resumed_rollout_goes_on_with_the_same_pieces(stop, packs):
  packer = lambda: packing.Packer(width=8, always=True) if packs else None
  straight, first = source_of(packer=packer()), source_of(packer=packer())
  expected = [straight.batch('p', step) for step in range(6)]
  for step in range(stop):
    first.batch('p', step)
  arrays, metrics = first.pending(stop)
  collector = Collector()
  resumed = source_of(collector, packer())
  resumed.restore(arrays, metrics)
  for step in range(stop, 6):
    batch, found, _ = resumed.batch('p', step)
    for one, other in zip(leaves(batch), leaves(expected[step][0]), strict=True):
      np.testing.assert_array_equal(one, other)
    assert found == expected[step][1]
    assert (batch.packed is not None) == packs
  assert all(index > 0 for _, index in collector.calls)


def test_nothing_is_pending_between_rollouts():
  source = source_of()
  for step in range(4):
    source.batch('p', step)
  assert source.pending(4) == (None, {}) and source.pending(3)[0] is not None


def test_samples_come_first_last_and_every_so_often():
  source = source_of(mini_batches=1, epochs=1, steps=12)
  assert [s for s in range(12) if source.batch('p', s)[2]] == [0, 3, 6, 9, 11]
  source = source_of()  # of four updates each, so every rollout passes a multiple of three
  assert [s for s in range(12) if source.batch('p', s)[2]] == [0, 4, 8]


def test_what_the_first_update_saw_stands_where_nothing_was_recomputed():
  for recomputed in (True, False):
    source = source_of(Collector(recomputed))
    source.batch('p', 0)
    source.complete(0, {'loss': 1.0, 'sampling/gap': 0.25})
    arrays, metrics = source.pending(1)  # a resumed run knows it as well
    source = source_of(Collector(recomputed))
    source.restore(arrays, metrics)
    batch, _, _ = source.batch('p', 1)
    assert not batch.on_policy
    seen = {'loss': 2.0, 'sampling/gap': 9.0}
    source.complete(1, seen)
    assert seen == {'loss': 2.0, 'sampling/gap': 9.0 if recomputed else 0.25}


@pytest.mark.parametrize('count', [1, 2, 4])
def test_mini_batches_of_an_epoch_are_a_partition_of_whole_groups(count):
  tokens = np.random.default_rng(0).integers(4, 9, (P * G, T)).astype(np.int32)
  whole = types.TokenBatch(
      prompt_tokens=tokens[::G], prompt_lengths=np.ones(P, np.int32), tokens=tokens,
      loss_mask=np.ones((P * G, T), bool), on_policy=np.asarray(True),
      inputs={'advantages': np.arange(P * G, dtype=np.float32)})
  def cut(epoch, rollout=0):
    return [online.mini_batch(whole, index=i, count=count, seed=0, rollout=rollout, epoch=epoch,
                              on_policy=i == 0) for i in range(count)]
  parts = cut(0)
  rows = np.concatenate([part.inputs['advantages'] for part in parts]).astype(int)
  np.testing.assert_array_equal(np.sort(rows), np.arange(P * G))
  for part in parts:
    assert part.prompt_tokens.shape[0] == P // count
    chosen = part.inputs['advantages'].astype(int)
    np.testing.assert_array_equal(part.tokens, whole.tokens[chosen])
    np.testing.assert_array_equal(part.prompt_tokens, whole.prompt_tokens[chosen[::G] // G])
    np.testing.assert_array_equal(chosen[1::G], chosen[::G] + 1)
  assert [bool(part.on_policy) for part in parts] == [True] + [False] * (count - 1)
  orders = {tuple(np.concatenate([part.inputs['advantages'] for part in cut(epoch, rollout)]))
            for epoch in range(3) for rollout in range(3)}
  assert len(orders) > 1 or count == 1  # another order in other epochs and rollouts
