"""Judges: which of two completions is better, or how good one is, in a language model's words.

A pairwise judge is anything with `compare(prompts, first, second) -> P(first wins)`, [N] float64
with NaN where it has no verdict. `Judge` puts the question to a model, an endpoint or a local one,
through a function of conversations; `from_scores` makes one of a reward model.
"""

import dataclasses
import re
from typing import Callable

import numpy as np

from ptjax.rewards import verdicts

_PAIR = '''Compare two answers to the same prompt{rubric}.

[Prompt]
{prompt}
[End of prompt]

[Answer A]
{first}
[End of answer A]

[Answer B]
{second}
[End of answer B]

Which answer is better? Neither their order nor their length counts. End your reply with your \
verdict in double brackets: [[A]], [[B]], or [[C]] where neither is better.'''

_SINGLE = '''Rate an answer to a prompt{rubric}.

[Prompt]
{prompt}
[End of prompt]

[Answer]
{completion}
[End of answer]

End your reply with a whole number from 1 (useless) to 10 (could not be better) in double \
brackets, for example [[5]].'''

_BRACKETS = re.compile(r'\[\[\s*(.*?)\s*\]\]')
_OUTCOMES = {'a': 1.0, 'b': 0.0, 'c': 0.5, 'tie': 0.5}


@dataclasses.dataclass(frozen=True)
class Judge:
  """A language model as judge.

  Attributes:
    ask: `ask(conversations) -> replies`, a list of texts with None for what got no reply; a
      conversation is a list of messages {'role', 'content'}.
    identity: what makes its verdicts its own, for the cache: address, model, temperature.
    cache: verdicts.Verdicts, or None to ask every time.
    rubric: what to judge by, e.g. 'how polite it is'; '' leaves that to the model.
    collective: whether all processes must ask together, all of them for all rows.
    report: counts since the last `take_report`: `asked`, `cached`, `failed` (no reply),
      `unreadable` (a reply without a verdict).
  """
  ask: Callable
  identity: str = ''
  cache: object = None
  rubric: str = ''
  collective: bool = False
  report: dict = dataclasses.field(default_factory=dict)

  def compare(self, prompts, first, second):
    """Asks which completion is better, in both orders, since models favour a place.

    Args:
      prompts: N texts or message lists.
      first, second: N texts each.
    Returns:
      [N] float64, P(first wins): the mean of the orders that gave a verdict, each 1, 0 or ½ for a
      tie; ½ without asking where both texts are the same; NaN without a verdict. Source of the
      swap: arXiv:2306.05685, section 3.4.
    """
    rows = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    pair = lambda i, a, b: _PAIR.format(rubric=self._rubric, prompt=plain(prompts[i]),
                                        first=a, second=b)
    outcomes = self._outcomes([pair(i, first[i], second[i]) for i in rows]
                              + [pair(i, second[i], first[i]) for i in rows], read_verdict)
    orders = np.stack([outcomes[:len(rows)], 1.0 - outcomes[len(rows):]], axis=-1)  # [n, 2]
    seen = ~np.isnan(orders)
    sums = np.where(seen, orders, 0.0).sum(-1)
    chances = np.full(len(first), 0.5)
    chances[rows] = np.where(seen.any(-1), sums / np.maximum(seen.sum(-1), 1), np.nan)
    return chances

  def rate(self, prompts, completions):
    """Asks how good each completion is.

    Returns:
      [N] float64 from 0 (rated 1) to 1 (rated 10); NaN without a rating.
    """
    return self._outcomes(
        [_SINGLE.format(rubric=self._rubric, prompt=plain(prompt), completion=completion)
         for prompt, completion in zip(prompts, completions, strict=True)], read_rating)

  def take_report(self):
    """Returns what was counted since the last call."""
    counts = {name: count for name, count in self.report.items() if count}
    self.report.clear()
    return counts

  @property
  def _rubric(self):
    return f' by this alone: {self.rubric}' if self.rubric else ''

  def _outcomes(self, questions, read):
    """Numbers read from the replies to `questions`, each asked once; [N] with NaN for none."""
    known = {}
    if self.cache is not None:
      known = {q: self.cache.get(verdicts.key(self.identity, q)) for q in questions}
    new = [q for q in dict.fromkeys(questions) if known.get(q) is None]
    replies = self.ask([[{'role': 'user', 'content': q}] for q in new]) if new else []
    found = {q: None if reply is None else read(reply)
             for q, reply in zip(new, replies, strict=True)}
    self._count('asked', len(new))
    self._count('cached', len(set(questions)) - len(new))
    self._count('failed', sum(reply is None for reply in replies))
    self._count('unreadable', sum(reply is not None and found[q] is None
                                  for q, reply in zip(new, replies)))
    if self.cache is not None:
      self.cache.add({verdicts.key(self.identity, q): value
                      for q, value in found.items() if value is not None})
    values = {q: found[q] if q in found else known[q] for q in questions}
    return np.array([np.nan if values[q] is None else values[q] for q in questions], np.float64)

  def _count(self, what, number):
    self.report[what] = self.report.get(what, 0) + number


@dataclasses.dataclass(frozen=True)
class ScoreJudge:
  """A reward model as judge: P(first wins) = σ(score difference), as Bradley and Terry have it.

  Attributes:
    score: `score(prompts, completions) -> [N]`, logits.
    collective: as `Judge`'s.
  """
  score: Callable
  collective: bool = True

  def compare(self, prompts, first, second):
    """As `Judge.compare`."""
    scores = np.asarray(self.score([*prompts, *prompts], [*first, *second]), np.float64)
    gap = scores[:len(first)] - scores[len(first):]
    return 1.0 / (1.0 + np.exp(-np.clip(gap, -500.0, 500.0)))

  def take_report(self):
    """Nothing is counted."""
    return {}


class JudgeReward:
  """A reward function of a judge's ratings: 0 to 1, None without one."""

  def __init__(self, judge):
    self._judge = judge
    self.collective = judge.collective
    self.__name__ = 'judge'

  def __call__(self, prompts, completions, *, raw_prompts=None):
    ratings = self._judge.rate(prompts if raw_prompts is None else raw_prompts, completions)
    return [None if np.isnan(rating) else float(rating) for rating in ratings]

  def take_report(self):
    """Returns what the judge counted."""
    return self._judge.take_report()


def read_verdict(reply):
  """Returns 1 for A, 0 for B, ½ for a tie, None where a reply has no verdict.

  The last one in double brackets counts; without brackets, a reply that is nothing but a letter.
  """
  marked = _BRACKETS.findall(reply)
  return _OUTCOMES.get((marked[-1] if marked else reply.strip(' \t\r\n.*"\'()')).lower())


def read_rating(reply):
  """Returns a rating of 1 to 10 as 0 to 1; None where a reply has none."""
  marked = _BRACKETS.findall(reply)
  text = marked[-1] if marked else reply.strip(' \t\r\n.*"\'()')
  if not re.fullmatch(r'\d+(\.\d+)?', text) or not 1 <= float(text) <= 10:
    return None
  return (float(text) - 1.0) / 9.0


def plain(prompt):
  """A prompt as text for a judge: messages as `role: content`."""
  if isinstance(prompt, str):
    return prompt
  return '\n'.join(f'{message["role"]}: {message.get("content", "")}' for message in prompt)
