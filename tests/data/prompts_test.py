import numpy as np
import pytest

from ptjax import config
from ptjax.data import prompts
from ptjax.data import sources
from ptjax.data import tokenizer as tokenizers

transformers = pytest.importorskip('transformers')


@pytest.fixture(scope='module')
def characters():
  return tokenizers.characters()


def _rows(count):
  return [{'prompt': 'x' * (1 + i % 6), 'answer': i, 'completions': None} for i in range(count)]


def _same(a, b):
  for name in ('tokens', 'lengths', 'ids', 'sample_ids'):
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
  assert (a.prompts, a.texts, a.columns) == (b.prompts, b.texts, b.columns)


def test_a_batch_holds_tokens_texts_and_columns(characters):
  door = prompts.PromptDoor(_rows(10), characters, num_prompts=4, group_size=3, seed=1)
  batch = door.batch(0)
  assert batch.tokens.shape == (4, 8)
  assert batch.tokens.dtype == batch.lengths.dtype == batch.ids.dtype == np.int32
  assert batch.sample_ids.dtype == np.int32
  np.testing.assert_array_equal(batch.sample_ids, [[0, 1, 2]] * 4)
  for i in range(4):
    row = batch.ids[i]
    assert batch.columns['answer'][i] == row
    assert batch.texts[i] == batch.prompts[i] == 'x' * (1 + row % 6)
    ids = characters(batch.texts[i]).input_ids
    assert batch.lengths[i] == len(ids)
    assert batch.tokens[i].tolist() == ids + [characters.pad_token_id] * (8 - len(ids))
  # Names that a reward function has as arguments of its own do not come a second time.
  assert set(batch.columns) == {'answer'}


def test_batch_is_a_pure_function_of_the_step(characters):
  door = prompts.PromptDoor(_rows(10), characters, num_prompts=4, seed=1)
  straight = [door.batch(step) for step in range(8)]
  resumed = prompts.PromptDoor(_rows(10), characters, num_prompts=4, seed=1)
  for step in (7, 3, 5, 3):
    _same(resumed.batch(step), straight[step])
  other = prompts.PromptDoor(_rows(10), characters, num_prompts=4, seed=2)
  assert [b.ids.tolist() for b in straight] != [other.batch(s).ids.tolist() for s in range(8)]


def test_every_prompt_comes_once_per_epoch(characters):
  door = prompts.PromptDoor(_rows(10), characters, num_prompts=5, seed=1)
  assert door.steps_per_epoch == 2 and len(door) == 10
  assert [door.epoch(step) for step in range(3)] == [0.0, 0.5, 1.0]
  for epoch in range(2):
    ids = np.concatenate([door.batch(2 * epoch + step).ids for step in range(2)])
    assert sorted(ids) == list(range(10))


def test_more_prompts_than_rows_repeat_with_new_samples(characters):
  door = prompts.PromptDoor(_rows(3), characters, num_prompts=7, group_size=2, seed=0)
  batch = door.batch(0)
  drawn = [(int(row), int(sample)) for row, samples in zip(batch.ids, batch.sample_ids)
           for sample in samples]
  assert len(set(drawn)) == len(drawn) == 14
  assert sorted(np.unique(batch.ids, return_counts=True)[1]) == [2, 2, 3]


def test_rows_in_order_for_evaluation(characters):
  door = prompts.PromptDoor(_rows(5), characters, num_prompts=2, seed=None)
  assert [door.batch(step).ids.tolist() for step in range(3)] == [[0, 1], [2, 3], [4, 0]]
  assert door.take([4]).ids.tolist() == [4]


@pytest.mark.parametrize('overlong, ids', [
    ('drop', [0, 1, 2]), ('truncate', [0, 1, 2, 3, 4, 5])])
def test_overlong_prompts_are_counted(characters, overlong, ids):
  # With the token that begins a text, prompt i has i + 2 tokens.
  rows = [{'prompt': 'abcdef'[:i + 1]} for i in range(6)]
  door = prompts.PromptDoor(rows, characters, num_prompts=6, max_prompt_tokens=4, seed=None,
                            overlong=overlong)
  assert sorted(set(door.batch(0).ids.tolist())) == ids
  if overlong == 'drop':
    assert str(door.intake) == (
        '6 rows: 3 kept, 3 dropped (3 longer than data.max_prompt_tokens=4)')
    assert door.batch(0).tokens.shape == (6, 4)  # a bucket never exceeds the limit
  else:
    assert str(door.intake) == '6 rows: 6 kept (3 truncated)'
    batch = door.batch(0)
    last = characters.encode('def', add_special_tokens=False)
    assert batch.tokens[5].tolist() == [characters.bos_token_id] + last
    assert batch.texts[5] == '<bos>def' and batch.prompts[5] == 'abcdef'


