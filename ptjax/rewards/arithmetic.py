"""Exact integer answers, without any tolerance. The gold answer is the column `answer`."""

from ptjax.rewards import numerals


def strict(prompts, completions, *, answer, **columns):
  """1.0 where the completion is the answer and nothing else (surrounding space aside), else 0.0.

  Args:
    prompts: ignored.
    completions: list of str.
    answer: list of int or str, the integers expected; None gives no opinion.
  Returns:
    list of 1.0, 0.0 or None.
  """
  del prompts, columns
  return [None if gold is None else float(completion.strip() == _integer(gold))
          for completion, gold in zip(completions, answer, strict=True)]


def flexible(prompts, completions, *, answer, **columns):
  """As `strict`, for the last number anywhere in the completion."""
  del prompts, columns
  return [None if gold is None else float(vote(completion) == _integer(gold))
          for completion, gold in zip(completions, answer, strict=True)]


def vote(completion):
  """Returns the last number in `completion`, spelled canonically, or None."""
  number = numerals.last_number(completion)
  return None if number is None else numerals.canonical(number)


def _integer(gold):
  number = numerals.canonical(str(gold))
  if number is None or '.' in number:
    raise ValueError(f'the answer {gold!r} is not an integer')
  return number
