import numpy as np
import pytest

from ptjax import config
from ptjax.data import demonstrations
from ptjax.data import examples as examples_lib
from ptjax.data import sources
from ptjax.data import tokenizer as tokenizers
from ptjax.data import turns

transformers = pytest.importorskip('transformers')

PLAIN = ('{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}'
         '{% if m.role == "assistant" %}<eos>{{ "\n" }}{% endif %}{% endfor %}'
         '{% if add_generation_prompt %}<a>{% endif %}')
MARKED = ('{% for m in messages %}<{{ m.role[0] }}>{% if m.role == "assistant" %}'
          '{% generation %}{{ m.content }}<eos>{% endgeneration %}{{ "\n" }}'
          '{% else %}{{ m.content }}{% endif %}{% endfor %}'
          '{% if add_generation_prompt %}<a>{% endif %}')
TALK = [{'role': 'system', 'content': 'S'}, {'role': 'user', 'content': 'one'},
        {'role': 'assistant', 'content': 'two'}, {'role': 'user', 'content': 'three'},
        {'role': 'assistant', 'content': 'four'}]


@pytest.fixture
def characters():
  return tokenizers.characters()


def _where(place):
  return f'file, row {place + 1}'


def _encode(tokenizer, *talks):
  return turns.encode(tokenizer, talks, end_ids=tokenizers.eos_ids(tokenizer), where=_where)


def _trained(tokenizer, one):
  """The texts of the runs of tokens that train."""
  runs, last = [], False
  for token, mask in zip(one.completion, one.mask):
    if mask:
      runs = runs + [[]] if not last else runs
      runs[-1].append(token)
    last = mask
  return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize('template', [PLAIN, MARKED])
def test_every_assistant_turn_trains_with_its_end(characters, template):
  characters.chat_template = template
  one, = _encode(characters, TALK)
  assert characters.decode(one.prompt) == '<s>S<u>one<a>'
  assert characters.decode(one.completion) == 'two<eos>\n<u>three<a>four<eos>'
  assert _trained(characters, one) == ['two<eos>', 'four<eos>']


def test_markers_decide_where_the_template_has_them(characters):
  characters.chat_template = MARKED.replace('{{ m.content }}<eos>{% endgeneration %}',
                                            '{{ m.content }}{% endgeneration %}<eos>')
  one, = _encode(characters, TALK)
  assert _trained(characters, one) == ['two', 'four']


def test_a_template_without_end_tokens(characters):
  characters.chat_template = PLAIN.replace('<eos>', '')
  one, = _encode(characters, TALK)
  assert _trained(characters, one) == ['two\n', 'four\n<eos>']


def test_a_template_that_changes_the_words(characters):
  characters.chat_template = PLAIN.replace('{{ m.content }}', '{{ m.content | lower }}')
  one, = _encode(characters, TALK)
  assert _trained(characters, one) == ['two<eos>', 'four<eos>']


def test_a_token_across_the_edge_of_a_turn_is_split(shared_data):
  gpt2 = transformers.AutoTokenizer.from_pretrained(shared_data / 'tokenizers' / 'gpt2')
  gpt2.chat_template = ('{% for m in messages %}{{ m.role }}: {{ m.content }}{{ "\n" }}{% endfor %}'
                        '{% if add_generation_prompt %}assistant: {% endif %}')
  one, = _encode(gpt2, TALK)
  # The prompt ends with the space, as it will when sampling: " two" is not one token here.
  assert one.prompt == gpt2('system: S\nuser: one\nassistant: ').input_ids
  assert one.completion[:1] == gpt2('two').input_ids
  assert gpt2.decode(one.prompt + one.completion) == (
      'system: S\nuser: one\nassistant: two\nuser: three\nassistant: four\n<|endoftext|>')
  assert _trained(gpt2, one) == ['two\n', 'four\n<|endoftext|>']