def test_overlong_as_an_error_names_the_row(characters):
  with pytest.raises(config.UserError, match='the given rows, row 4: longer than '
                     r'data.max_prompt_tokens=4 \(prompt 5 tokens\); raise the limit'):
    prompts.PromptDoor([{'prompt': 'a' * (i + 1)} for i in range(6)], characters, num_prompts=1,
                       max_prompt_tokens=4, overlong='error')


def test_empty_cells_are_dropped_and_ids_stay_the_rows_own(characters):
  rows = [{'prompt': None}, {'prompt': 'a'}, {'prompt': ''}, {'prompt': 'b'}]
  door = prompts.PromptDoor(rows, characters, num_prompts=2, seed=None)
  assert door.batch(0).ids.tolist() == [1, 3]
  assert str(door.intake) == '4 rows: 2 kept, 2 dropped (2 with an empty prompt)'


def test_nothing_left(characters):
  with pytest.raises(config.UserError, match=(
      r'the given rows: nothing left to train on: 3 rows: 0 kept, 3 dropped \(1 with an empty '
      r'prompt, 2 longer than data.max_prompt_tokens=2\); raise data.max_prompt_tokens')):
    prompts.PromptDoor([{'prompt': 'aaa'}, {'prompt': ''}, {'prompt': 'bbb'}], characters,
                       num_prompts=1, max_prompt_tokens=2)


def test_wrong_columns_say_how_to_map(characters, tmp_path):
  path = tmp_path / 'mine.csv'
  path.write_text('query,gold\na,b\n')
  with pytest.raises(config.UserError) as caught:
    prompts.PromptDoor(sources.load(path), characters, num_prompts=1)
  assert str(caught.value) == (
      f"{path}: prompts need the columns 'prompt' or 'messages'; found 'query', 'gold'; map yours "
      'with --set data.columns.prompt=query')
  door = prompts.PromptDoor(sources.load(path, columns={'prompt': 'query'}), characters,
                            num_prompts=1)
  assert door.batch(0).texts == ['a']
  assert door.batch(0).columns == {'query': ['a'], 'gold': ['b']}


def test_an_unknown_column_cannot_be_guessed(characters):
  with pytest.raises(config.UserError, match="found 'x'; map yours with --set "
                     'data.columns.prompt=<your column>'):
    prompts.PromptDoor([{'x': 'a'}], characters, num_prompts=1)


def test_conversations_lose_the_closing_answer(shared_data):
  qwen = transformers.AutoTokenizer.from_pretrained(shared_data / 'tokenizers' / 'qwen')
  rows = sources.load(shared_data / 'preference' / 'kto_en.json', limit=5)
  door = prompts.PromptDoor(rows, qwen, num_prompts=5, seed=None)
  batch = door.batch(0)
  for row, prompt, text in zip(rows, batch.prompts, batch.texts):
    assert row['messages'][-1]['role'] == 'assistant'
    assert prompt[-1] == row['messages'][-2] and prompt[-1]['role'] == 'user'
    assert text.endswith('<|im_start|>assistant\n')
    assert row['messages'][-1]['content'] not in text
  assert set(batch.columns) == {'messages', 'label'}


def test_sharegpt_conversations_as_prompts(shared_data):
  qwen = transformers.AutoTokenizer.from_pretrained(shared_data / 'tokenizers' / 'qwen')
  rows = sources.load(shared_data / 'preference' / 'dpo_en.json', limit=3,
                      columns={'prompt': 'conversations'})
  batch = prompts.PromptDoor(rows, qwen, num_prompts=3, seed=None).batch(0)
  assert batch.texts[0].startswith("<|im_start|>user\nHi! I'd like to create a new language game")


def test_gsm8k_on_the_real_tokenizer(shared_data):
  stories = transformers.AutoTokenizer.from_pretrained(shared_data / 'models' / 'stories260K')
  rows = sources.load(shared_data / 'gsm8k' / 'train.jsonl', limit=200)
  door = prompts.PromptDoor(rows, stories, num_prompts=8, max_prompt_tokens=128, seed=0)
  assert door.intake.kept + sum(door.intake.dropped.values()) == 200
  assert 0 < door.intake.kept < 200
  batch = door.batch(2)
  assert batch.tokens.shape[1] <= 128 and (batch.tokens[:, 0] == stories.bos_token_id).all()
  for row, answer, question in zip(batch.ids, batch.columns['answer'], batch.columns['question']):
    assert rows[int(row)]['answer'] == answer and rows[int(row)]['question'] == question
