"""What devices send each other in a compiled program, read from its text."""

import collections
import math
import re

# kind -> bytes a device receives per byte of the result, of a ring over n devices.
_TRAFFIC = {
    'all-gather': lambda n: (n - 1) / n,
    'all-reduce': lambda n: 2 * (n - 1) / n,
    'reduce-scatter': lambda n: n - 1,
    'all-to-all': lambda n: (n - 1) / n,
    'collective-permute': lambda n: 1,
}
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4,
          'f32': 4, 's64': 8, 'u64': 8, 'f64': 8}

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{$')
_COLLECTIVE = re.compile(
    r'\s*(?:ROOT )?%?[\w.-]+ = (.*?) (' + '|'.join(_TRAFFIC) + r')(-start)?\(')
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_BODY = re.compile(r'body=%?([\w.-]+)')
_CALLED = re.compile(r'(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_SHAPE = re.compile(r'\b(\w+)\[([\d,]*)\]')


def bytes_received(text):
  """Adds up collectives, one in a loop as often as the loop runs.

  Args:
    text: `compiled.as_text()`.
  Returns:
    dict kind -> bytes each device receives. A loop without a known number of turns counts once,
    and of a branch all arms count.
  """
  computations, entry = _computations(text)
  total = collections.Counter()

  def walk(name, times):
    for line in computations.get(name, ()):
      match = _COLLECTIVE.match(line)
      if match:
        shapes, kind, started = match.groups()
        total[kind] += times * _TRAFFIC[kind](_group_size(line)) * _size(shapes, kind, started)
        continue
      body = _BODY.search(line)
      if body:
        trips = _TRIPS.search(line)
        walk(body[1], times * (int(trips[1]) if trips else 1))
        continue
      for called in _CALLED.findall(line):
        walk(called, times)
      for branches in _BRANCHES.findall(line):
        for branch in branches.split(','):
          walk(branch.strip().lstrip('%'), times)
  walk(entry, 1)
  return dict(total)


def shapes(text, kind):
  """Yields the shape of every array that the collectives of a kind, e.g. 'all-gather', give."""
  for line in text.splitlines():
    match = _COLLECTIVE.match(line)
    if match and match[2] == kind:
      found = [tuple(int(d) for d in dims.split(',') if d) for _, dims in _SHAPE.findall(match[1])]
      yield from _results(found, kind, match[3])


def _results(found, kind, started):
  """Of what a collective lists, its results: an asynchronous start lists its operands first."""
  return found[len(found) // 2:] if started and kind != 'all-reduce' else found


def _computations(text):
  """Returns {name: its lines} and the entry's name."""
  found, entry, lines = {}, None, None
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      lines = found[header[2]] = []
      entry = header[2] if header[1] else entry
    elif line.startswith('}'):
      lines = None
    elif lines is not None:
      lines.append(line)
  return found, entry


def _size(shapes, kind, started):
  """Bytes of a result."""
  sizes = [_BYTES[name] * math.prod(int(d) for d in dims.split(','))
           for name, dims in _SHAPE.findall(shapes) if name in _BYTES and dims]
  return sum(_results(sizes, kind, started))


def _group_size(line):
  """Devices that take part together, from the three ways in which XLA writes replica groups."""
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', line)  # {{0,1},{2,3}}
  if listed:
    return len(listed[1].split(','))
  iota = re.search(r'replica_groups=\[\d+,(\d+)\]', line)  # [2,4]<=[8]: 2 groups of 4
  if iota:
    return int(iota[1])
  named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)  # axes by name
  if named:
    sizes = dict(re.findall(r"('[^']+')=(\d+)", named[1]))
    # Of an axis that is split further, the part that takes part follows a colon: 'a':(2)4 is 4.
    return math.prod(int(sizes.get(axis) or axis.rsplit(')', 1)[1]) for axis in named[2].split(','))
  return 2  # a permute has no groups, and its factor is 1 whatever they are
