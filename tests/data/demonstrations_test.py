import jax
import numpy as np
import pytest

from ptjax import config
from ptjax.data import arithmetic
from ptjax.data import demonstrations
from ptjax.data import examples
from ptjax.data import offline
from ptjax.data import prompts
from ptjax.data import sources
from ptjax.data import tokenizer as tokenizers

transformers = pytest.importorskip('transformers')


@pytest.fixture(scope='module')
def characters():
  return tokenizers.characters()


def _read(rows, tokenizer, *, end_ids=None, **limits):
  return demonstrations.read(
      rows, tokenizer, limits=examples.Limits(**limits), end_ids=end_ids)


def _door(rows, tokenizer, *, batch_size=4, seed=1, bucket=False, **options):
  return offline.OfflineDoor(_read(rows, tokenizer, **options), batch_size=batch_size, seed=seed,
                             fill=tokenizers.pad_id(tokenizer), bucket=bucket)


def _completion(batch, i):
  return batch.tokens[i][batch.loss_mask[i]].tolist()


def test_a_batch_of_arithmetic(characters):
  rows = arithmetic.rows('train', count=20)
  door = _door(rows, characters)
  batch = door.batch(3)
  assert batch.prompt_tokens.shape == batch.tokens.shape == batch.loss_mask.shape == (4, 8)
  assert batch.loss_mask.dtype == bool and batch.tokens.dtype == np.int32
  for place, i in enumerate(door.order.indices(3)):
    row = rows[door.examples.row_ids[i]]
    prompt = batch.prompt_tokens[place][:batch.prompt_lengths[place]].tolist()
    assert prompt == characters(row['prompt']).input_ids
    assert _completion(batch, place) == characters.encode(
        row['completion'], add_special_tokens=False) + [characters.eos_token_id]


def test_the_end_token_trains_even_where_it_is_the_padding(shared_data):
  gpt2 = transformers.AutoTokenizer.from_pretrained(shared_data / 'tokenizers' / 'gpt2')
  gpt2.pad_token = gpt2.eos_token
  batch = _door([{'prompt': 'Q:', 'completion': ' a'}, {'prompt': 'Q:', 'completion': ' a b c'}],
                gpt2, batch_size=2, seed=None).batch(0)
  np.testing.assert_array_equal(batch.loss_mask.sum(1), [2, 4])
  for i in range(2):
    assert _completion(batch, i)[-1] == gpt2.eos_token_id
  assert (batch.tokens[~batch.loss_mask] == gpt2.eos_token_id).all()


def test_batch_is_a_pure_function_of_the_step(characters):
  rows = arithmetic.rows('train', count=30)
  door = _door(rows, characters)
  straight = [door.batch(step) for step in range(10)]
  resumed = _door(rows, characters)
  for step in (9, 2, 7):
    jax.tree.map(np.testing.assert_array_equal, resumed.batch(step), straight[step])
  other = _door(rows, characters, seed=2)
  assert any((a.tokens != other.batch(step).tokens).any() for step, a in enumerate(straight))


def test_overlong_rows_are_dropped_and_counted_by_reason(characters):
  rows = [{'prompt': 'a' * 9, 'completion': 'b'}, {'prompt': 'a', 'completion': 'b' * 9},
          {'prompt': 'a' * 9, 'completion': 'b' * 9}, {'prompt': 'a', 'completion': ''},
          {'prompt': 'a', 'completion': 'b'}]
  found = _read(rows, characters, max_prompt_tokens=8, max_completion_tokens=6)
  assert found.row_ids == [4]
  assert str(found.intake) == (
      '5 rows: 1 kept, 4 dropped (1 with an empty prompt or completion, '
      '2 longer than data.max_prompt_tokens=8, 1 longer than rollout.max_completion_tokens=6)')


def test_a_cut_completion_does_not_teach_stopping(characters):
  rows = [{'prompt': 'a' * 9, 'completion': 'bcdefghij'}, {'prompt': 'a', 'completion': 'bcdef'}]
  door = _door(rows, characters, max_prompt_tokens=8, max_completion_tokens=6, batch_size=2,
               overlong='truncate', seed=None)
  batch = door.batch(0)
  assert str(door.intake) == '2 rows: 2 kept (1 truncated)'
  assert characters.decode(_completion(batch, 0)) == 'bcdefg'
  assert characters.decode(_completion(batch, 1)) == 'bcdef<eos>'
  assert batch.prompt_tokens[0].tolist() == (
      [characters.bos_token_id] + characters.encode('a' * 7, add_special_tokens=False))


