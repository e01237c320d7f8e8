import numpy as np
import pytest

from ptjax import config
from ptjax.data import examples as examples_lib
from ptjax.data import formats
from ptjax.data import preferences
from ptjax.data import prompts
from ptjax.data import sources
from ptjax.data import tokenizer as tokenizers

transformers = pytest.importorskip('transformers')

USER = {'role': 'user', 'content': 'Which colour?'}
BLUE = {'role': 'assistant', 'content': 'Blue.'}
RED = {'role': 'assistant', 'content': 'Red.'}


@pytest.fixture(scope='module')
def characters():
  tokenizer = tokenizers.characters()
  tokenizer.chat_template = (
      '{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}'
      '{% if m.role == "assistant" %}<eos>{% endif %}{% endfor %}'
      '{% if add_generation_prompt %}<a>{% endif %}')
  return tokenizer


@pytest.fixture(scope='module')
def gpt2(shared_data):
  return transformers.AutoTokenizer.from_pretrained(shared_data / 'tokenizers' / 'gpt2')


@pytest.fixture(scope='module')
def qwen(shared_data):
  return transformers.AutoTokenizer.from_pretrained(shared_data / 'tokenizers' / 'qwen')


def _texts(examples, tokenizer):
  return [(tokenizer.decode(prompt), *(tokenizer.decode(ids) for ids in group))
          for prompt, group in zip(examples.prompts, examples.completions)]


def _read(rows, tokenizer, *, want=(), demonstrations=False, **limits):
  return preferences.read(rows, tokenizer, limits=examples_lib.Limits(**limits), want=want,
                          demonstrations=demonstrations)


@pytest.mark.parametrize('row', [
    {'prompt': [USER], 'chosen': [BLUE], 'rejected': [RED]},
    {'prompt': [USER], 'chosen': 'Blue.', 'rejected': 'Red.'},
    {'prompt': [USER], 'chosen': BLUE, 'rejected': RED},
    {'prompt': [USER], 'chosen': [USER, BLUE], 'rejected': [USER, RED]},
    {'chosen': [USER, BLUE], 'rejected': [USER, RED]},
    {'prompt': None, 'chosen': [USER, BLUE], 'rejected': [USER, RED]},
    {'prompt': 'Which colour?', 'chosen': [BLUE], 'rejected': [RED]},
    {'prompt': 'Which colour?', 'chosen': [USER, BLUE], 'rejected': [USER, RED]},
    {'conversations': [{'from': 'human', 'value': 'Which colour?'}],
     'chosen': {'from': 'gpt', 'value': 'Blue.'}, 'rejected': {'from': 'gpt', 'value': 'Red.'}},
])
def test_one_pair_of_messages_in_every_spelling(characters, row, tmp_path):
  import json
  (tmp_path / 'a.json').write_text(json.dumps([row]))
  examples = _read(sources.load(tmp_path / 'a.json'), characters)
  assert _texts(examples, characters) == [('<u>Which colour?<a>', 'Blue.<eos>', 'Red.<eos>')]


@pytest.mark.parametrize('row', [
    {'prompt': 'Colour?', 'chosen': ' Blue.', 'rejected': ' Red.'},
    {'question': 'Colour?', 'response_j': ' Blue.', 'response_k': ' Red.'},
    {'question': 'Colour?', 'answer_matching_behavior': ' Blue.',
     'answer_not_matching_behavior': ' Red.', 'statement': 'x'}])
def test_one_pair_of_texts_in_every_spelling(gpt2, row, tmp_path):
  import json
  (tmp_path / 'a.jsonl').write_text(json.dumps(row))
  examples = _read(sources.load(tmp_path / 'a.jsonl'), gpt2)
  assert _texts(examples, gpt2) == [
      ('Colour?', ' Blue.<|endoftext|>', ' Red.<|endoftext|>')]


