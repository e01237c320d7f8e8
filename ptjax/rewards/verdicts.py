"""Verdicts kept on disk by what was asked: asking again costs time and may answer anew."""

import hashlib
import json
import os
import pathlib
import threading


def key(identity, question):
  """The name of a verdict: a hash of who was asked what."""
  return hashlib.sha256(json.dumps([identity, question]).encode()).hexdigest()


class Verdicts:
  """A file of verdicts, one JSON line each, read once and appended to.

  Several processes may share it: lines are written whole, what another wrote since is read at the
  next start, and a line that a crash cut is left out.

  Args:
    path: the file; its folder is made.
  """

  def __init__(self, path):
    self._path = pathlib.Path(path).expanduser()
    self._lock = threading.Lock()
    self._known = None

  def get(self, name):
    """Returns the verdict of a `key`, or None."""
    with self._lock:
      return self._load().get(name)

  def add(self, found):
    """Keeps `{key: number}`."""
    if not found:
      return
    with self._lock:
      self._load().update(found)
      # The line break in front ends what a crash may have cut.
      lines = '\n' + ''.join(json.dumps([name, value]) + '\n' for name, value in found.items())
      self._path.parent.mkdir(parents=True, exist_ok=True)
      handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
      try:
        os.write(handle, lines.encode())  # one write: lines of two processes do not mix
      finally:
        os.close(handle)

  def _load(self):
    if self._known is None:
      self._known = {}
      text = self._path.read_text() if self._path.exists() else ''
      for line in text.splitlines():
        try:
          name, value = json.loads(line)
          self._known[name] = float(value)
        except (ValueError, TypeError):
          continue  # empty, or cut by a crash
    return self._known