def test_overlong_as_an_error(characters):
  with pytest.raises(config.UserError, match=(
      r'row 1: longer than rollout.max_completion_tokens=2 \(prompt 2 tokens, completion 4 '
      r'tokens\); raise the limit')):
    _read([{'prompt': 'a', 'completion': 'bbb'}], characters, max_completion_tokens=2,
          overlong='error')


def test_nothing_left(characters):
  with pytest.raises(config.UserError, match=(
      'nothing left to train on: 1 rows: 0 kept, 1 dropped .*; raise '
      'rollout.max_completion_tokens or set data.overlong=truncate')):
    _read([{'prompt': 'a', 'completion': 'bbb'}], characters, max_completion_tokens=2)


def test_conversations(shared_data):
  qwen = transformers.AutoTokenizer.from_pretrained(shared_data / 'tokenizers' / 'qwen')
  rows = sources.load(shared_data / 'preference' / 'kto_en.json', limit=6)
  door = _door(rows, qwen, batch_size=6, seed=None)
  batch = door.batch(0)
  sampled = prompts.PromptDoor(rows, qwen, num_prompts=6, seed=None).batch(0)
  for i, row in enumerate(rows):
    text = qwen.decode(_completion(batch, i))
    assert text.endswith(row['messages'][-1]['content'].strip() + '<|im_end|>')
    assert text.count('<|im_end|>') == 1
  # What is trained on is what will be sampled from.
  np.testing.assert_array_equal(batch.prompt_lengths, sampled.lengths)
  for trained, drawn, length in zip(batch.prompt_tokens, sampled.tokens, sampled.lengths):
    np.testing.assert_array_equal(trained[:length], drawn[:length])


def test_conversation_without_an_answer_is_dropped(shared_data):
  qwen = transformers.AutoTokenizer.from_pretrained(shared_data / 'tokenizers' / 'qwen')
  user, assistant = ({'role': role, 'content': 'x'} for role in ('user', 'assistant'))
  found = _read([{'messages': [user]}, {'messages': [user, assistant, user]}], qwen)
  assert found.row_ids == [1]
  assert found.intake.dropped == {'with an empty prompt or completion': 1}


def test_gsm8k_with_a_chosen_end_token(shared_data):
  stories = transformers.AutoTokenizer.from_pretrained(shared_data / 'models' / 'stories260K')
  rows = sources.load(shared_data / 'gsm8k' / 'train.jsonl', limit=20)
  batch = _door(rows, stories, end_ids=(1, 2), batch_size=20, seed=None).batch(0)
  for i, row in enumerate(rows):
    completion = _completion(batch, i)
    assert completion[-1] == 1 and 2 not in completion
    assert row['answer'] in stories.decode(completion).rpartition('####')[2].replace(',', '')


def test_wrong_columns_say_how_to_map(characters):
  with pytest.raises(config.UserError) as caught:
    _read([{'question': 'a', 'solution': 'b'}], characters)
  assert str(caught.value) == (
      "the given rows: demonstrations need the columns 'prompt' and 'completion' or 'messages'; "
      "found 'question', 'solution'; map yours with --set data.columns.prompt=question "
      '--set data.columns.completion=solution')


def test_no_end_token():
  endless = tokenizers.characters('ab')
  endless.eos_token = None
  with pytest.raises(config.UserError, match='has no end token'):
    _read([{'prompt': 'a', 'completion': 'b'}], endless)


def test_cells_of_the_wrong_kind(characters):
  with pytest.raises(config.UserError, match='the given rows, row 2: after a prompt given as text '
                     'a completion must be text, not int 7'):
    _read([{'prompt': 'a', 'completion': 'b'}, {'prompt': 'a', 'completion': 7}], characters)
  with pytest.raises(config.UserError, match='row 1: a prompt is text or a list of messages .*, '
                     "not list \\['a'\\]"):
    _read([{'messages': ['a']}], characters)
