"""The mesh and the one table that says how everything lies on it.

Axes: `data` (replicas), `fsdp` (parameters, optimizer state and batch are split over it) and
`tensor` (heads, MLP width and vocabulary). Batches are split over `data` and `fsdp` together.
Model code names logical axes only; `use(mesh)` gives them their meaning while tracing.

Host arrays are global on every process: a process holds the whole (small) batch of token ids and
numbers, and `put` hands each device its part. `fetch` is the way back.
"""

import contextlib
import json
import re

import flax.linen as nn
import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from ptjax import config as settings

AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = ('data', 'fsdp')

# Logical names used by model code -> mesh axes.
LOGICAL_RULES = (
    ('batch', BATCH_AXES),
    ('heads', 'tensor'),
    ('mlp', 'tensor'),
    ('vocab', 'tensor'),
    ('embed', None),
)

# Parameter path (the first match wins; the path ends there) -> spec of its trailing dimensions.
# Leaves under `layers` have a leading layer dimension, which stays whole.
_PARAM_RULES = (
    (r'embed/embedding', ('tensor', 'fsdp')),  # [V, d]
    (r'position_embed/embedding', (None, 'fsdp')),  # [max_length, d]
    (r'head/kernel', ('fsdp', 'tensor')),  # [d, V]
    (r'(query|key|value)/kernel', ('fsdp', 'tensor')),  # [d, heads * D]
    (r'(query|key|value)/bias', ('tensor',)),
    (r'(gate|up)/kernel', ('fsdp', 'tensor')),  # [d, f]
    (r'(gate|up)/bias', ('tensor',)),
    (r'(out|down)/kernel', ('tensor', 'fsdp')),  # [heads * D, d], [f, d]
    # Adapters: A is split like its kernel's rows, B and the magnitude like its columns.
    (r'(query|key|value|gate|up)/lora_a', ('fsdp', None)),  # [d, r]
    (r'(query|key|value|gate|up)/lora_b', (None, 'tensor')),  # [r, heads * D], [r, f]
    (r'(query|key|value|gate|up)/magnitude', ('tensor',)),
    (r'(out|down)/lora_a', ('tensor', None)),  # [heads * D, r], [f, r]
    (r'(out|down)/lora_b', (None, 'fsdp')),  # [r, d]
)


def make_mesh(text='', devices=None):
  """Builds the mesh from e.g. `'data=2,fsdp=-1,tensor=2'`.

  Args:
    text: axis sizes; a missing axis is 1, one may be -1 (what is left), empty puts all devices
      on `fsdp`.
    devices: the devices, default all.
  Raises:
    UserError: an unknown axis, a malformed size, or sizes that do not multiply to the number of
      devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = parse_mesh(text, len(devices))
  return Mesh(np.asarray(devices).reshape([sizes[a] for a in AXES]), AXES,
              axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text, num_devices):
  """Returns `{axis: size}` for `make_mesh`'s text and a number of devices."""
  sizes = dict.fromkeys(AXES, 1)
  if not text:
    sizes['fsdp'] = num_devices
  for part in filter(None, text.split(',')):
    name, _, size = part.partition('=')
    if name.strip() not in AXES:
      raise settings.UserError(f'--mesh={text}: unknown axis {name.strip()!r}'
                               + settings.near_names(name.strip(), AXES))
    try:
      sizes[name.strip()] = int(size)
    except ValueError:
      raise settings.UserError(f'--mesh={text}: {part!r} is not axis=size') from None
  free = [a for a in AXES if sizes[a] == -1]
  fixed = int(np.prod([s for s in sizes.values() if s != -1]))
  if len(free) > 1 or fixed < 1 or any(s < 1 and s != -1 for s in sizes.values()):
    raise settings.UserError(f'--mesh={text}: sizes must be positive, one of them may be -1')
  if free and num_devices % fixed == 0:
    sizes[free[0]] = num_devices // fixed
  if int(np.prod(list(sizes.values()))) != num_devices:
    raise settings.UserError(
        f'--mesh={text}: sizes multiply to {fixed}, but there are {num_devices} devices')
  return sizes


def batch_size(mesh):
  """The number of parts a batch is split into."""
  return int(np.prod([mesh.shape[a] for a in BATCH_AXES]))


def batch(mesh):
  """Leading dimension over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh):
  return NamedSharding(mesh, PartitionSpec())


def tree_sharding(mesh, shapes):
  """Shardings of parameters, or of any tree that holds copies of them (optimizer state).

  Args:
    mesh: the mesh.
    shapes: tree with `.shape` leaves; a leaf whose path ends like a parameter's is laid out like
      that parameter, anything else is replicated. A dimension that its axis does not divide
      stays whole.
  """
  def one(path, leaf):
    name = '/'.join(_key_name(k) for k in path)
    for pattern, spec in _PARAM_RULES:
      if re.search(pattern + '$', name) and leaf.ndim >= len(spec):
        spec = (None,) * (leaf.ndim - len(spec)) + spec
        fits = [axis if axis and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(spec, leaf.shape)]
        return NamedSharding(mesh, PartitionSpec(*fits))
    return replicated(mesh)
  return jax.tree_util.tree_map_with_path(one, shapes)


def _key_name(key):
  for attribute in ('key', 'name', 'idx'):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)


@contextlib.contextmanager
def use(mesh):
  """Inside, logical axis names of model code mean axes of `mesh`. Trace under it."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_RULES):
    yield mesh


def put(tree, sharding):
  """Global host arrays -> global device arrays.

  Args:
    tree: NumPy arrays, the same on every process.
    sharding: one sharding for all leaves, or a matching tree.
  """
  if isinstance(sharding, jax.sharding.Sharding):
    sharding = jax.tree.map(lambda _: sharding, tree)
  def one(array, target):
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, target, lambda index: array[index])
  return jax.tree.map(one, tree, sharding)


def fetch(tree):
  """Device arrays -> global NumPy arrays on every process."""
  def one(array):
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
      if not array.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
      return np.asarray(array.addressable_data(0))
    return np.asarray(array)
  return jax.tree.map(one, tree)


def gather_rows(local, count):
  """Puts the rows of `local_rows` together again.

  Args:
    local: NumPy array, this process's rows.
    count: rows of all processes together.
  Returns:
    [count, ...], in the original order and to the bit: rows travel as bytes, since devices have no
    float64.
  """
  if jax.process_count() == 1:
    return local
  rows = np.zeros((_share(count), *local.shape[1:]), local.dtype)
  rows[:len(local)] = local
  gathered = multihost_utils.process_allgather(
      rows.reshape(len(rows), -1).view(np.uint8), tiled=True)
  return np.asarray(gathered).view(local.dtype).reshape(-1, *local.shape[1:])[:count]


def gather_json(value):
  """Returns each process's `value`, which JSON can hold, in process order."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  longest = int(np.max(multihost_utils.process_allgather(np.asarray(len(text)))))
  rows = multihost_utils.process_allgather(np.pad(text, (0, longest - len(text))))
  return [json.loads(np.asarray(row).tobytes().rstrip(b'\0')) for row in rows]


def local_rows(count):
  """The slice of `count` rows that this process works on (rewards are computed once)."""
  share = _share(count)
  start = min(jax.process_index() * share, count)
  return slice(start, min(start + share, count))


def _share(count):
  return -(-count // jax.process_count())
