import numpy as np
import pytest

from ptjax import config
from ptjax.data import examples as examples_lib
from ptjax.data import plain_text
from ptjax.data import tokenizer as tokenizers

transformers = pytest.importorskip('transformers')


@pytest.fixture(scope='module')
def characters():
  return tokenizers.characters()


def _join(examples):
  """Each document again, from its pieces."""
  documents = {}
  for prompt, (completion,), row in zip(examples.prompts, examples.completions, examples.row_ids):
    documents.setdefault(row, list(prompt)).extend(completion)
  return documents


@pytest.mark.parametrize('tokens', [2, 3, 7, 8, 9, 100])
def test_every_token_but_the_first_is_a_target_once(characters, tokens):
  texts = ['abcdef', 'a', 'abcdefghijklmnopqrstuvwxyz']
  examples = plain_text.read([{'text': text} for text in texts], characters, tokens=tokens)
  assert _join(examples) == {
      i: characters(text).input_ids + [characters.eos_token_id] for i, text in enumerate(texts)}
  lengths = [len(p) + len(c) for p, (c,) in zip(examples.prompts, examples.completions)]
  assert max(lengths) <= tokens and all(len(p) == 1 for p in examples.prompts)
  assert all(len(c) for c, in examples.completions)
  # A piece begins with the last token of the one before.
  for i in range(1, len(examples)):
    if examples.row_ids[i] == examples.row_ids[i - 1]:
      assert examples.prompts[i][0] == examples.completions[i - 1][0][-1]
  assert str(examples.intake) == f'3 rows: 3 kept as {len(examples)} pieces'


def test_real_text_on_a_real_tokenizer(shared_data):
  gpt2 = transformers.AutoTokenizer.from_pretrained(shared_data / 'tokenizers' / 'gpt2')
  text = (shared_data / 'shakespeare' / 'tinyshakespeare.txt').read_text()[:100_000]
  limits = examples_lib.Limits(max_prompt_tokens=100, max_completion_tokens=28)
  examples = plain_text.read([{'text': text}], gpt2, limits=limits)
  assert gpt2.decode(_join(examples)[0]) == text + '<|endoftext|>'
  assert {len(c) for c, in examples.completions[:-1]} == {127}  # pieces of 128 tokens


def test_empty_texts_are_dropped(characters):
  examples = plain_text.read([{'text': ''}, {'text': 'ab'}, {'text': None}], characters)
  assert str(examples.intake) == '3 rows: 1 kept as 1 pieces, 2 dropped (2 with an empty text)'
  assert examples.row_ids == [1]


def test_what_cannot_train_is_said_in_one_line(characters):
  for rows, message in (
      ([{'text': ''}], 'nothing left to train on: 1 rows: 0 kept as 0 pieces, 1 dropped'),
      ([{'text': 7}], 'the given rows, row 1: expected text, not int'),
      ([{'content': 'x'}], "texts need the columns 'text' or 'prompt' and 'completion'; found "
       "'content'; map yours with --set data.columns.text=content")):
    with pytest.raises(config.UserError) as caught:
      plain_text.read(rows, characters)
    assert message in str(caught.value) and '\n' not in str(caught.value)


def test_prompt_and_completion_make_a_document(characters):
  rows = [{'prompt': 'ab', 'completion': 'cd'}, {'prompt': 'e', 'completion': None}]
  examples = plain_text.read(rows, characters)
  assert [characters.decode(ids, skip_special_tokens=True) for ids in _join(examples).values()] == [
      'abcd', 'e']


def test_a_document_that_ends_already_gets_no_second_end(characters):
  examples = plain_text.read([{'text': 'ab<eos>'}], characters)
  assert examples.completions[0][0].tolist().count(characters.eos_token_id) == 1
  np.testing.assert_array_equal(examples.prompts[0], [characters.bos_token_id])
