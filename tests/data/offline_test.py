import jax
import numpy as np
import pytest

from ptjax.data import demonstrations
from ptjax.data import examples as examples_lib
from ptjax.data import intake
from ptjax.data import offline
from ptjax.data import preferences
from ptjax.data import sources
from ptjax.data import tokenizer as tokenizers

transformers = pytest.importorskip('transformers')


def _examples(count, group_size=2, seed=0, **more):
  """Examples whose ids say where they stand: prompt i is i, i, ...; completion g 1000 g + i."""
  rng = np.random.default_rng(seed)
  prompts = [np.full(rng.integers(1, 40), i, np.int32) for i in range(count)]
  completions = [tuple(np.full(rng.integers(1, 30), 1000 * (g + 1) + i, np.int32)
                       for g in range(group_size)) for i in range(count)]
  return examples_lib.Examples(
      prompts=prompts, completions=completions, row_ids=[10 * i for i in range(count)],
      intake=intake.Intake(count, count, 0, {}), **more)


def _unpad(batch):
  """[(prompt ids, [completion ids of the mask])] of a batch."""
  group = len(batch.tokens) // len(batch.prompt_tokens)
  return [(batch.prompt_tokens[i][:batch.prompt_lengths[i]].tolist(),
           [batch.tokens[i * group + g][batch.loss_mask[i * group + g]].tolist()
            for g in range(group)]) for i in range(len(batch.prompt_tokens))]


@pytest.mark.parametrize('bucket', [True, False])
@pytest.mark.parametrize('group_size', [1, 2, 3])
def test_every_example_comes_once_per_epoch_whole(bucket, group_size):
  examples = _examples(33, group_size)
  door = offline.OfflineDoor(examples, batch_size=4, seed=5, bucket=bucket)
  assert len(door) == 33 and door.steps_per_epoch == 9 and door.epoch(33) == 4.0
  seen = []
  for step in range(33):
    batch = door.batch(step)
    assert batch.tokens.shape[0] == 4 * group_size
    rows = door.rows(step)
    for row, (prompt, group) in zip(rows, _unpad(batch)):
      i = row // 10
      assert prompt == examples.prompts[i].tolist()
      assert group == [c.tolist() for c in examples.completions[i]]
      seen.append(i)
  for epoch in range(4):
    assert sorted(seen[33 * epoch:33 * (epoch + 1)]) == list(range(33))


def test_a_batch_is_a_pure_function_of_the_step():
  make = lambda seed: offline.OfflineDoor(_examples(40), batch_size=4, seed=seed)
  door = make(1)
  straight = [door.batch(step) for step in range(12)]
  resumed = make(1)
  for step in (11, 3, 0):
    jax.tree.map(np.testing.assert_array_equal, resumed.batch(step), straight[step])
  assert any(door.rows(step) != make(2).rows(step) for step in range(12))


def test_shapes_stay_few_over_many_epochs():
  door = offline.OfflineDoor(_examples(200), batch_size=8, seed=0)
  shapes = {(b.prompt_tokens.shape, b.tokens.shape) for b in map(door.batch, range(100))}
  assert len(shapes) <= 4


def test_no_size_exceeds_the_limits():
  limits = examples_lib.Limits(max_prompt_tokens=39, max_completion_tokens=29)
  door = offline.OfflineDoor(_examples(200, limits=limits), batch_size=8, seed=0)
  batches = [door.batch(step) for step in range(25)]
  assert max(b.prompt_tokens.shape[1] for b in batches) <= 39
  assert max(b.tokens.shape[1] for b in batches) <= 29


