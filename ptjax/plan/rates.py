"""What a device does per second: given, of a data sheet, or measured here and now."""

import dataclasses
import os
import time

import jax
import jax.numpy as jnp

from ptjax import config as settings

# Data sheets (SXM): dense bfloat16 and TF32 FLOP/s, memory and NVLink bytes/s (one way), GiB.
DEVICES = {
    'A100': (312e12, 156e12, 2.04e12, 300e9, 80), 'H100': (989e12, 494e12, 3.35e12, 450e9, 80),
    'H200': (989e12, 494e12, 4.8e12, 450e9, 141),
}
PER_NODE = 8  # devices
_NETWORK = 50e9  # bytes/s of each device's share of the network between nodes (400 Gbit/s)


@dataclasses.dataclass(frozen=True)
class Rates:
  """What one device does per second."""
  name: str
  flops: float
  bytes: float  # to and from its memory
  link: float  # bytes received from other devices of its node
  network: float  # bytes received from other nodes
  memory: float | None = None  # GiB it has, where known


def is_this_machine(options, model, mesh):
  """Whether a plan is for this machine's CPU.

  A program for several virtual devices, or in bfloat16, is meant for GPUs, and one for another
  device is for that; see `assumed` for the arguments.
  """
  return (options.device is None and mesh.devices.flat[0].platform == 'cpu' and mesh.size == 1
          and model.dtype == 'float32')


def memory(options, model, mesh):
  """GiB of the device that a plan is for, None where not known; see `assumed` for the arguments."""
  if options.memory_gib is not None:
    return options.memory_gib
  if is_this_machine(options, model, mesh):
    return _machine_memory()
  return DEVICES[_name(options, mesh)][-1]


def assumed(options, model, mesh):
  """The rates that seconds are reckoned with.

  Args:
    options: config.PlanSettings; what it gives wins.
    model: TransformerConfig.
    mesh: the mesh.
  Raises:
    UserError: a device without a data sheet.
  """
  if options.device is not None and options.device not in DEVICES:
    raise settings.UserError(f'plan.device={options.device}: no data sheet'
                             + settings.near_names(options.device, DEVICES))
  given = {name: value for name, value in (
      ('flops', options.peak_tflops), ('bytes', options.memory_gb_per_second),
      ('link', options.link_gb_per_second),
      ('network', options.network_gb_per_second)) if value is not None}
  if is_this_machine(options, model, mesh):
    found, share = measured(), 1.0  # as measured, nothing taken off
  else:
    found = _data_sheet(_name(options, mesh), model, mesh)
    share = options.efficiency
  units = {'flops': 1e12, 'bytes': 1e9, 'link': 1e9, 'network': 1e9}
  rates = {name: options.efficiency * given[name] * units[name] if name in given
           else share * getattr(found, name) for name in units}
  name = found.name if share == 1.0 else f'{share:.0%} of {found.name}'
  if given:
    name = f'{options.efficiency:.0%} of the peaks given' + (
        '' if len(given) == len(units) else f', else {name}')
  return Rates(name, **rates, memory=memory(options, model, mesh))


def _name(options, mesh):
  kind = mesh.devices.flat[0].device_kind
  return options.device or next((name for name in DEVICES if name in kind), 'H100')


def _data_sheet(name, model, mesh):
  half, single, moved, link, _ = DEVICES[name]
  several = mesh.size > PER_NODE
  return Rates(f'the data sheet of {name}' + ', 400 Gbit/s each between nodes' * several,
               half if model.dtype == 'bfloat16' else single, moved, link, _NETWORK)


def measured():
  """This device's float32 matrix-product FLOP/s and memory bytes/s, each the best of three."""
  turns = 4
  def best(function, argument):
    # In a loop, so that no fresh memory is touched for the first time.
    compiled = jax.jit(lambda x: jax.lax.fori_loop(0, turns, lambda _, y: function(y), x))
    jax.block_until_ready(compiled(argument))
    times = []
    for _ in range(3):
      started = time.perf_counter()
      jax.block_until_ready(compiled(argument))
      times.append((time.perf_counter() - started) / turns)
    return min(times)
  matrix, vector = jnp.ones((1024, 1024), jnp.float32), jnp.ones(1 << 23, jnp.float32)
  moved = 2 * vector.nbytes / best(lambda x: x + 1, vector)
  return Rates('products and copies measured here now',
               2 * 1024**3 / best(lambda x: x @ matrix / 1024, matrix), moved, moved, moved)


def _machine_memory():
  """GiB of this machine, or None where the system does not say."""
  try:
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30
  except (AttributeError, OSError, ValueError):
    return None