def test_an_implicit_prompt_ends_at_a_token(gpt2):
  row = {'chosen': 'The sky is blue today', 'rejected': 'The sky is blur and wet'}
  examples = _read([row], gpt2)
  # By characters they share "The sky is blu"; no token of either ends there.
  assert _texts(examples, gpt2) == [
      ('The sky is', ' blue today<|endoftext|>', ' blur and wet<|endoftext|>')]
  whole = [gpt2(text).input_ids for text in row.values()]
  for ids, completion in zip(whole, examples.completions[0]):
    assert [*examples.prompts[0], *completion] == ids + [gpt2.eos_token_id]


@pytest.mark.parametrize('row', [
    {'chosen': 'What is it? It is blue.', 'rejected': 'What is it? No idea.'},
    {'chosen': [USER, BLUE], 'rejected': [USER, RED]},
    {'chosen': [USER, BLUE, USER, RED], 'rejected': [USER, BLUE, USER, BLUE]}])
def test_implicit_prompts_as_trl_splits_them(gpt2, characters, row):
  theirs = pytest.importorskip('trl.data_utils').extract_prompt(row)
  if isinstance(theirs['prompt'], str):
    examples = _read([row], gpt2)
    assert _texts(examples, gpt2)[0][:2] == (theirs['prompt'], theirs['chosen'] + '<|endoftext|>')
  else:
    assert _texts(_read([row], characters), characters) == _texts(
        _read([theirs], characters), characters)


def test_a_pair_that_is_one_text_and_its_beginning(gpt2):
  examples = _read([{'chosen': 'I like tea.', 'rejected': 'I like tea. And rain.'}], gpt2)
  assert _texts(examples, gpt2) == [
      ('I like tea.', '<|endoftext|>', ' And rain.<|endoftext|>')]


def test_a_dialogue_that_goes_on_shares_all_but_its_last_answer(characters):
  row = {'chosen': [USER, BLUE], 'rejected': [USER, BLUE, USER, RED]}
  assert _texts(_read([row], characters), characters) == [
      ('<u>Which colour?<a>', 'Blue.<eos>', 'Blue.<eos><u>Which colour?<a>Red.<eos>')]


def test_whole_dialogues_are_split_at_the_last_answer(shared_data, gpt2):
  rows = sources.load(shared_data / 'preference' / 'hh_harmless_mild.jsonl')
  examples = _read(rows, gpt2)
  assert examples.intake.kept == 100
  for i, (prompt, chosen, rejected) in enumerate(_texts(examples, gpt2)):
    assert prompt.endswith('\n\nAssistant:')
    assert '\n\nAssistant:' not in chosen + rejected
    row = rows[examples.row_ids[i]]
    assert prompt + chosen == row['chosen'] + '<|endoftext|>'
    assert prompt + rejected == row['rejected'] + '<|endoftext|>'


def test_chat_pairs_on_a_real_tokenizer(shared_data, qwen):
  rows = sources.load(shared_data / 'preference' / 'dpo_en.json', limit=30)
  examples = _read(rows, qwen)
  sampled = prompts.PromptDoor(rows, qwen, num_prompts=30, seed=None).batch(0)
  for i, (_, chosen, rejected) in enumerate(_texts(examples, qwen)):
    row = rows[examples.row_ids[i]]
    assert chosen.endswith(row['chosen']['value'].strip() + '<|im_end|>')
    assert rejected.endswith(row['rejected']['value'].strip() + '<|im_end|>')
    # What is trained on is what will be sampled from.
    assert sampled.tokens[i][:sampled.lengths[i]].tolist() == examples.prompts[i].tolist()


def test_a_third_completion(characters):
  rows = [{'prompt': 'p', 'chosen': 'c', 'rejected': 'r', 'demonstration': 'd'}]
  examples = _read(rows, characters, demonstrations=True)
  assert _texts(examples, characters) == [('<bos>p', 'c<eos>', 'r<eos>', 'd<eos>')]
  del rows[0]['demonstration']
  examples = _read(rows, characters, demonstrations=True)
  assert _texts(examples, characters) == [('<bos>p', 'c<eos>', 'r<eos>', 'c<eos>')]
  rows = [{'chosen': [USER, BLUE], 'rejected': [USER, RED], 'demonstration': 'Green.'}]
  examples = _read(rows, characters, demonstrations=True)
  assert _texts(examples, characters)[0][3] == 'Green.<eos>'


