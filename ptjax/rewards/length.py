"""Rewards for how long a completion is."""

from ptjax import config

UNITS = ('characters', 'words', 'tokens')


def make_length(target=100, unit='characters'):
  """Returns a reward that is 1 at `target` and falls linearly to 0 at 0 and at twice the target.

  Args:
    target: the wanted length, in `unit`; positive.
    unit: 'characters' (Unicode code points), 'words' (separated by white space) or 'tokens', for
      which the caller passes the column `completion_ids` (a list of token ids per completion).
  """
  if unit not in UNITS:
    raise config.UserError(f'length(unit={unit!r}): expected one of {", ".join(UNITS)}')
  if not isinstance(target, (int, float)) or not 0 < target < float('inf'):
    raise config.UserError(f'length(target={target!r}): expected a positive number of {unit}')

  def closeness(size):
    return max(0.0, 1.0 - abs(size - target) / target)

  def length(prompts, completions, **columns):
    del prompts, columns
    return [closeness(len(text.split() if unit == 'words' else text)) for text in completions]

  def length_in_tokens(prompts, completions, *, completion_ids, **columns):
    del prompts, completions, columns
    return [closeness(len(ids)) for ids in completion_ids]

  return length_in_tokens if unit == 'tokens' else length
