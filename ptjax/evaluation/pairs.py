"""Preference pairs: does a reward, explicit or implicit in a policy, agree with them?"""

import dataclasses

import numpy as np

from ptjax.evaluation import intervals

_BINS = 10  # of the calibration error


@dataclasses.dataclass(frozen=True)
class PairTask:
  """Held-out pairs.

  Attributes:
    name: of its metrics.
    rows: dicts with 'prompt', 'chosen' and 'rejected', texts or messages.
    beta: scales the implicit reward, β (log π - log π_reference), as in training.
  """
  name: str
  rows: tuple
  beta: float = 0.1
  needs = (('score',), ('log_likelihood',))

  def measure(self, functions, options):
    """Returns the metrics and a record per row.

    From a reward model's scores, or from the implicit reward where there is a reference:
    `acc` (the chosen answer has the larger reward), `margin` (mean of chosen minus rejected),
    `loss` (mean -log σ(margin), nats), `ece` (see `calibration_error`). From a policy:
    `acc_likelihood` and `acc_likelihood_per_token`, how often the chosen answer is the likelier
    one, in total and per token; neither needs a reference.
    """
    prompts = [row['prompt'] for row in self.rows] * 2
    answers = [row['chosen'] for row in self.rows] + [row['rejected'] for row in self.rows]
    metrics, margin, level = {}, None, options.level
    if functions.score is not None:
      margin = _gap(functions.score(prompts, answers))
    else:
      found = functions.log_likelihood(prompts, answers, end=True)
      metrics['acc_likelihood'] = _above_zero(_gap(found.nats), level)
      metrics['acc_likelihood_per_token'] = _above_zero(_gap(found.nats / found.tokens), level)
      if functions.reference_log_likelihood is not None:
        reference = functions.reference_log_likelihood(prompts, answers, end=True)
        margin = self.beta * _gap(found.nats - reference.nats)
    if margin is None:
      return metrics, [dict(row) for row in self.rows]
    metrics |= {
        'acc': _above_zero(margin, level),
        'margin': intervals.mean(margin[:, None], level),
        'loss': intervals.mean(np.logaddexp(0.0, -margin)[:, None], level),
        'ece': intervals.bootstrap(
            lambda indices: calibration_error(margin[indices]), len(margin), level)}
    return metrics, [{**row, 'margin': float(value)} for row, value in zip(self.rows, margin)]


def calibration_error(margins, bins=_BINS):
  """Returns the expected calibration error of σ(margin) as the chance of being right.

  A pair's answer is the one with the larger reward, with confidence σ(|margin|), at least 1/2.
  The bins share [1/2, 1] equally; each adds |its accuracy - its mean confidence|, by its share of
  the pairs. A margin of 0 is a fair coin and half right. With few pairs per bin the error is
  biased upwards: a perfectly calibrated reward shows more than 0.

  Args:
    margins: [N] rewards of the chosen answers minus those of the rejected.
    bins: how many.
  Source: Naeini, Cooper and Hauskrecht 2015; Guo et al., arXiv:1706.04599, eq. 3.
  """
  confidence = 1.0 / (1.0 + np.exp(-np.abs(margins)))
  correct = np.where(margins == 0, 0.5, margins > 0)
  places = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
  gaps = np.bincount(places, weights=correct - confidence, minlength=bins)  # count * difference
  return float(np.abs(gaps).sum() / len(margins))


def _gap(values):
  """What the first half of [2 N] values has over the second, [N]."""
  chosen, rejected = np.split(np.asarray(values, np.float64), 2)
  return chosen - rejected


def _above_zero(gaps, level):
  return intervals.proportion((gaps > 0).astype(np.float64)[:, None], level)
