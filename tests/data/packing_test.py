import itertools

import jax
import numpy as np
import pytest

from ptjax import config
from ptjax.data import demonstrations
from ptjax.data import examples as examples_lib
from ptjax.data import intake
from ptjax.data import offline
from ptjax.data import order
from ptjax.data import packing
from ptjax.data import plain_text
from ptjax.data import sources
from ptjax.models import policy
from ptjax.models import presets
from ptjax.models import transformer

transformers = pytest.importorskip('transformers')


def _examples(count, longest=40, seed=0, masked=False, **more):
  """Example i has the prompt i, i, ... and the completion 1000 + i, 2000 + i, ..."""
  rng = np.random.default_rng(seed)
  prompts = [np.full(rng.integers(1, longest // 2), i, np.int32) for i in range(count)]
  completions = [(np.arange(1, rng.integers(2, longest // 2), dtype=np.int32) * 1000 + i,)
                 for i in range(count)]
  if masked:
    more['masks'] = [(np.arange(len(c)) % 3 != 1,) for c, in completions]
  return examples_lib.Examples(prompts=prompts, completions=completions, row_ids=list(range(count)),
                               intake=intake.Intake(count, count, 0, {}), **more)


def _sequences(batch):
  """Takes a batch apart: (row ids in it, its targets as (predicting position, token) pairs)."""
  for r, segments in enumerate(batch.packing.segments):
    used = batch.prompt_lengths[r]
    assert (segments[:used] > 0).all() and not segments[used:].any()
    # Sequences stand one behind the other, counted from 1.
    assert (np.diff(segments[:used]) >= 0).all() and (np.diff(segments[:used]) <= 1).all()
    targets = list(zip(batch.packing.predictors[r][batch.loss_mask[r]],
                       batch.tokens[r][batch.loss_mask[r]]))
    assert (np.diff([p for p, _ in targets]) > 0).all()
    count = batch.loss_mask[r].sum()
    assert batch.loss_mask[r][:count].all()  # compacted
    for number in range(1, int(segments.max()) + 1):
      at = np.flatnonzero(segments == number)
      np.testing.assert_array_equal(batch.packing.positions[r][at], np.arange(len(at)))
      yield (batch.prompt_tokens[r][at].tolist(),
             [(int(p) - at[0], int(t)) for p, t in targets if at[0] <= p <= at[-1]])


def test_few_short_examples_still_make_as_many_steps_as_asked_for():
  short = _examples(16, longest=8)
  door = packing.PackedDoor(short, batch_size=8)
  assert door.steps_per_epoch == 2 and door.rows_per_batch >= 1
  assert packing.PackedDoor(short, batch_size=16).steps_per_epoch == 1
  parts = packing.PackedDoor(short, batch_size=8, multiple=4)
  assert parts.steps_per_epoch == 2 and parts.rows_per_batch % 4 == 0


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('multiple', [1, 4])
def test_every_example_comes_once_per_epoch_whole(masked, multiple):
  examples = _examples(61, masked=masked)
  door = packing.PackedDoor(examples, batch_size=8, seed=3, multiple=multiple)
  for epoch in range(2):
    seen = []
    for step in range(door.steps_per_epoch):
      step += epoch * door.steps_per_epoch
      batch = door.batch(step)
      assert len(batch.tokens) == len(batch.prompt_tokens) == door.rows_per_batch
      assert door.rows_per_batch % multiple == 0
      rows = []
      for tokens, targets in _sequences(batch):
        i = tokens[0]
        prompt, (completion,) = examples.prompts[i], examples.completions[i]
        assert tokens == [*prompt, *completion]
        trained = np.flatnonzero(examples.mask(i, 0))
        assert targets == [(len(prompt) + t - 1, completion[t]) for t in trained]
        rows.append(i)
      assert sorted(rows) == sorted(door.rows(step))
      seen += rows
    assert sorted(seen) == list(range(61))


def test_a_batch_is_a_pure_function_of_the_step_and_epochs_differ():
  make = lambda seed: packing.PackedDoor(_examples(50), batch_size=6, seed=seed)
  door = make(1)
  steps = door.steps_per_epoch
  straight = [door.batch(step) for step in range(2 * steps)]
  resumed = make(1)
  for step in (2 * steps - 1, 0, steps):
    jax.tree.map(np.testing.assert_array_equal, resumed.batch(step), straight[step])
  assert [door.rows(s) for s in range(steps)] != [door.rows(steps + s) for s in range(steps)]
  assert any(door.rows(s) != make(2).rows(s) for s in range(steps))
  assert [door.epoch(s) for s in (0, steps, 2 * steps)] == [0.0, 1.0, 2.0]


def test_little_is_padding_and_shapes_are_few():
  examples = _examples(400)
  door = packing.PackedDoor(examples, batch_size=32)
  batches = [door.batch(step) for step in range(door.steps_per_epoch)]
  tokens = sum(int(b.prompt_lengths.sum()) for b in batches)
  assert tokens == sum(len(p) + len(c) for p, (c,) in zip(examples.prompts, examples.completions))
  assert tokens / sum(b.prompt_tokens.size for b in batches) > 0.9
  assert len({(b.prompt_tokens.shape, b.tokens.shape) for b in batches}) <= 4
  # About as many examples per batch as asked for.
  assert abs(len(examples) / len(batches) - 32) < 3


def _best_rows(lengths, width):
  """The fewest rows that hold these, by trying all ways."""
  for count in range(1, len(lengths) + 1):
    for way in itertools.product(range(count), repeat=len(lengths)):
      if all(sum(l for l, row in zip(lengths, way) if row == r) <= width for r in range(count)):
        return count


def test_rows_are_nearly_the_fewest_that_hold_all():
  rng = np.random.default_rng(0)
  for _ in range(20):
    lengths = rng.integers(1, 11, 6)
    rows = packing.fit(lengths, 12)
    assert sorted(np.concatenate(rows)) == list(range(6))
    assert all(lengths[row].sum() <= 12 for row in rows)
    # Best fit decreasing needs at most 11/9 of the optimum and 6/9 more (Dosa, 2007).
    assert len(rows) <= 11 / 9 * _best_rows(lengths, 12) + 6 / 9


def test_sizes_by_tokens():
  door = packing.PackedDoor(_examples(100), tokens_per_batch=1000, tokens=64)
  assert (door.width, door.rows_per_batch) == (64, 15)
  door = packing.PackedDoor(_examples(100), tokens_per_batch=1000, tokens=64, multiple=4)
  assert door.rows_per_batch == 12
  door = packing.PackedDoor(_examples(100), tokens_per_batch=10, tokens=64, multiple=4)
  assert door.rows_per_batch == 4


def test_fewer_examples_than_rows_leave_empty_rows():
  door = packing.PackedDoor(_examples(3), batch_size=3, multiple=8)
  batch = door.batch(0)
  assert batch.prompt_tokens.shape[0] == 8 and (batch.prompt_lengths == 0).sum() == 5
  assert not batch.loss_mask[batch.prompt_lengths == 0].any()
  assert len(list(_sequences(batch))) == 3
  # With enough examples no row stays empty, however well they would fit into fewer.
  door = packing.PackedDoor(_examples(9), batch_size=9, multiple=8, tokens=512)
  assert (door.batch(0).prompt_lengths > 0).all()


def test_an_example_longer_than_a_row():
  with pytest.raises(config.UserError, match=r'data.packed_tokens=16: row \d+ has 3\d tokens; '
                     'raise it, or lower data.max_prompt_tokens or rollout.max_completion_tokens'):
    packing.PackedDoor(_examples(50), batch_size=4, tokens=16)


def test_what_cannot_be_packed():
  with pytest.raises(ValueError, match='examples of one completion without inputs'):
    packing.PackedDoor(_examples(5, inputs={'labels': np.zeros(5)}), batch_size=4)
  with pytest.raises(ValueError, match='give batch_size or tokens_per_batch'):
    packing.PackedDoor(_examples(5))


def test_values_per_token_follow_their_tokens():
  examples = _examples(30, masked=True)
  door = packing.PackedDoor(examples, batch_size=8)
  door.attach('reference_log_probs', [c / 2 for c, in examples.completions])
  batch = door.batch(1)
  np.testing.assert_array_equal(
      batch.inputs['reference_log_probs'], np.where(batch.loss_mask, batch.tokens / 2, 0))


def test_a_mixture_keeps_its_shares_in_every_epoch():
  mixture = order.Mixture(np.repeat([0, 1], [20, 80]), (1.0, 1.0))
  make = lambda: packing.PackedDoor(_examples(100, mixture=mixture), batch_size=10, seed=1)
  door = make()
  straight, step = [], 0
  for epoch in range(3):
    rows = []
    while int(door.epoch(step)) == epoch:
      rows += door.rows(step)
      straight.append(door.rows(step))
      step += 1
    assert sum(row < 20 for row in rows) == sum(row >= 20 for row in rows) == 50
  assert make().rows(step - 1) == straight[-1]


def test_packed_log_probs_are_those_of_the_examples_alone():
  model = presets.get('tiny', dtype='float32', param_dtype='float32')
  params = transformer.init(model, jax.random.key(0))
  rng = np.random.default_rng(0)
  examples = _examples(12, longest=16)
  ids = lambda x: rng.integers(0, model.vocab_size, len(x)).astype(np.int32)
  examples = examples_lib.Examples(
      prompts=[ids(p) for p in examples.prompts], row_ids=examples.row_ids,
      completions=[(ids(c),) for c, in examples.completions], intake=examples.intake)
  packed = packing.PackedDoor(examples, batch_size=12, tokens=32).batch(0)
  alone = offline.OfflineDoor(examples, batch_size=12, seed=None, bucket=False).batch(0)
  def log_probs(batch):
    return policy.log_probs(model, params, batch.prompt_tokens, batch.prompt_lengths, batch.tokens,
                            packing=batch.packing)['log_probs']
  together = np.sort(np.asarray(log_probs(packed))[packed.loss_mask])
  apart = np.sort(np.asarray(log_probs(alone))[alone.loss_mask])
  # Float32; only the order of sums differs.
  np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-5)


def test_real_instructions_and_text(shared_data):
  gpt2 = transformers.AutoTokenizer.from_pretrained(shared_data / 'tokenizers' / 'gpt2')
  limits = examples_lib.Limits(max_prompt_tokens=256, max_completion_tokens=256)
  rows = sources.load(shared_data / 'instruct' / 'seed_tasks.jsonl')
  text = (shared_data / 'shakespeare' / 'sonnets.txt').read_text()
  for examples in (demonstrations.read(rows, gpt2, limits=limits),
                   plain_text.read([{'text': text}], gpt2, tokens=128)):
    door = packing.PackedDoor(examples, batch_size=16)
    batches = [door.batch(step) for step in range(door.steps_per_epoch)]
    assert sum(int(b.loss_mask.sum()) for b in batches) == sum(
        len(c) for c, in examples.completions)
    filled = sum(b.prompt_lengths.sum() for b in batches) / sum(
        b.prompt_tokens.size for b in batches)
    assert filled > 0.9
