"""Multiple choice by log-likelihood: which of a row's answers the policy finds likeliest."""

import dataclasses

import numpy as np

from ptjax.evaluation import intervals


@dataclasses.dataclass(frozen=True)
class ChoiceTask:
  """Rows with answers to choose from.

  Attributes:
    name: of its metrics.
    rows: dicts with 'prompt', 'choices' (texts that follow the prompt as they stand, a leading
      space included) and 'correct' (the place of the right one).
    positive: None, or the place of the positive answer where every row has the same answers; then
      F1 is measured instead of length-normalised accuracies.
  """
  name: str
  rows: tuple
  positive: int | None = None
  needs = (('log_likelihood',),)

  def measure(self, functions, options):
    """Returns the metrics and a record per row.

    `acc`: the likeliest answer is the right one; of equally likely ones the first counts.
    `acc_norm` and `acc_bytes`: likeliest per character and per UTF-8 byte of the answer, without
    the space before it, as in lm-evaluation-harness. `f1`: of the positive answer, absent where
    it is neither right nor chosen anywhere.
    """
    prompts = [row['prompt'] for row in self.rows for _ in row['choices']]
    answers = [choice for row in self.rows for choice in row['choices']]
    nats = functions.log_likelihood(prompts, answers).nats
    sizes = [len(row['choices']) for row in self.rows]
    per_row = np.split(np.asarray(nats, np.float64), np.cumsum(sizes)[:-1])
    correct = np.array([row['correct'] for row in self.rows])
    chosen = np.array([values.argmax() for values in per_row])
    metrics = {'acc': _accuracy(chosen, correct, options.level)}
    if self.positive is None:
      for name, length in (('acc_norm', len), ('acc_bytes', lambda text: len(text.encode()))):
        normed = [values / [max(1, length(choice.lstrip())) for choice in row['choices']]
                  for values, row in zip(per_row, self.rows)]
        picked = np.array([values.argmax() for values in normed])
        metrics[name] = _accuracy(picked, correct, options.level)
    else:
      metrics['f1'] = _f1(chosen == self.positive, correct == self.positive, options.level)
    records = [{**row, 'chosen': int(place), 'nats': [float(value) for value in values]}
               for row, place, values in zip(self.rows, chosen, per_row)]
    return metrics, records


def _accuracy(chosen, correct, level):
  return intervals.proportion((chosen == correct).astype(np.float64)[:, None], level)


def _f1(predicted, actual, level):
  """F1 = 2 TP / (2 TP + FP + FN), from bool [N]."""
  twice_hits = 2.0 * (predicted & actual)
  everything = predicted.astype(np.float64) + actual

  def f1(indices):
    total = everything[indices].sum()
    return twice_hits[indices].sum() / total if total else np.nan

  return intervals.bootstrap(f1, len(actual), level)
