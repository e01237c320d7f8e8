"""Where rows come from: a file, a folder, the Hugging Face hub or a built-in task.

`load` is the only way in, whatever the name stands for, and `Rows` the only thing that comes out.
The only home of `datasets`, which is imported when a Parquet file or the hub asks for it.
"""

import dataclasses
import difflib
import pathlib
import re
import socket
import urllib.parse
import urllib.request
from collections import abc

from ptjax import config
from ptjax.data import arithmetic
from ptjax.data import files
from ptjax.data import formats
from ptjax.data import mixtures
from ptjax.data import sonnets

_READERS = {'.jsonl': files.read_json_lines, '.json': files.read_json, '.csv': files.read_csv,
            '.tsv': files.read_csv, '.txt': sonnets.read}
SUFFIXES = (*_READERS, '.parquet')
TASKS = ('arithmetic',)
_SPLIT_WORDS = re.compile(
    r'(?:^|[-_. ])(?:(train(?:ing)?)|(test(?:ing)?|eval(?:uation)?)|(valid(?:ation)?|val|dev))'
    r'(?:[-_. ]|$)')


class Rows(abc.Sequence):
  """An immutable sequence of rows, each a dict with all of `columns`; a missing cell is None."""

  def __init__(self, rows, *, name, columns=None, mixture=None, numbers=None):
    """Wraps rows.

    Args:
      rows: list of dicts, or another sequence of them with `column_names`, such as a
        `datasets.Dataset`.
      name: what the user called them; errors repeat it.
      columns: further columns as functions of a row (name -> function), None for none. They win
        over the rows' own columns.
      mixture: `order.Mixture` of the rows, where they are several data sets; None for one.
      numbers: [len(rows)] int, which row of the data set each is, from 0; None: as they stand.
    """
    self.name = name
    self.mixture = mixture
    self._rows = rows
    self._derived = dict(columns or {})
    self._numbers = numbers
    own = (rows.column_names if hasattr(rows, 'column_names')
           else dict.fromkeys(key for row in rows for key in row))
    self._own = tuple(own)
    self.columns = tuple(dict.fromkeys((*own, *self._derived)))

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.select(range(*index.indices(len(self))))
    return self._finish(self._rows[range(len(self))[int(index)]])

  def __iter__(self):
    return map(self._finish, self._rows)

  def select(self, places):
    """Returns the rows at these places, in that order, still knowing their numbers."""
    places = [range(len(self))[int(place)] for place in places]
    table = hasattr(self._rows, 'select')  # a datasets.Dataset reads many rows at once
    chosen = self._rows.select(places) if table else _Chosen(self._rows, places, self._own)
    return Rows(chosen, name=self.name, columns=self._derived,
                mixture=None if self.mixture is None else self.mixture.take(places),
                numbers=[self.number(place) for place in places])

  def with_columns(self, columns):
    """Returns the same rows with further columns, functions of a row."""
    return Rows(self._rows, name=self.name, columns={**self._derived, **columns},
                mixture=self.mixture, numbers=self._numbers)

  def number(self, place):
    """Returns which row of the data set a row is, from 0."""
    return place if self._numbers is None else self._numbers[place]

  def where(self, place):
    """Names a row, for errors."""
    if hasattr(self._rows, 'where'):
      return self._rows.where(place)
    return f'{self.name}, row {self.number(place) + 1}'

  def _finish(self, row):
    result = {name: row.get(name) for name in self._own}
    return {**result, **{name: make(result) for name, make in self._derived.items()}}

  def __repr__(self):
    return f'Rows({self.name!r}, {len(self)} rows, columns {list(self.columns)})'


class _Chosen:
  """Some rows of a sequence; they are read when they are asked for."""

  def __init__(self, rows, places, names):
    self._rows, self._places = rows, places
    self.column_names = names
    if hasattr(rows, 'where'):
      self.where = lambda index: rows.where(places[index])

  def __len__(self):
    return len(self._places)

  def __getitem__(self, index):
    return self._rows[self._places[index]]

  def __iter__(self):
    return (self._rows[place] for place in self._places)


def as_rows(rows):
  """Returns `rows` as `Rows`; a plain list of dicts is wrapped."""
  return rows if isinstance(rows, Rows) else Rows(list(rows), name='the given rows')


