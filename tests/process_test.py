"""Memory and compilation of a process, and processes that start together."""

import platform

from jax import monitoring
import pytest

from ptjax import config as settings
from ptjax import process


def test_processes_start_together_or_not_at_all():
  process.start_processes(None, None, None)
  with pytest.raises(settings.UserError, match='go together'):
    process.start_processes('localhost:1', 2, None)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='mallopt is of glibc')
def test_what_a_long_compilation_leaves_goes_back_and_what_programs_free_stays():
  """Scattered garbage of 64 MiB: small pieces under one that lives, so freeing gives none back."""
  process.keep_freed_memory()

  def held_mib():
    with open('/proc/self/status', encoding='utf-8') as file:
      return next(int(line.split()[1]) for line in file if line.startswith('VmRSS')) / 1024

  def compiled(seconds):
    monitoring.record_event_duration_secs('/jax/core/compile/backend_compile_duration', seconds)
    return held_mib()

  compiled(1.0)
  before = held_mib()
  garbage = [bytes([1]) * 8192 for _ in range(2**13)]
  full = held_mib()
  assert full > before + 48
  del garbage
  assert compiled(0.01) > before + 48
  assert compiled(1.0) < before + 16


def test_unknown_compiler_options_are_left_out():
  known = {'xla_backend_optimization_level': 1}
  assert process.known_options(known) == known
  assert process.known_options({**known, 'xla_cpu_no_such_thing': True}) is None
