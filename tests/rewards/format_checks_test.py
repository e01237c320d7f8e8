"""Format rewards accept the format and nothing near it."""

import pytest

from ptjax import config
from ptjax.rewards import format_checks


@pytest.mark.parametrize('text, expected', [
    ('<think>a</think><answer>b</answer>', 1),
    (' <think>a\nb</think>\n<answer>b</answer>\n', 1),
    ('<think></think><answer>b</answer>', 0),  # an empty thought
    ('<think>a</think><answer> </answer>', 0),
    ('<answer>b</answer><think>a</think>', 0),
    ('<think>a</think> so <answer>b</answer>', 0),
    ('<think>a</think><answer>b</answer> done', 0),
    ('<think>a</think><answer>b', 0),
    ('<think>a<answer>b</think></answer>', 0),
    ('<think>a</think><think>a</think><answer>b</answer>', 0),
    ('<think>a</think></answer>b<answer>', 0),
    ('', 0),
])
def test_think_and_answer(text, expected):
  assert format_checks.make_tags()(None, [text]) == [expected]


def test_tags_are_configurable():
  sonnets = ['<sonnet>a</sonnet>', '<think>a</think>']
  assert format_checks.make_tags('sonnet')(None, sonnets) == [1, 0]
  assert format_checks.make_tags(['a', 'b', 'c'])(None, ['<a>1</a><b>2</b><c>3</c>']) == [1]


def test_tags_on_a_huge_completion():
  reward = format_checks.make_tags()
  assert reward(None, ['<think>' * 300_000, '<think>a</think><answer>' + '<' * 10**6 + '</answer>']
                ) == [0, 1]


@pytest.mark.parametrize('tags', [(), ('',), ('a b',), (3,)])
def test_bad_tags(tags):
  with pytest.raises(config.UserError, match='expected names'):
    format_checks.make_tags(tags)


def test_regex():
  assert format_checks.make_regex(r'\d+ eggs.*')(None, ['12 eggs\nok', 'x 12 eggs']) == [1, 0]
  assert format_checks.make_regex(r'\d+ eggs', full=False)(None, ['x 12 eggs', 'eggs']) == [1, 0]
  with pytest.raises(config.UserError, match='not a regular expression'):
    format_checks.make_regex('(')
