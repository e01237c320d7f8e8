"""Counts what XLA compiles, and says which shape made it compile again."""

import jax
from absl import logging
from jax import monitoring

WARM_UP = 2  # calls in which compiling is no news


class Compilations:
  """Counts the compilations of this process from its creation on; `count` is how many."""

  def __init__(self):
    self.count = 0
    monitoring.register_event_duration_secs_listener(self._note)

  def _note(self, event, duration, **kwargs):
    del duration, kwargs
    if event == '/jax/core/compile/backend_compile_duration':
      self.count += 1

  def watched(self, train_step):
    """Returns `train_step(state, batch)` with a warning where a later call compiles.

    The warning names the arrays of the batch whose shape was not seen before, beside the shape of
    the batch before; a batch of known shapes that compiles all the same is said to be one.
    """
    seen, calls, last = set(), 0, {}

    def step(state, batch):
      nonlocal calls, last
      before = self.count
      result = train_step(state, batch)
      calls += 1
      shapes = _shapes(batch)
      if self.count > before and calls > WARM_UP:
        changed = [f'{name} {_text(last.get(name))} -> {_text(shape)}'
                   for name, shape in shapes.items() if (name, shape) not in seen]
        logging.warning('the train step was compiled again (%d programs): %s', self.count - before,
                        ', '.join(changed) or 'no single shape is new, but their combination')
      seen.update(shapes.items())
      last = shapes
      return result
    return step


def _shapes(batch):
  return {jax.tree_util.keystr(path, simple=True, separator='.'): (leaf.shape, str(leaf.dtype))
          for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]}


def _text(shape):
  return 'absent' if shape is None else f'{shape[1]}[{",".join(map(str, shape[0]))}]'
