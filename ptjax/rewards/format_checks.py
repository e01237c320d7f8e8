"""Rewards for how a completion is laid out: 1.0 where it keeps the format, else 0.0."""

import re

from ptjax import config


def make_tags(tags=('think', 'answer')):
  """Returns a reward for `<think>...</think><answer>...</answer>`, with these tags in this order.

  Every tag opens and closes exactly once, holds something besides space, and only space stands
  outside. The check walks through the text once, so no completion can make it slow.
  """
  if isinstance(tags, str):
    tags = (tags,)
  if not tags or not all(isinstance(tag, str) and re.fullmatch(r'\w+', tag) for tag in tags):
    raise config.UserError(f'tags(tags={tags!r}): expected names such as ("think", "answer")')
  marks = [mark for tag in tags for mark in (f'<{tag}>', f'</{tag}>')]

  def keeps_format(text):
    if any(text.count(mark) != 1 for mark in marks):
      return False
    end = 0
    for opening, closing in zip(marks[::2], marks[1::2]):
      start = text.find(opening, end)
      if start < 0 or text[end:start].strip():
        return False
      stop = text.find(closing, start)
      if stop < 0 or not text[start + len(opening):stop].strip():
        return False
      end = stop + len(closing)
    return not text[end:].strip()

  def tags_reward(prompts, completions, **columns):
    del prompts, columns
    return [float(keeps_format(text)) for text in completions]

  return tags_reward


def make_regex(pattern, full=True):
  """Returns a reward for completions that match `pattern`, where `.` also matches a line end.

  Args:
    pattern: a Python regular expression. It runs in the trainer's process: avoid nested
      repetitions such as `(a+)+`, which can take exponential time.
    full: True asks for a match of the whole completion, False for one anywhere.
  """
  try:
    compiled = re.compile(pattern, re.DOTALL)
  except (re.error, TypeError) as error:
    raise config.UserError(
        f'regex(pattern={pattern!r}): not a regular expression: {error}') from None
  matches = compiled.fullmatch if full else compiled.search

  def regex(prompts, completions, **columns):
    del prompts, columns
    return [float(matches(text) is not None) for text in completions]

  return regex
