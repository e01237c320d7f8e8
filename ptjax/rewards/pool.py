"""Worker processes that can be killed, for functions that may hang, eat memory or crash.

Each worker is a fresh Python (no fork of the trainer, no import of its `__main__`, so no jax) that
runs one function on one item at a time. An item that outlives its deadline costs its worker, which
is killed and replaced; the item's outcome says so, and the trainer goes on.
"""

import collections
import dataclasses
import json
from multiprocessing import connection
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any
import weakref

_SCRIPT = pathlib.Path(__file__).with_name('worker.py')
_MAX_START_FAILURES = 3


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of one item."""
  status: str  # 'ok'; 'timeout', 'died' (crash or kill) or 'error' (the function raised)
  value: Any = None  # what the function returned, as JSON has it; None unless 'ok'
  detail: str = ''  # the cause, unless 'ok'


class WorkerPool:
  """Runs one function over lists of items in killable processes.

  Args:
    path: Python file that defines the function; it should import little, and never jax.
    function: its name. It takes one item's values as positional arguments and returns a
      small JSON value.
    num_workers: processes at most; they start when first needed.
    timeout_seconds: per item, from the moment a worker gets it.
    start_timeout_seconds: for a worker to import its file.
    memory_bytes: address space of each worker; None sets no limit.

  `close` ends the workers; a later `map` starts new ones.
  """

  def __init__(self, path, function, *, num_workers=2, timeout_seconds=5.0,
               start_timeout_seconds=60.0, memory_bytes=4 * 2**30):
    self._arguments = (str(path), function, str(timeout_seconds), str(memory_bytes or 0))
    self._num_workers = num_workers
    self._timeout_seconds = timeout_seconds
    self._start_timeout_seconds = start_timeout_seconds
    self._workers = []
    self._lock = threading.Lock()
    self._start_failures = 0
    weakref.finalize(self, _end_all, self._workers)  # also at exit

  def map(self, items):
    """Returns one `Outcome` per item, in order.

    Args:
      items: list of tuples of JSON values, the function's arguments.
    Raises:
      RuntimeError: the workers cannot start (the function's file does not import, say).
    """
    items = list(items)
    outcomes = [None] * len(items)
    waiting = collections.deque(enumerate(items))
    with self._lock:
      try:
        while waiting or any(worker.item is not None for worker in self._workers):
          self._assign(waiting)
          self._collect(outcomes)
      except BaseException:
        _end_all(self._workers)  # a worker left busy would answer the next call's question
        raise
    return outcomes

  def close(self):
    """Ends the workers."""
    with self._lock:
      _end_all(self._workers)

  def _assign(self, waiting):
    """Hands items to idle workers, starting workers while there is more to do than hands."""
    for worker in list(self._workers):
      if waiting and worker.idle:
        index, item = waiting.popleft()
        try:
          worker.give(index, item, self._timeout_seconds)
        except OSError:  # it died while idle, which is no fault of the item
          waiting.appendleft((index, item))
          self._end(worker)
    starting = sum(not worker.ready for worker in self._workers)
    missing = min(len(waiting) - starting, self._num_workers - len(self._workers))
    for _ in range(missing):
      self._workers.append(_Worker(self._arguments, self._start_timeout_seconds))

  def _collect(self, outcomes):
    """Waits for the next reply, death or deadline, and notes what it means."""
    awaited = [worker for worker in self._workers if not worker.idle]
    if not awaited:
      return
    seconds = max(0.0, min(worker.deadline for worker in awaited) - time.monotonic())
    replied = connection.wait([worker.connection for worker in awaited], seconds)
    now = time.monotonic()
    for worker in awaited:
      if worker.connection in replied:
        self._read(worker, outcomes)
      elif now >= worker.deadline:
        if worker.ready:
          outcomes[worker.item] = Outcome(
              'timeout', detail=f'no answer within {self._timeout_seconds:g} s')
        self._end(worker)
        if not worker.ready:
          self._note_start_failure(f'not ready after {self._start_timeout_seconds:g} s')

  def _read(self, worker, outcomes):
    try:
      reply = json.loads(worker.connection.recv_bytes())
    except (EOFError, OSError):
      cause = worker.epitaph()
      self._end(worker)
      if worker.ready:
        outcomes[worker.item] = Outcome('died', detail=cause)
      else:
        self._note_start_failure(cause)
      return
    if reply['status'] == 'unusable':
      raise RuntimeError(
          f'a worker process cannot load {self._arguments[1]} of {self._arguments[0]}: '
          f'{reply["detail"]}')
    if reply['status'] == 'ready':
      worker.ready = True
      self._start_failures = 0
    else:
      outcomes[worker.item] = Outcome(**reply)
      worker.item = None

  def _note_start_failure(self, cause):
    self._start_failures += 1
    if self._start_failures >= _MAX_START_FAILURES:
      self._start_failures = 0
      raise RuntimeError(
          f'{_MAX_START_FAILURES} worker processes in a row did not start; the last: {cause}')

  def _end(self, worker):
    self._workers.remove(worker)
    worker.end()


class _Worker:
  """One process and the socket to it."""

  def __init__(self, arguments, start_timeout_seconds):
    ours, theirs = socket.socketpair()
    with theirs:
      # -P keeps this folder, whose modules have everyday names, off the worker's path. A session
      # of its own keeps the terminal's Ctrl-C, which is for the trainer, away from it.
      self.process = subprocess.Popen(
          [sys.executable, '-P', str(_SCRIPT), str(theirs.fileno()), *arguments],
          pass_fds=(theirs.fileno(),), start_new_session=True, stdin=subprocess.DEVNULL,
          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    self.connection = connection.Connection(ours.detach())
    self.deadline = time.monotonic() + start_timeout_seconds
    self.ready = False
    self.item = None  # index of the item it works on

  @property
  def idle(self):
    return self.ready and self.item is None

  def give(self, index, item, timeout_seconds):
    self.connection.send_bytes(json.dumps(item).encode())
    self.item = index
    self.deadline = time.monotonic() + timeout_seconds

  def end(self):
    if self.process.poll() is None:
      os.killpg(self.process.pid, signal.SIGKILL)  # and whatever the function started
    self.process.wait()
    self.connection.close()

  def epitaph(self):
    """Says how a worker that closed its socket ended."""
    try:
      code = self.process.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
      return 'the worker closed its connection'
    if code < 0:
      return f'the worker was killed by {signal.Signals(-code).name}'
    return f'the worker ended with exit code {code}'


def _end_all(workers):
  while workers:
    workers.pop().end()
