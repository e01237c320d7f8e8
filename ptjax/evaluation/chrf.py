"""chrF of continuations: the character n-gram F-score, by sacrebleu.

The score of a corpus is not the mean of its texts' scores: sacrebleu adds up the n-gram counts of
all texts first. So do we, and resample the texts' counts for an interval.
"""

import numpy as np

from ptjax import config


def make_chrf(*, whole=False, char_order=6, word_order=0, beta=2):
  """Returns a corpus scorer, `f(rows, completions) -> statistic of row indices`, 0 to 100.

  Args:
    whole: whether the prompt counts too, on both sides. It is what the CS224n sonnet task
      reports; three given lines of fourteen lift the score of any continuation.
    char_order, word_order, beta: as in sacrebleu, whose defaults these are.
  Raises:
    config.UserError: sacrebleu is not installed.
  Source: Popović 2015, chrF.
  """
  try:
    from sacrebleu import metrics
  except ImportError as error:
    raise config.UserError('chrF needs sacrebleu; install it with `python -m pip install '
                           'sacrebleu` (it is in the extra `eval`)') from error
  metric = metrics.CHRF(char_order=char_order, word_order=word_order, beta=beta)

  def scorer(rows, completions):
    def counts(text, row):
      prompt = row['prompt'] if whole else ''
      # One text's counts [3 * order] are all that sacrebleu's corpus score adds up.
      return metric._extract_corpus_statistics(
          [prompt + text], [[prompt + row['completion']]])[0]

    per_row = np.array([np.sum([counts(text, row) for text in texts], axis=0)
                        for row, texts in zip(rows, completions)])  # [P, 3 * order]
    return lambda indices: metric._compute_f_score(per_row[indices].sum(axis=0).tolist())

  return scorer
