import json

import pytest

from ptjax import config
from ptjax.data import chat
from ptjax.data import tokenizer as tokenizers

transformers = pytest.importorskip('transformers')

USER = {'role': 'user', 'content': 'What is 2+2?'}


def _where(place):
  return f'file, row {place + 1}'


def _open(shared_data, folder):
  return transformers.AutoTokenizer.from_pretrained(shared_data / folder)


@pytest.fixture(scope='module')
def qwen(shared_data):
  return _open(shared_data, 'tokenizers/qwen')


@pytest.fixture(scope='module')
def gpt2(shared_data):
  return _open(shared_data, 'tokenizers/gpt2')


@pytest.fixture(scope='module')
def stories(shared_data):
  return _open(shared_data, 'models/stories260K')


def _pairs(tokenizer, questions, answers, **options):
  end_ids = options.pop('end_ids', None) or tokenizers.eos_ids(tokenizer)
  texts, prompts, completions = chat.groups(
      tokenizer, questions, [(answer,) for answer in answers], end_ids=end_ids, where=_where)
  return texts, prompts, [one for one, in completions]


@pytest.mark.parametrize('name', ['gpt2', 'qwen', 'stories'])
def test_text_is_encoded_as_published(request, shared_data, name):
  golden = json.loads((shared_data / 'tokenizers' / 'golden_encodings.json').read_text())
  entries = golden['stories260K' if name == 'stories' else name]
  texts, ids = chat.prompts(
      request.getfixturevalue(name), [entry['text'] for entry in entries], where=_where)
  assert ids == [entry['ids'] for entry in entries]
  assert texts == [entry['text'] for entry in entries]


def test_messages_are_rendered_as_published(shared_data, qwen):
  golden = json.loads((shared_data / 'tokenizers' / 'golden_encodings.json').read_text())
  entries = golden['qwen_chat']
  texts, ids = chat.prompts(qwen, [entry['messages'] for entry in entries], where=_where)
  assert texts == [entry['text'] for entry in entries]
  assert ids == [entry['ids'] for entry in entries]


def test_texts_and_messages_may_be_mixed(qwen):
  texts, ids = chat.prompts(qwen, ['Hi', [USER], 'Ho'], where=_where)
  assert (texts[0], texts[2]) == ('Hi', 'Ho')
  assert ids[1] == qwen.encode(texts[1], add_special_tokens=False)
  assert (ids[0], ids[2]) == (qwen.encode('Hi'), qwen.encode('Ho'))


def test_an_opened_answer_is_continued(qwen):
  (text,), _ = chat.prompts(qwen, [[USER, {'role': 'assistant', 'content': 'It is'}]], where=_where)
  assert text.endswith('It is')


