"""What becomes of each row at a door: kept, shortened, or dropped for a reason that is counted."""

import collections
import dataclasses

from ptjax import config


@dataclasses.dataclass(frozen=True)
class Intake:
  """What a door did with its rows; `str()` of it is the line to log."""
  rows: int  # read
  kept: int
  truncated: int  # kept, but shortened
  dropped: dict  # reason -> rows
  pieces: int | None = None  # that the kept rows were cut into, where they are

  def __add__(self, other):
    """Returns the counts of both together."""
    pieces = None if self.pieces is None else self.pieces + (other.pieces or 0)
    return Intake(self.rows + other.rows, self.kept + other.kept, self.truncated + other.truncated,
                  dict(collections.Counter(self.dropped) + collections.Counter(other.dropped)),
                  pieces)

  def __str__(self):
    text = f'{self.rows} rows: {self.kept} kept'
    if self.pieces is not None:
      text += f' as {self.pieces} pieces'
    if self.truncated:
      text += f' ({self.truncated} truncated)'
    if self.dropped:
      reasons = ', '.join(f'{count} {reason}' for reason, count in self.dropped.items())
      text += f', {sum(self.dropped.values())} dropped ({reasons})'
    return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """One part of every row (its prompt, say) and how long it may be."""
  what: str  # 'prompt' or 'completion'
  tokens: list  # one list of ids per row
  limit: int | None  # tokens
  setting: str  # the name of that limit in the settings
  keep: str  # which end survives truncation: 'left' or 'right'
  bos: int | None = None  # a first token that survives too


class NothingLeft(config.UserError):
  """No row of a data set can be trained on."""


def empty(*whats):
  """Returns the reason to drop a row in which one of these is empty."""
  return 'with an empty ' + ' or '.join(dict.fromkeys(whats))


def admit(parts, *, overlong, name, where, dropped=None, refuse=None):
  """Applies the length limits to rows made of parts, and counts.

  Args:
    parts: tuple of `Part` over the same rows.
    overlong: `drop`, `truncate` or `error`.
    name: of the data set, for errors.
    where: function from a place among the entries to the row's name in errors.
    dropped: dict of reason -> rows that never came this far.
    refuse: `refuse(place, token lists of its parts)` looks at a row that is kept so far and
      returns a reason to drop it, or None; None refuses nothing.
  Returns:
    Places of the rows kept, one list of token lists per part, and the `Intake`.
  Raises:
    UserError: an overlong row under `error`; `NothingLeft` where no row is left.
  """
  nothing = empty(*(p.what for p in parts))
  counts = collections.Counter({nothing: 0})
  counts.update(dropped or {})
  entries = len(parts[0].tokens)
  rows = entries + sum(counts.values())
  kept, truncated, shortened = [], 0, []
  for place in range(entries):
    reasons = [f'longer than {p.setting}={p.limit}' for p in parts
               if p.limit is not None and len(p.tokens[place]) > p.limit]
    if not all(len(p.tokens[place]) for p in parts):
      counts[nothing] += 1
      continue
    if reasons and overlong == 'error':
      lengths = ', '.join(f'{p.what} {len(p.tokens[place])} tokens' for p in parts)
      raise config.UserError(
          f'{where(place)}: {reasons[0]} ({lengths}); raise the limit, or set '
          'data.overlong to drop or truncate')
    if reasons and overlong == 'drop':
      counts[reasons[0]] += 1
      continue
    tokens = [_shorten(p, p.tokens[place]) for p in parts]
    reason = refuse(place, tokens) if refuse is not None else None
    if reason is not None:
      counts[reason] += 1
      continue
    truncated += bool(reasons)
    kept.append(place)
    shortened.append(tokens)
  intake = Intake(rows=rows, kept=len(kept), truncated=truncated,
                  dropped={reason: count for reason, count in counts.items() if count})
  if not kept:
    settings = dict.fromkeys(p.setting for p in parts
                             if any(p.setting in reason for reason in intake.dropped))
    remedy = ''.join(f'; raise {setting} or set data.overlong=truncate' for setting in settings)
    raise NothingLeft(f'{name}: nothing left to train on: {intake}{remedy}')
  return kept, [list(column) for column in zip(*shortened)], intake


def _shorten(part, tokens):
  if part.limit is None or len(tokens) <= part.limit:
    return tokens
  if part.keep == 'left':
    return tokens[:part.limit]
  if part.bos is not None and tokens[0] == part.bos:
    return tokens[:1] + tokens[len(tokens) - part.limit + 1:]
  return tokens[len(tokens) - part.limit:]
