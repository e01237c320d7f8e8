"""The program a pool's worker process runs: one function, one item at a time.

Started as a script by `pool.WorkerPool`, never imported by the trainer; it needs the standard
library alone, so it starts fast. It speaks JSON over one socket, so that a worker gone wrong can
send nothing but data, and whatever the function prints goes nowhere.
"""

import importlib.util
import json
from multiprocessing import connection
import signal
import sys

# Past its deadline the pool kills a worker. Should the trainer itself be gone by then, the
# worker's own alarm ends it this much later, even inside C code that never returns to Python.
_GRACE_SECONDS = 5.0


def load(path, name):
  """Returns function `name` of the Python file at `path`."""
  spec = importlib.util.spec_from_file_location('ptjax_worker_function', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return getattr(module, name)


def limit_memory(limit_bytes):
  """Makes allocations past `limit_bytes` of address space fail, where the system can."""
  try:
    import resource  # pylint: disable=import-outside-toplevel; absent outside Unix
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
  except (ImportError, ValueError, OSError):
    pass


def answer(function, request):
  """Returns the reply to one request, the JSON list of the function's arguments."""
  try:
    value = function(*json.loads(request))
    return json.dumps({'status': 'ok', 'value': value})
  except Exception as error:  # pylint: disable=broad-except; the trainer decides what it means
    return json.dumps({'status': 'error', 'detail': f'{type(error).__name__}: {error}'[:500]})


def main(arguments):
  """Serves until the trainer closes its end: arguments are fd, path, name, seconds, bytes."""
  file_descriptor, path, name, timeout_seconds, memory_bytes = arguments
  trainer = connection.Connection(int(file_descriptor))
  try:
    if int(memory_bytes):
      limit_memory(int(memory_bytes))
    function = load(path, name)
  except BaseException as error:  # pylint: disable=broad-except; reported, then the worker ends
    trainer.send_bytes(json.dumps(
        {'status': 'unusable', 'detail': f'{type(error).__name__}: {error}'[:500]}).encode())
    return
  trainer.send_bytes(json.dumps({'status': 'ready'}).encode())
  while True:
    try:
      request = trainer.recv_bytes()
      signal.setitimer(signal.ITIMER_REAL, float(timeout_seconds) + _GRACE_SECONDS)
      reply = answer(function, request)
      signal.setitimer(signal.ITIMER_REAL, 0.0)
      trainer.send_bytes(reply.encode())
    except (EOFError, OSError):
      return


if __name__ == '__main__':
  main(sys.argv[1:])
