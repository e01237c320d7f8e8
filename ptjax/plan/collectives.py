"""What devices send each other in a compiled program, read from its text."""

import collections
import math
import re

import numpy as np

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


def bytes_received(text, *, within=None):
  """Adds up collectives, one in a loop as often as the loop runs.

  Args:
    text: `compiled.as_text()`.
    within: count only collectives among neighbours: devices of one node, of so many each.
  Returns:
    dict kind -> bytes each device receives. A loop without a known number of turns counts once,
    and of a branch all arms count.
  """
  computations, entry = _computations(text)
  counts = re.findall(r'\b(?:replica_count|num_partitions)=(\d+)', text.partition('\n')[0])
  devices = math.prod(map(int, counts))  # neither is written where it is 1
  total = collections.Counter()

  def walk(name, times):
    for line in computations.get(name, ()):
      match = _COLLECTIVE.match(line)
      if match:
        shapes, kind, started = match.groups()
        group = _group(line, devices)
        if within is None or group.max() // within == group.min() // within:
          total[kind] += times * _TRAFFIC[kind](group.size) * _size(shapes, kind, started)
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


def _group(line, devices):
  """Devices of the first group that takes part together, [n], from all ways XLA writes groups.

  Args:
    line: the instruction.
    devices: how many the program runs on.
  """
  listed = re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}', line)
  if listed:  # {{0,1},{2,3}}
    return np.array([int(i) for i in listed[1].split(',')])
  iota = re.search(r'replica_groups=\[\d+,(\d+)\]<=(\S*)', line)
  if iota:  # [2,4]<=[8]: 2 groups of 4; [4,2]<=[2,4]T(1,0): of the transposed numbers
    return _iota(iota[2])[:int(iota[1])]
  if re.search(r'replica_groups=\{\}', line):  # all in one
    return np.arange(devices)
  # Axes by name: mesh['a'=2,'b'=4] {'b'}; the devices of the mesh may come in another order.
  named = re.search(
      r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S*)\))? \{([^}]*)\}", line)
  sizes = [(name, int(size)) for name, size in re.findall(r"('[^']+')=(\d+)", named[1])]
  count = math.prod(size for _, size in sizes)
  numbers = _iota(named[2] or f'[{count}]').reshape([size for _, size in sizes])
  taking = {name: split for name, *split in re.findall(r"('[^']+')(?::\((\d+)\)(\d+))?", named[3])}
  chosen = []
  for name, size in sizes:
    if name not in taking:
      chosen.append([0])
    elif taking[name][0]:  # of an axis that is split further: 'a':(2)4 are 4, behind a split in 2
      major, own = map(int, taking[name])
      chosen.append(range(0, size // major, size // major // own))
    else:
      chosen.append(range(size))
  return numbers[np.ix_(*chosen)].reshape(-1)


def _iota(text):
  """Reads [2,4]T(1,0): the numbers 0 to 7 as [2, 4], transposed, in a row."""
  sizes, order = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text).groups()
  sizes = [int(i) for i in sizes.split(',')]
  order = [int(i) for i in order.split(',')] if order else range(len(sizes))
  return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(-1)