def test_messages_in_other_spellings():
  assert chat.messages([{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]) == [
      {'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
  assert chat.messages([{**USER, 'tool_calls': None}]) == [USER]
  for value in ('text', None, [], ['a'], [{'content': 'a'}], [{'role': 'user'}], 7, {'role': 'a'}):
    assert chat.messages(value) is None


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt():
  ending = tokenizers.characters('ab')
  from tokenizers import processors
  ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
      single='<bos> $A <eos>', special_tokens=[('<bos>', 1), ('<eos>', 2)])
  assert ending('ab').input_ids == [1, 4, 5, 2]
  assert chat.prompts(ending, ['ab', 'a<eos>'], where=_where)[1][0] == [1, 4, 5]
  _, prompts, completions = _pairs(ending, ['a'], ['b'])
  assert (prompts, completions) == ([[1, 4]], [[5, 2]])


def test_completion_continues_the_prompt_and_ends(gpt2, stories):
  for tokenizer in (gpt2, stories):
    _, (prompt,), (completion,) = _pairs(
        tokenizer, ['Once upon a time'], [', there was a dog.'])
    assert prompt == tokenizer('Once upon a time').input_ids
    assert prompt + completion == (
        tokenizer('Once upon a time, there was a dog.').input_ids + [tokenizer.eos_token_id])


def test_a_token_across_the_seam_is_split(gpt2, stories):
  # ' 42' would be one token; the prompt ends with the space, as it will when sampling.
  _, (prompt,), (completion,) = _pairs(gpt2, ['Answer: '], ['42'])
  assert prompt == gpt2('Answer: ').input_ids
  assert completion == gpt2('42').input_ids + [gpt2.eos_token_id]
  # SentencePiece puts a space before a first word; a continuation must not get one.
  _, (prompt,), (completion,) = _pairs(stories, ['Once up'], ['on a time'])
  assert prompt == stories('Once up').input_ids
  assert stories.decode(prompt + completion[:-1], skip_special_tokens=True) == 'Once upon a time'


def test_the_end_token_is_not_doubled():
  tokenizer = tokenizers.characters('ab')
  assert _pairs(tokenizer, ['a', 'a', 'a'], ['b', 'b<eos>', 'a<eos>b'])[2] == [
      [5, 2], [5, 2], [4, 2, 5, 2]]


def test_a_chat_answer_ends_with_the_template_s_own_end(qwen):
  answers = ['It is 4.', [{'role': 'assistant', 'content': 'It is 4.'}]]
  texts, prompts, completions = _pairs(qwen, [[USER], [USER]], answers)
  assert completions[0] == completions[1]
  assert completions[0][-1] == qwen.eos_token_id == qwen.convert_tokens_to_ids('<|im_end|>')
  assert qwen.decode(completions[0]).endswith('It is 4.<|im_end|>')
  assert prompts[0] == qwen.encode(texts[0], add_special_tokens=False)


def test_a_template_without_end_token_gets_one(qwen):
  plain = tokenizers.characters()
  plain.chat_template = ('{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}'
                         '{% if add_generation_prompt %}a:{% endif %}')
  texts, prompts, completions = _pairs(plain, [[USER]], ['4'])
  assert texts == ['u:What is 2+2?\na:']
  assert plain.decode(completions[0]) == '4\n<eos>'
  assert plain.bos_token_id not in prompts[0]  # a template writes its own special tokens


def _error(function, *args, **options):
  with pytest.raises(config.UserError) as caught:
    function(*args, **options)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_messages_need_a_template(gpt2):
  message = _error(chat.prompts, gpt2, ['text', [USER]], where=_where)
  assert message.startswith('file, row 2 is a list of messages, but the tokenizer ')
  assert message.endswith(
      'tokenizers/gpt2 has no chat template; name one with --set=data.chat_template=FILE.jinja '
      "(the trained model keeps it), use a chat model's tokenizer, or give prompts as text")


def test_a_template_of_the_users_own(tmp_path):
  (tmp_path / 'chat.jinja').write_text(
      '{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}')
  tokenizer = chat.with_template(tokenizers.characters(), tmp_path / 'chat.jinja')
  texts, _ = chat.prompts(tokenizer, [[USER]], where=_where)
  assert texts == [f'<user>{USER["content"]}']
  assert chat.with_template(tokenizers.characters(), None).chat_template is None


def test_a_prompt_of_the_wrong_kind(qwen):
  assert _error(chat.prompts, qwen, ['a', 7], where=_where) == (
      "file, row 2: a prompt is text or a list of messages {'role': ..., 'content': ...}, "
      'not int 7')
  assert 'not list [{\'text\': \'a\'}]' in _error(
      chat.prompts, qwen, [[{'text': 'a'}]], where=_where)


def test_a_completion_of_the_wrong_kind(qwen):
  assert _error(_pairs, qwen, ['a'], [7]) == (
      'file, row 1: after a prompt given as text a completion must be text, not int 7')
  assert _error(_pairs, qwen, [[USER]], [7]) == (
      'file, row 1: a completion is text or a list of messages, not int 7')


def test_a_template_s_refusal_is_passed_on():
  strict = tokenizers.characters()
  strict.chat_template = "{{ raise_exception('roles must alternate') }}"
  assert _error(chat.prompts, strict, [[USER]], where=_where) == (
      'file, row 1: the chat template refuses these messages: roles must alternate')


def test_a_template_that_rewrites_the_prompt():
  odd = tokenizers.characters()
  odd.chat_template = '{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}'
  assert 'the chat template writes the prompt differently once the answer follows' in _error(
      _pairs, odd, [[USER]], ['4'])
