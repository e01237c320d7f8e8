"""What a teacher reads in the place of the prompt."""

import pytest

from ptjax import config as settings
from ptjax.data import tokenizer as tokenizers
from ptjax.training import privileged

TOKENIZER = tokenizers.characters(tokenizers.PRINTABLE)


def prompts(values, texts, template='{prompt}? {privileged}!', max_tokens=64):
  found = privileged.teacher_prompts(
      TOKENIZER, values, texts, template=template, max_tokens=max_tokens)
  return [TOKENIZER.decode(row[:length], skip_special_tokens=True) for row, length in zip(
      found['teacher_prompt_tokens'], found['teacher_prompt_lengths'])]


def test_prompts_are_rewritten_where_there_is_something_to_show():
  assert prompts(['1+1', '2+2'], ['two', None]) == ['1+1? two!', '2+2']


def test_braces_of_prompts_and_texts_are_theirs():
  assert prompts(['{x} {privileged}', 'a'], ['{prompt}', 'b']) == [
      '{x} {privileged}? {prompt}!', 'a? b!']


def test_no_room_is_said():
  with pytest.raises(settings.UserError, match='has 10 tokens, but there is room for 8'):
    prompts(['1+1'], ['two'], max_tokens=8)