def load(name_or_path, *, columns=None, limit=None, seed=0, lazy=False):
  """Loads rows by name.

  Args:
    name_or_path: a `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` or `.txt` file (a text is one row
      with the column `text`; numbered poems are rows of their own, see `sonnets`); a folder of
      them, with `@split` where it holds several (`train` is the default); `arithmetic`, with
      settings and split as in `arithmetic:max_operand=20,operations=+-@test`; or a hub name
      `owner/name:config@split`. Or several, as in `a.jsonl*0.7 + b.jsonl*0.3`: each batch then
      draws from them by weight (`order.Mixture`); without any weight every row of all comes once
      per epoch.
    columns: dict of our column name -> the data set's, e.g. `{'prompt': 'question'}`.
    limit: rows at most, from the start, of each data set; None for all.
    seed: chooses the rows of a built-in task.
    lazy: whether the rows of a `.jsonl` file stay on disk until they are asked for, one by one
      (Parquet and the hub's rows always do); for data that does not fit in memory. The columns are
      then those of its first thousand rows.
  Returns:
    `Rows`, at least one. Columns of a known format (`formats.recognise`) are added.
  Raises:
    UserError: nothing by that name, or nothing readable in it.
  """
  if limit is not None and limit < 1:
    raise config.UserError(f'data.limit={limit}: must be positive')
  named = mixtures.parse(str(name_or_path))
  bases = [_load_one(name, seed, limit, lazy) for name, _ in named]
  wanted = columns or {}
  known = {column for base in bases for column in base.columns}
  formats.mapping(known, wanted, str(name_or_path))  # some data set must have each column
  parts = []
  for base in bases:
    own = {ours: theirs for ours, theirs in wanted.items() if theirs in base.columns}
    parts.append(base.with_columns({**formats.recognise(base.columns),
                                    **formats.mapping(base.columns, own, base.name)}))
  if limit is not None:
    parts = [part[:limit] for part in parts]
  if len(parts) == 1:
    return parts[0]
  return Rows(mixtures.Joined(parts), name=str(name_or_path),
              mixture=mixtures.mixture(parts, [weight for _, weight in named]))


def _load_one(name, seed, limit, lazy):
  """Loads one data set as it is."""
  if name.partition('@')[0].partition(':')[0] in TASKS:
    base = _load_task(name, seed, limit)
  else:
    path, split = _local(name)
    if path is None:
      base = _load_hub(name)
    else:
      base = _load_folder(path, split, name, lazy) if path.is_dir() else _load_file(path, lazy)
  return Rows(formats.flatten(base) if isinstance(base, list) else base, name=name)


# --- built-in tasks


def _load_task(name, seed, limit):
  name, _, split = name.partition('@')
  task, _, text = name.partition(':')
  kinds = {field.name: field.type for field in dataclasses.fields(arithmetic.Arithmetic)}
  values = {}
  for part in filter(None, text.split(',')):
    key, _, value = part.partition('=')
    if key not in kinds:
      raise config.UserError(f'{task} has no setting {key!r}' + config.near_names(key, kinds))
    try:
      values[key] = kinds[key](value)
    except ValueError:
      raise config.UserError(
          f'{task}: {key}={value}: expected {kinds[key].__name__}') from None
  return arithmetic.rows(split or 'train', seed=seed, count=limit,
                         settings=arithmetic.Arithmetic(**values))


# --- files and folders


def _local(name):
  """Returns (path, split) where `name` is meant as a path, else (None, None)."""
  path, split = pathlib.Path(name).expanduser(), None
  base, at, tail = name.rpartition('@')
  if not path.exists() and at and pathlib.Path(base).expanduser().is_dir():
    path, split = pathlib.Path(base).expanduser(), tail
  if path.exists():
    return path, split
  if (path.suffix.lower() in SUFFIXES or path.is_absolute() or name.startswith(('.', '~'))
      or (path.suffix and len(path.parts) > 1 and path.parent.is_dir())):
    raise config.UserError(f'no such file or folder: {name}{_near_files(path)}')
  return None, None


def _near_files(path):
  folder = path.parent
  if not folder.is_dir():
    return f' (the folder {folder} does not exist either)'
  names = sorted(p.name for p in folder.iterdir())
  near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
  if near:
    return f'; did you mean {", ".join(str(folder / n) for n in near)}?'
  data = [n for n in names if pathlib.Path(n).suffix.lower() in SUFFIXES]
  return f'; {folder} holds {", ".join(data[:12])}' if data else f'; {folder} holds no data files'


def _load_file(path, lazy=False):
  suffix = path.suffix.lower()
  if suffix not in SUFFIXES:
    raise config.UserError(f'{path}: unknown file format {path.suffix or "without a suffix"!r}; '
                           f'expected one of {" ".join(SUFFIXES)}')
  try:
    if lazy and suffix == '.jsonl':
      return files.JsonLines(path)
    return _load_parquet([path]) if suffix == '.parquet' else _READERS[suffix](path)
  except OSError as error:
    raise config.UserError(f'{path}: cannot be read ({error.strerror or error})') from error