def test_numbers_a_loss_asks_for(characters):
  rows = [{'prompt': 'p', 'chosen': 'c', 'rejected': 'r', 'margin': 1, 'score_chosen': '2.5'},
          {'prompt': 'p', 'chosen': 'c', 'rejected': 'c', 'margin': 2, 'score_chosen': '3'},
          {'prompt': 'p', 'chosen': 'c', 'rejected': 'r', 'margin': None, 'score_chosen': '3'},
          {'prompt': 'p', 'chosen': 'c', 'rejected': 'x', 'margin': 4, 'score_chosen': '4'},
          {'prompt': 'p', 'chosen': 'c', 'rejected': 'x', 'margin': 'inf', 'score_chosen': '4'}]
  examples = _read(rows, characters, want=('margins', 'chosen_scores'))
  np.testing.assert_array_equal(examples.inputs['margins'], np.float32([1, 4]))
  np.testing.assert_array_equal(examples.inputs['chosen_scores'], np.float32([2.5, 4]))
  assert examples.row_ids == [0, 3]
  assert examples.intake.dropped == {'without a number in margins': 2,
                                     'with chosen and rejected alike': 1}


@pytest.mark.parametrize('rows, options, message', [
    ([{'prompt': 'p', 'chosen': 'c', 'rejected': 'r'}], {'want': ('margins',)},
     "the given rows: the loss needs the column 'margins'; found 'prompt', 'chosen', 'rejected'; "
     'map yours with --set data.columns.margins=<your column>'),
    ([{'prompt': 'p', 'chosen': 'c', 'rejected': 'r', 'margins': 'wide'}], {'want': ('margins',)},
     "the given rows, row 1: margins: expected a number, found 'wide'"),
    ([{'prompt': 'p', 'chosen': 'c', 'rejected': 'c'}] * 2, {},
     'the given rows: nothing left to train on: 2 rows: 0 kept, 2 dropped (2 with chosen and '
     'rejected alike)'),
    ([{'prompt': 'p', 'chosen': '', 'rejected': 'c'}], {},
     'the given rows: nothing left to train on: 1 rows: 0 kept, 1 dropped (1 with an empty prompt '
     'or chosen or rejected)'),
    ([{'prompt': 'pppp', 'chosen': 'c', 'rejected': 'd'}], {'max_prompt_tokens': 4},
     'the given rows: nothing left to train on: 1 rows: 0 kept, 1 dropped (1 longer than '
     'data.max_prompt_tokens=4); raise data.max_prompt_tokens or set data.overlong=truncate'),
    ([{'prompt': 'p', 'chosen': [BLUE], 'rejected': 7}], {},
     "the given rows, row 1: a prompt is text or a list of messages {'role': ..., 'content': "
     '...}, not int 7'),
    ([{'prompt': 'p', 'good': 'c', 'rejected': 'r'}], {},
     "the given rows: preferences need the columns 'chosen' and 'rejected'; found 'prompt', "
     "'good', 'rejected'; map yours with --set data.columns.chosen=<your column>"),
    ([{'chosen': [BLUE], 'rejected': [RED]}], {},
     'the given rows: nothing left to train on: 1 rows: 0 kept, 1 dropped (1 without a prompt '
     'that chosen and rejected share)'),
])
def test_what_cannot_train_is_said_in_one_line(characters, rows, options, message):
  with pytest.raises(config.UserError) as caught:
    _read(rows, characters, **options)
  assert str(caught.value) == message


def test_no_shared_beginning_at_all(gpt2):
  with pytest.raises(config.UserError, match='without a prompt that chosen and rejected share'):
    _read([{'chosen': 'Yes', 'rejected': 'No'}], gpt2)
  rows = [{'chosen': 'Yes', 'rejected': 'No'}, {'chosen': 'I do', 'rejected': 'I do not'}]
  assert _read(rows, gpt2).row_ids == [1]


