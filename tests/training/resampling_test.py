"""Groups that teach nothing give way to others; those that teach stay where they are."""

import numpy as np

from ptjax import types
from ptjax.data import prompts as prompt_door
from ptjax.rewards import combine
from ptjax.training import resampling

G = 2


def drawn(merits, start=0, width=3, prompt_width=4):
  """Groups with these rewards; row i says `start + i` everywhere."""
  merits = np.asarray(merits, float)
  count, rows = len(merits) // G, len(merits)
  number = lambda n, *shape: (start + np.arange(n)).reshape(-1, *(1 for _ in shape)) + np.zeros(
      (1, *shape), int)
  prompts = prompt_door.PromptBatch(
      tokens=number(count, prompt_width), lengths=number(count), ids=number(count),
      sample_ids=number(count, G), prompts=[f'p{start + i}' for i in range(count)],
      texts=[f't{start + i}' for i in range(count)],
      columns={'answer': [f'a{start + i}' for i in range(count)]})
  rollouts = types.Rollouts(tokens=number(rows, width), loss_mask=np.ones((rows, width), bool),
                            log_probs=-1.0 * number(rows, width), truncated=np.zeros(rows, bool))
  table = combine.RewardTable(names=('r',), values=merits[:, None], total=merits,
                              scored=~np.isnan(merits), report={'r/none': 1}, seconds={})
  return resampling.Drawn(prompts, rollouts, {'mark': number(rows)},
                          [f'c{start + i}' for i in range(rows)], table, merits)


def test_tied_groups():
  nan = np.nan
  assert resampling.tied(drawn([0, 1, 1, 1, nan, 1, nan, nan])).tolist() == [
      False, True, True, True]


def test_what_teaches_fills_the_places_in_order():
  old = drawn([1, 1, 0, 1, 0, 0, 1, 0])  # groups 0 and 2 are tied
  fresh = drawn([2, 2, 2, 0, 0, 2, 3, 4], start=100, width=5, prompt_width=2)  # group 0 is
  filled, count = resampling.fill(old, fresh)
  assert count == 2
  assert filled.prompts.ids.tolist() == [101, 1, 102, 3]
  assert filled.prompts.prompts == ['p101', 'p1', 'p102', 'p3']
  assert filled.prompts.columns['answer'] == ['a101', 'a1', 'a102', 'a3']
  assert filled.prompts.tokens.shape == (4, 4)
  assert filled.completions == ['c102', 'c103', 'c2', 'c3', 'c104', 'c105', 'c6', 'c7']
  assert filled.rollouts.tokens[:, 0].tolist() == [102, 103, 2, 3, 104, 105, 6, 7]
  # Padded to the wider of the two, the padding off the mask.
  assert filled.rollouts.loss_mask.sum(1).tolist() == [5, 5, 3, 3, 5, 5, 3, 3]
  assert filled.known['mark'].tolist() == [102, 103, 2, 3, 104, 105, 6, 7]
  assert filled.table.total.tolist() == filled.merits.tolist() == [2, 0, 0, 1, 0, 2, 1, 0]
  assert filled.table.report == {'r/none': 2}
  assert not resampling.tied(filled).any()
  assert old.prompts.ids.tolist() == [0, 1, 2, 3]  # untouched


def test_too_few_that_teach_leave_places_vacant():
  filled, count = resampling.fill(drawn([1, 1, 0, 0, 1, 0]), drawn([0, 0, 1, 2], start=50))
  assert count == 1
  assert filled.prompts.ids.tolist() == [51, 1, 2]
  assert resampling.tied(filled).tolist() == [False, True, False]
