"""What is settled once per process: which others it works with, its memory, how XLA compiles."""

import contextlib
import ctypes
import functools
import os

import jax
from jax import monitoring
import jax.numpy as jnp

from ptjax import config as settings


def start_processes(coordinator, num_processes, process_id):
  """Joins a run of several processes; does nothing when none of the arguments is given.

  Raises:
    UserError: only some of them are given.
  """
  given = (coordinator, num_processes, process_id)
  if all(value is None for value in given):
    return
  if any(value is None for value in given):
    raise settings.UserError('--coordinator, --num_processes and --process_id go together')
  jax.distributed.initialize(coordinator, num_processes, process_id)


@functools.cache  # once per process
def keep_freed_memory():
  """Tells glibc to keep what programs free, and to give back at once what compiling them leaves.

  XLA on CPU frees its large temporaries after every call; touching them anew each step costs page
  faults (measured on the default job: a fifth of all CPU time, and up to half of the wall time).
  What the compiler frees lies scattered, so the temporaries do not fit into it (measured on the
  same job: 250 MiB of 1,170 at the peak, which giving it back between compiling and running
  saves). One heap for all threads (M_ARENA_MAX) would save a tenth more, and make steps a tenth and
  compilations a third slower. Does nothing where the C library has no `mallopt`.
  """
  mmap_threshold, trim_threshold, top_pad = -3, -1, -2
  with contextlib.suppress(OSError, AttributeError):
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 10**9)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(top_pad, 2**26)

    def compiled(event, seconds, **_):
      if event == '/jax/core/compile/backend_compile_duration' and seconds > 0.5:
        libc.malloc_trim(0)
    monitoring.register_event_duration_secs_listener(compiled)


def use_compile_cache(folder):
  """Keeps compiled programs in `folder` ('auto': ~/.cache/ptjax/xla, None: nowhere)."""
  if folder is None:
    return
  if folder == 'auto':
    folder = os.path.join(os.path.expanduser('~'), '.cache', 'ptjax', 'xla')
  jax.config.update('jax_compilation_cache_dir', folder)
  # The many small programs of a start add up to as much as the few large ones.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


@functools.cache  # once per process
def frugal_compilation():
  """Options of `jax.jit` for large programs, so that compiling them takes less memory.

  On a CPU each of a program's loops has, by default, a compiler module of its own, all of them
  alive at once. Without that an update of the default job takes 200 MiB less to compile, a tenth to
  a fifth less time, and a fiftieth more to run. None where XLA has no such option.
  """
  if jax.default_backend() != 'cpu':
    return None
  return known_options({'xla_cpu_use_fusion_emitters': False})


def known_options(options):
  """Returns `options` if XLA knows all of these compiler options, else None."""
  try:
    jax.jit(jnp.negative, compiler_options=options).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:
    return None
  return options