def test_a_pair_alike_once_cut_is_dropped(characters):
  rows = [{'prompt': 'p', 'chosen': 'aaaa1', 'rejected': 'aaaa2'},
          {'prompt': 'p', 'chosen': 'a', 'rejected': 'b'}]
  examples = _read(rows, characters, max_completion_tokens=3, overlong='truncate')
  assert examples.row_ids == [1]
  assert examples.intake.dropped == {'with chosen and rejected alike': 1}


def test_a_judge_sees_both_orders(characters):
  rows = [{'prompt': 'a ', 'chosen': 'good', 'rejected': 'bad'},
          {'prompt': 'a ', 'chosen': 'same', 'rejected': 'same'},
          {'prompt': 'a ', 'chosen': 'longer', 'rejected': 'bad'}]
  eos = characters.eos_token
  def read(**limits):
    return preferences.read(
        rows, characters, both_orders=True, limits=examples_lib.Limits(**limits))
  found = read()
  assert _texts(found, characters) == [
      ('<bos>a ', f'good{eos}bad{eos}', f'bad{eos}good{eos}'),
      ('<bos>a ', f'longer{eos}bad{eos}', f'bad{eos}longer{eos}')]
  assert found.inputs['labels'].tolist() == [[True, False]] * 2
  assert found.intake.dropped == {'with chosen and rejected alike': 1}
  assert read(max_completion_tokens=9).row_ids == [0]
  cut = read(max_completion_tokens=9, overlong='truncate')
  assert cut.row_ids == [0] and cut.intake.dropped['with a pair that would be cut'] == 1


def test_a_prefix_makes_pairs_of_next_steps(characters):
  row = {'prompt': '1+1+1', 'prefix': '1+1=2;', 'chosen': '2+1=3', 'rejected': '2+1=4'}
  assert _texts(_read([row], characters), characters) == [
      (characters.bos_token + '1+1+11+1=2;' if characters.bos_token else '1+1+11+1=2;',
       '2+1=3', '2+1=4')]  # no end token: a step ends no answer
  theirs = {'prompt': '1+1+1', 'initial_reason_steps': '1+1=2;', 'chosen': '2+1=3',
            'rejected': '2+1=4', 'full_chosen': '2+1=3', 'full_rejected': '2+1=4'}
  rows = sources.Rows([theirs], name='steps')
  rows = rows.with_columns(formats.recognise(rows.columns))
  assert _read(rows, characters).digest() == _read([row], characters).digest()


def test_steps_continue_an_opened_answer(characters, gpt2):
  row = {'prompt': [USER], 'prefix': 'The sky. ', 'chosen': 'Blue.', 'rejected': 'Red.'}
  first = {**row, 'prefix': ''}
  found = _texts(_read([row, first], characters), characters)
  start = characters.bos_token or ''
  assert [group[0].removeprefix(start) for group in found] == [
      '<u>Which colour?<a>The sky. ', '<u>Which colour?<a>']
  assert [group[1:] for group in found] == [('Blue.', 'Red.')] * 2
  # Where a token would reach across the seam, the step is encoded on its own.
  (pair,) = _read([{'prompt': 'x', 'prefix': ' = un', 'chosen': 'der', 'rejected': 'do'}],
                  gpt2).completions
  assert [gpt2.decode(ids) for ids in pair] == ['der', 'do']


def test_steps_that_cannot_train(characters):
  good = {'prompt': 'a', 'prefix': 'b', 'chosen': 'c', 'rejected': 'd'}
  found = _read([good, {**good, 'chosen': 'd'}, {**good, 'rejected': ''}, {**good, 'prompt': ''},
                 {**good, 'prefix': None}], characters)
  assert (found.intake.kept, sum(found.intake.dropped.values())) == (2, 3)
  with pytest.raises(config.UserError, match="a step: expected text, found"):
    _read([{**good, 'chosen': [BLUE]}], characters)
