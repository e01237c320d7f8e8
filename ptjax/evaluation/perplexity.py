"""How well a policy predicts text: nats per token and per byte, and perplexity."""

import dataclasses

import numpy as np

from ptjax.evaluation import intervals


@dataclasses.dataclass(frozen=True)
class PerplexityTask:
  """Rows whose text, or whose completion after its prompt, is predicted.

  Attributes:
    name: of its metrics.
    rows: dicts with 'text', or with 'prompt' and 'completion' (then the end token after the
      completion counts too, as it does in training).
  """
  name: str
  rows: tuple
  needs = (('log_likelihood',),)

  def measure(self, functions, options):
    """Returns the metrics of `measure` and a record per row."""
    return measure(self.rows, functions.log_likelihood, options.level)


def measure(rows, log_likelihood, level):
  """Returns `nats_per_token`, `nats_per_byte` and `perplexity`, and a record per row.

  Sums over all rows are divided, so long rows count for more; the rows are what is drawn, or, of a
  single row, the windows it is read in. `perplexity` is exp(nats_per_token), its interval that of
  the exponent. Bytes are those of the UTF-8 text, whatever the tokenizer, and absent where
  completions are messages.
  """
  whole = 'text' in rows[0]
  prompts = ['' if whole else row['prompt'] for row in rows]
  texts = [row['text' if whole else 'completion'] for row in rows]
  found = log_likelihood(prompts, texts, end=not whole)
  nats, tokens = found.windows if len(rows) == 1 else (found.nats, found.tokens)
  nats, tokens = -np.asarray(nats, np.float64), np.asarray(tokens, np.float64)
  per_token = intervals.ratio(nats, tokens, level)
  metrics = {'nats_per_token': per_token, 'perplexity': intervals.Metric(
      float(np.exp(per_token.value)), float(np.exp(per_token.value) * per_token.se),  # delta method
      float(np.exp(per_token.low)), float(np.exp(per_token.high)))}
  if all(isinstance(text, str) for text in texts):
    sizes = np.array([len(text.encode()) for text in texts])
    if len(rows) == 1:
      sizes = sizes[0] * tokens / tokens.sum()  # a window's own bytes are not known
    metrics['nats_per_byte'] = intervals.ratio(nats, sizes, level)
  records = [{**row, 'nats': -float(value), 'tokens': int(count)}
             for row, value, count in zip(rows, found.nats, found.tokens)]
  return metrics, records
