"""What a GPU wants to be told before JAX starts it: XLA's flags, and how much memory to take.

All of it goes through the environment, and what the user has set there wins. Nothing is set on a
machine without JAX's CUDA plugin.
"""

import importlib.util
import os

# Start from what JAX's GPU guide and MaxText use; not yet measured here on a GPU.
XLA_FLAGS = {
    'xla_gpu_enable_latency_hiding_scheduler': 'true',  # collectives beside computation
    'xla_gpu_all_reduce_combine_threshold_bytes': str(128 << 20),  # few large ones
    'xla_gpu_all_gather_combine_threshold_bytes': str(128 << 20),
    'xla_gpu_reduce_scatter_combine_threshold_bytes': str(64 << 20),
    'xla_gpu_enable_pipelined_all_gather': 'true',  # of the next layer's weights under FSDP
    'xla_gpu_enable_pipelined_reduce_scatter': 'true',
    'xla_gpu_enable_while_loop_double_buffering': 'true',  # scans over layers
}


def prepare(device):
  """Sets the environment for `device`, config.DeviceSettings; call before JAX's first array."""
  if has_plugin():
    os.environ.update(environment(device, os.environ))


def has_plugin():
  """Whether JAX could use an NVIDIA GPU here."""
  asked = os.environ.get('JAX_PLATFORMS', '')  # none, also by an empty text: whatever there is
  return (not asked or not {'cuda', 'gpu'}.isdisjoint(asked.split(','))) and any(
      importlib.util.find_spec(f'jax_cuda{version}_plugin') for version in (12, 13))


def environment(device, given):
  """The variables to set.

  Args:
    device: config.DeviceSettings.
    given: the environment so far; a flag or variable named there stays as it is.
  Returns:
    Dict of variable -> value.
  """
  wanted = {'XLA_PYTHON_CLIENT_PREALLOCATE': str(device.preallocate).lower()}
  if device.memory_fraction is not None:
    wanted['XLA_PYTHON_CLIENT_MEM_FRACTION'] = str(device.memory_fraction)
  wanted = {name: value for name, value in wanted.items() if name not in given}
  if device.xla_flags == 'auto':
    before = given.get('XLA_FLAGS', '')
    named = {flag.removeprefix('--').partition('=')[0] for flag in before.split()}
    more = [f'--{name}={value}' for name, value in XLA_FLAGS.items() if name not in named]
    wanted['XLA_FLAGS'] = ' '.join([*before.split(), *more])
  return wanted