def _load_folder(folder, split, name, lazy=False):
  found = [p for p in sorted(folder.rglob('*')) if p.is_file() and p.suffix.lower() in SUFFIXES
           and not any(part.startswith('.') for part in p.relative_to(folder).parts)]
  # A text beside tables is their licence or a note.
  found = [p for p in found if p.suffix.lower() != '.txt'] or found
  if not found:
    raise config.UserError(f'{folder}: no data files in this folder; expected '
                           f'{" ".join(SUFFIXES)}')
  chosen = _choose_split(found, folder, split)
  suffixes = {p.suffix.lower() for p in chosen}
  if '.parquet' in suffixes:
    if len(suffixes) > 1:
      raise config.UserError(f'{name}: the folder mixes Parquet with other files; name one file')
    return _load_parquet(chosen)
  if lazy and len(chosen) == 1:
    return _load_file(chosen[0], lazy)
  parts = [_load_file(path) for path in chosen]
  columns = [sorted({key for row in part for key in row}) for part in parts]
  for path, found_columns in zip(chosen, columns):
    if found_columns != columns[0]:
      raise config.UserError(
          f'{name}: files with different columns: {chosen[0].name} has {", ".join(columns[0])}; '
          f'{path.name} has {", ".join(found_columns)}; name one file')
  return [row for part in parts for row in part]


def _choose_split(found, folder, split):
  """Keeps the files of one split, so that a folder's test rows never join its training rows."""
  groups = {}
  for path in found:
    match = _SPLIT_WORDS.search(path.stem.lower())
    kind = ('train', 'test', 'validation')[match.lastindex - 1] if match else None
    groups.setdefault(kind, []).append(path)
  named = sorted(kind for kind in groups if kind)
  if split is None:
    if not named:
      return found
    split = 'train' if 'train' in groups else named[0]
    if 'train' not in groups and len(groups) > 1:
      raise config.UserError(f'{folder}: several sets and none called train: '
                             f'{", ".join(path.name for path in found)}; name one file')
  if split not in groups:
    raise config.UserError(f'{folder}: no files of the split {split!r}'
                           + config.near_names(split, named or ['(no split in any file name)']))
  return groups[split]


def _load_parquet(paths):
  import datasets
  datasets.disable_progress_bars()
  try:
    rows = datasets.Dataset.from_parquet([str(path) for path in paths])
  except Exception as error:  # pyarrow's and datasets' own kinds
    cause = error.__cause__ or error
    raise config.UserError(f'{paths[0]}: cannot be read as Parquet ({_one_line(cause)})') from error
  if not len(rows):
    raise config.UserError(f'{paths[0]} is empty: it holds no rows')
  return rows


# --- the hub


def _load_hub(name):
  import datasets
  rest, _, split = name.partition('@')
  path, _, configuration = rest.partition(':')
  near = difflib.get_close_matches(path, TASKS, n=1)
  also = ('; nor is there a file or folder of that name'
          + (f'; did you mean the built-in task {near[0]}?' if near else
             f' (built-in tasks: {", ".join(TASKS)})'))
  if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', path):
    raise config.UserError(f'{name}: not a hub name (owner/name:config@split){also}')
  if not datasets.config.HF_HUB_OFFLINE and not _reachable(datasets.config.HF_ENDPOINT):
    raise config.UserError(
        f'{name}: the Hugging Face hub cannot be reached; set HF_HUB_OFFLINE=1 to use a copy '
        f'downloaded earlier{also}')
  datasets.disable_progress_bars()
  try:
    rows = datasets.load_dataset(path, configuration or None, split=split or 'train')
  except datasets.exceptions.DatasetNotFoundError as error:
    raise config.UserError(f'{name}: no such data set on the Hugging Face hub, or it needs '
                           f'`hf auth login`{also}') from error
  except ConnectionError as error:
    raise config.UserError(f'{name}: offline, and no copy was downloaded earlier '
                           f'({_one_line(error)}){also}') from error
  except Exception as error:  # an unknown config or split, a broken data set: its own words
    raise config.UserError(f'{name}: the hub data set cannot be loaded: {_one_line(error)}; name '
                           'config and split as in owner/name:config@split') from error
  if not len(rows):
    raise config.UserError(f'{name}: the split is empty')
  return rows


def _reachable(endpoint):
  """Asks once, as the hub's own client repeats itself for half a minute."""
  if urllib.request.getproxies():
    return True  # the proxy resolves the name, we may not be able to
  url = urllib.parse.urlparse(endpoint)
  try:
    socket.create_connection((url.hostname, url.port or 443), timeout=5).close()
  except OSError:
    return False
  return True


def _one_line(error):
  text = ' '.join(str(error).split()) or type(error).__name__
  return text if len(text) <= 300 else text[:297] + '...'