def test_ids_are_those_of_the_rendered_conversation(shared_data):
  qwen = transformers.AutoTokenizer.from_pretrained(shared_data / 'tokenizers' / 'qwen')
  rows = sources.load(shared_data / 'preference' / 'kto_en.json')
  talks = [row['messages'] for row in rows if len(row['messages']) > 2]
  assert len(talks) > 20
  for talk, one in zip(talks, _encode(qwen, *talks)):
    whole = qwen.apply_chat_template(talk, tokenize=True)['input_ids']
    ours = one.prompt + one.completion
    assert list(whole[:len(ours)]) == ours
    assert qwen.decode(whole[len(ours):]) == '\n'
    texts = _trained(qwen, one)
    spoken = [m['content'] for m in talk[1:] if m['role'] == 'assistant']
    assert len(texts) == len(spoken)
    for text, content in zip(texts, spoken):
      assert text.endswith('<|im_end|>') and content.strip() in text
      # The last turn has an empty thought, which this template leaves out of earlier ones.
      assert text.replace('<think>\n\n</think>\n\n', '').strip() == content.strip() + '<|im_end|>'


def test_the_masks_of_markers_are_transformers_own(shared_data):
  qwen = transformers.AutoTokenizer.from_pretrained(shared_data / 'tokenizers' / 'qwen')
  qwen.chat_template = MARKED.replace('<eos>', '<|im_end|>')
  rows = sources.load(shared_data / 'preference' / 'kto_en.json', limit=30)
  for row, one in zip(rows, _encode(qwen, *[row['messages'] for row in rows])):
    theirs = qwen.apply_chat_template(row['messages'], tokenize=True, return_dict=True,
                                      return_assistant_tokens_mask=True)
    mask = np.array([False] * len(one.prompt) + one.mask)
    np.testing.assert_array_equal(mask, np.array(theirs['assistant_masks'][:len(mask)], bool))
    assert not any(theirs['assistant_masks'][len(mask):])


def test_what_cannot_be_told_apart_is_dropped_with_the_reason(characters):
  characters.chat_template = PLAIN
  user, assistant = TALK[1:3]
  found = _encode(characters, [user], [assistant], [user, assistant, assistant])
  assert found == [turns.NOT_MESSAGES, turns.NOT_MESSAGES, turns.NOT_KEPT_APART]
  # A template that numbers its turns from the end writes every prefix differently.
  characters.chat_template = PLAIN.replace('<{{ m.role[0] }}>', '{{ loop.revindex }}:')
  assert _encode(characters, TALK) == [turns.NOT_KEPT_APART]


def test_an_opening_assistant_turn_is_context(characters):
  characters.chat_template = PLAIN
  one, = _encode(characters, [{'role': 'assistant', 'content': 'hi'}, *TALK[1:3]])
  assert characters.decode(one.prompt) == '<a>hi<eos>\n<u>one<a>'
  assert _trained(characters, one) == ['two<eos>']


def test_the_door_counts_and_cuts(characters):
  characters.chat_template = PLAIN
  rows = [{'messages': TALK}, {'messages': TALK[:2]}, {'messages': None}, {'messages': TALK[1:]}]
  found = demonstrations.read(rows, characters, turns='all')
  assert found.row_ids == [0, 3]
  assert found.intake.dropped == {'with an empty prompt or completion': 1, turns.NOT_MESSAGES: 1}
  limits = examples_lib.Limits(max_completion_tokens=6, overlong='truncate')
  cut = demonstrations.read(rows, characters, turns='all', limits=limits)
  assert [len(group[0]) for group in cut.completions] == [6, 6]
  assert cut.masks[0][0].tolist() == [True] * 4 + [False] * 2


def test_a_row_whose_trained_tokens_were_all_cut_is_dropped(characters):
  characters.chat_template = MARKED
  # The first turn is marked as the user's; only the last one trains, behind the limit.
  characters.chat_template = MARKED.replace('m.role == "assistant"',
                                            'm.role == "assistant" and loop.last')
  found = demonstrations.read([{'messages': TALK}], characters, turns='all')
  assert found.masks[0][0].tolist() == [True] * 5
  reader = examples_lib.Reader([{'text': 'x'}], 'text', characters, limits=examples_lib.Limits(
      max_completion_tokens=2, overlong='truncate'))
  reader.keep(0, 'x', parts=('x',))
  with pytest.raises(config.UserError, match='1 dropped \\(1 with no token to train on\\)'):
    reader.admit([[4]], [([5, 6, 7],)], names=('completion',), masks=[([False, False, True],)])


def test_messages_of_the_wrong_kind(characters):
  characters.chat_template = PLAIN
  with pytest.raises(config.UserError, match='file, row 1: a prompt is text or .*, not list'):
    _encode(characters, ['a'])
  characters.chat_template = None
  with pytest.raises(config.UserError, match='has no chat template'):
    _encode(characters, TALK)