def test_masks_and_inputs_come_with_their_rows():
  base = _examples(20)
  masks = [tuple(np.arange(len(c)) % 2 == 0 for c in group) for group in base.completions]
  per_token = {'weights': [tuple(c + 0.5 for c in group) for group in base.completions],
               'marks': [tuple(c % 2 == 1 for c in group) for group in base.completions]}
  examples = _examples(20, masks=masks, per_token=per_token, inputs={
      'margins': np.arange(20, dtype=np.float64), 'labels': np.arange(20) % 3 == 0,
      'scores': np.arange(40).reshape(20, 2)})
  batch = offline.OfflineDoor(examples, batch_size=8, seed=0).batch(0)
  which = [int(p[0]) for p in batch.prompt_tokens]
  np.testing.assert_array_equal(batch.inputs['margins'], np.float32(which))
  assert batch.inputs['margins'].dtype == np.float32
  np.testing.assert_array_equal(batch.inputs['labels'], [i % 3 == 0 for i in which])
  np.testing.assert_array_equal(batch.inputs['scores'], [2 * i + g for i in which for g in (0, 1)])
  for b, tokens in enumerate(batch.tokens):
    i, g = which[b // 2], b % 2
    length = len(base.completions[i][g])
    np.testing.assert_array_equal(batch.loss_mask[b][:length], masks[i][g])
    assert not batch.loss_mask[b][length:].any()
    np.testing.assert_array_equal(batch.inputs['weights'][b][:length], tokens[:length] + 0.5)
    assert not batch.inputs['weights'][b][length:].any()
    np.testing.assert_array_equal(batch.inputs['marks'][b][:length], tokens[:length] % 2 == 1)
  assert batch.inputs['weights'].dtype == np.float32 and batch.inputs['marks'].dtype == bool


def test_attached_values_follow_their_completions():
  examples = _examples(12)
  door = offline.OfflineDoor(examples, batch_size=4, seed=0)
  values = [completion / 2 for group in examples.completions for completion in group]
  door.attach('reference_log_probs', values)
  batch = door.batch(1)
  np.testing.assert_array_equal(
      batch.inputs['reference_log_probs'], np.where(batch.loss_mask, batch.tokens / 2, 0))
  with pytest.raises(ValueError, match='23 arrays for 12 x 2 completions'):
    door.attach('x', values[1:])
  with pytest.raises(ValueError, match=r'x\[0\] has shape \(\d+,\), its completion'):
    door.attach('x', [values[0][1:], *values[1:]])


def test_by_length_are_all_examples_the_longest_completion_last():
  examples = _examples(30)
  order = offline.OfflineDoor(examples, batch_size=4).by_length()
  longest = [max(len(completion) for completion in examples.completions[i]) for i in order]
  assert longest == sorted(longest) and sorted(order) == list(range(30))


def test_the_digest_depends_on_every_token_on_which_train_and_on_the_order():
  base = _examples(5)
  assert base.digest() == _examples(5).digest()
  others = [_examples(4), _examples(5, seed=1), _examples(5, group_size=1)]
  moved = _examples(5)
  moved.prompts[0], moved.prompts[1] = moved.prompts[1], moved.prompts[0]
  changed = _examples(5)
  changed.completions[4][1][-1] += 1
  # Where the prompt ends matters too.
  shifted = _examples(5)
  joined = np.concatenate([shifted.prompts[2], shifted.completions[2][0]])
  shifted.prompts[2] = joined[:-1]
  shifted.completions[2] = (joined[-1:], shifted.completions[2][1])
  # Log-probs that are cached are 0 where nothing trained.
  everything = [tuple(np.ones(len(c), bool) for c in group) for group in base.completions]
  masked = [tuple(mask.copy() for mask in group) for group in everything]
  masked[4][1][-1] = False
  assert _examples(5, masks=everything).digest() == base.digest()
  digests = {e.digest() for e in (base, *others, moved, changed, shifted,
                                  _examples(5, masks=masked))}
  assert len(digests) == 8


def test_the_end_token_trains_where_padding_is_the_same_id(shared_data):
  gpt2 = transformers.AutoTokenizer.from_pretrained(shared_data / 'tokenizers' / 'gpt2')
  rows = sources.load(shared_data / 'preference' / 'persona_agreeableness.jsonl', limit=40)
  door = offline.OfflineDoor(preferences.read(rows, gpt2), batch_size=8, seed=0,
                             fill=tokenizers.pad_id(gpt2))
  batch = door.batch(0)
  for tokens, mask in zip(batch.tokens, batch.loss_mask):
    assert gpt2.decode(tokens[mask]) in (' Yes<|endoftext|>', ' No<|endoftext|>')


def test_instructions_by_length(shared_data):
  gpt2 = transformers.AutoTokenizer.from_pretrained(shared_data / 'tokenizers' / 'gpt2')
  rows = sources.load(shared_data / 'instruct' / 'seed_tasks.jsonl')
  limits = examples_lib.Limits(max_prompt_tokens=256, max_completion_tokens=256)
  examples = demonstrations.read(rows, gpt2, limits=limits)
  assert examples.intake.kept + sum(examples.intake.dropped.values()) == len(rows)
  def fraction(bucket):
    door = offline.OfflineDoor(examples, batch_size=8, seed=0, bucket=bucket)
    batches = [door.batch(step) for step in range(door.steps_per_epoch)]
    return (sum(b.loss_mask.sum() + b.prompt_lengths.sum() for b in batches)
            / sum(b.tokens.size + b.prompt_tokens.size for b in batches))
  assert fraction(True) > 1.4 * fraction(False)
