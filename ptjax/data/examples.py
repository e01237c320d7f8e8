"""Offline data once read: prompts, their completions, and what a loss wants to know of them.

Every offline door (demonstrations, preferences, unpaired, stepwise, plain_text) returns the same
`Examples`; `offline.OfflineDoor` and `packing.PackedDoor` make batches of them.
"""

import collections
import dataclasses
import hashlib
from typing import Any

import numpy as np

from ptjax.data import formats
from ptjax.data import intake as intake_lib
from ptjax.data import sources
from ptjax.data import tokenizer as tokenizers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """How long the parts of an example may be."""
  max_prompt_tokens: int | None = None  # None for no limit
  max_completion_tokens: int | None = None  # with the end token
  overlong: str = 'drop'  # `drop`, `truncate` or `error`; a prompt loses its left end, a completion
  # its right end and with it the end token: where the text was cut, stopping is not taught


@dataclasses.dataclass(frozen=True)
class Examples:
  """N examples: a prompt each, and G completions of it in an order that the door fixes."""
  prompts: list  # N int32 arrays of ids, none empty
  completions: list  # N tuples of G int32 arrays of ids, none empty
  row_ids: list  # N; the data set's row, from 0
  intake: intake_lib.Intake
  masks: list | None = None  # N tuples of G bool arrays: which completion tokens train; None: all
  inputs: dict = dataclasses.field(default_factory=dict)  # name -> [N, ...] or [N, G] array
  per_token: dict = dataclasses.field(default_factory=dict)  # name -> N tuples of G arrays
  limits: Limits = Limits()  # those it was read under
  mixture: Any = None  # order.Mixture of the N examples, or None

  def __len__(self):
    return len(self.prompts)

  @property
  def group_size(self):
    """G, completions per prompt."""
    return len(self.completions[0])

  def mask(self, place, which):
    """Returns the [T] bool mask of a completion."""
    if self.masks is None:
      return np.ones(len(self.completions[place][which]), bool)
    return self.masks[place][which]

  def lengths(self):
    """Returns the tokens of prompts [N] and of completions [N, G]."""
    return (np.array([len(p) for p in self.prompts]),
            np.array([[len(c) for c in group] for group in self.completions]))

  def digest(self):
    """Returns a hex digest of prompts, completions and which tokens train, in their order."""
    found = hashlib.sha256()
    for place, (prompt, group) in enumerate(zip(self.prompts, self.completions)):
      for ids in (prompt, *group):
        found.update(len(ids).to_bytes(8, 'little'))
        found.update(ids.astype('<i4').tobytes())
      for which in range(len(group)):
        found.update(np.packbits(self.mask(place, which)).tobytes())
      found.update(b'end')
    return found.hexdigest()


class Reader:
  """What the doors share: rows, limits, end tokens, and the count of what was dropped.

  A door looks at each row and calls `keep` or `drop`; then it encodes what was kept and calls
  `admit`, which applies the limits.
  """

  def __init__(self, rows, door, tokenizer, *, limits, end_ids=None, want=()):
    """Starts reading.

    Args:
      rows: `sources.Rows` or a list of dicts.
      door: a key of formats.FORMATS, which says what columns there must be.
      tokenizer: a Hugging Face tokenizer.
      limits: Limits.
      end_ids: ids that end a completion; None asks the tokenizer.
      want: names of numeric columns that become inputs.
    Raises:
      UserError: a column of the door's, or a wanted one, is missing, or no end token is known.
    """
    self.rows = sources.as_rows(rows)
    self.format = formats.require(self.rows, door)  # the names of the columns it was found by
    self.tokenizer = tokenizer
    self.limits = limits
    self.end_ids = tokenizers.eos_ids(tokenizer) if end_ids is None else tuple(end_ids)
    self.kept = []  # row numbers
    self.dropped = collections.Counter()
    self._numbers = formats.numbers(self.rows, want)

  def where(self, place):
    """Names the `place`-th of the kept rows, for errors."""
    return self.row_name(self.kept[place])

  def row_name(self, row_id):
    """Names a row, for errors."""
    return self.rows.where(row_id)

  def keep(self, row_id, *empty, parts):
    """Keeps a row unless one of its parts, or of the numbers a loss wants, is missing.

    Args:
      row_id: its number.
      *empty: values that must not be empty.
      parts: the words for them.
    Returns:
      Whether it was kept.
    """
    if any(value is None or (hasattr(value, '__len__') and not len(value)) for value in empty):
      self.drop(intake_lib.empty(*parts))
      return False
    for name, values in self._numbers.items():
      if np.isnan(values[row_id]):
        self.drop(f'without a number in {name}')
        return False
    self.kept.append(row_id)
    return True

  def drop(self, reason):
    """Counts a row that is not used."""
    self.dropped[reason] += 1

  def numbers(self, row_ids):
    """Returns the wanted numbers of some rows: name -> [rows] float32."""
    return {name: values[row_ids].astype(np.float32) for name, values in self._numbers.items()}

  def admit(self, prompts, completions, *, names, masks=None, inputs=None, per_token=None,
            refuse=None):
    """Applies the limits to what was kept.

    Args:
      prompts: id lists of the kept rows.
      completions: tuples of G id lists.
      names: G words for the completions, e.g. ('chosen', 'rejected').
      masks: tuples of G bool lists, or None.
      inputs: name -> one value per kept row.
      per_token: name -> (tuples of G lists, dtype).
      refuse: `refuse(place, completions)` returns a reason to drop a row whose G completions (id
        lists within the limits) cannot train, or None.
    Returns:
      Examples.
    Raises:
      UserError: an overlong row under `error`, or nothing left.
    """
    group_size = len(names)
    parts = [intake_lib.Part(
        what='prompt', tokens=prompts, limit=self.limits.max_prompt_tokens, keep='right',
        setting='data.max_prompt_tokens', bos=self.tokenizer.bos_token_id)]
    for g, name in enumerate(names):
      parts.append(intake_lib.Part(
          what=name, tokens=[group[g] for group in completions], keep='left',
          limit=self.limits.max_completion_tokens, setting='rollout.max_completion_tokens'))

    def refused(place, tokens):
      if masks is not None and not any(
          any(mask[:len(own)]) for mask, own in zip(masks[place], tokens[1:])):
        return 'with no token to train on'
      return refuse(place, tokens[1:]) if refuse is not None else None

    kept, (prompts, *columns), intake = intake_lib.admit(
        tuple(parts), overlong=self.limits.overlong, name=self.rows.name, where=self.where,
        dropped=self.dropped, refuse=refused)
    row_ids = [self.kept[place] for place in kept]
    lengths = [[len(columns[g][i]) for g in range(group_size)] for i in range(len(kept))]

    def cut(groups, dtype):
      return [tuple(np.array(values[:length], dtype)
                    for values, length in zip(groups[place], lengths[i]))
              for i, place in enumerate(kept)]

    chosen = {name: np.asarray([values[place] for place in kept])
              for name, values in (inputs or {}).items()}
    chosen.update(self.numbers(row_ids))
    return Examples(
        prompts=[np.array(ids, np.int32) for ids in prompts],
        completions=[tuple(np.array(ids, np.int32) for ids in group) for group in zip(*columns)],
        row_ids=row_ids, intake=intake, inputs=chosen,
        masks=None if masks is None else cut(masks, bool),
        per_token={name: cut(*values) for name, values in (per_token or {}).items()},
        limits=self.limits,
        mixture=None if self.rows.mixture is None else self.rows.mixture.take(row_ids))
