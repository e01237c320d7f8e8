"""What the benchmarks share: worker processes that take turns, and facts about the machine."""

import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent


class Worker:
  """A side of a comparison in a process of its own, which answers in lines of JSON.

  Args:
    script: file beside this one, started with --worker.
    argv: further arguments.
    environment: variables on top of this process's.
  """

  def __init__(self, script, argv, environment=()):
    self._log = tempfile.TemporaryFile('w+')
    self._process = subprocess.Popen(
        [sys.executable, str(HERE / script), '--worker', *argv], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=self._log, text=True,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(HERE.parent), str(HERE)]),
             'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',  # a GPU is shared with the other side
             **dict(environment)})

  def read(self):
    """Returns the next line; raises SystemExit with what the worker said if it has ended."""
    line = self._process.stdout.readline()
    if not line:
      self._log.seek(0)
      raise SystemExit(f'{self._log.read()[-3000:]}\n'
                       f'the worker ended with code {self._process.wait()}')
    return json.loads(line)

  def ask(self):
    """Lets the worker do its work once more, and returns what it says of it."""
    self._process.stdin.write('again\n')
    self._process.stdin.flush()
    return self.read()

  def close(self):
    """Lets the worker end."""
    self._process.stdin.close()
    self._process.wait()

  def kill(self):
    """Ends the worker at once."""
    self._process.kill()
    self._process.wait()


def compilations():
  """Returns a list to which every compilation of this process from now on adds its seconds."""
  from jax import monitoring
  found = []
  monitoring.register_event_duration_secs_listener(
      lambda event, seconds, **_: found.append(seconds)
      if event == '/jax/core/compile/backend_compile_duration' else None)
  return found


def machine():
  """What a row says of the machine."""
  return {'cpu': _cpu_name(), 'cores': os.cpu_count(), 'python': platform.python_version(),
          'load_average': os.getloadavg()[0]}


def _cpu_name():
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      return next(line.partition(':')[2].strip() for line in file if line.startswith('model name'))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()
