"""An offline method's own loss and metrics on rows it does not train on."""

import collections

import numpy as np

from ptjax import sharding
from ptjax.training import step as training_step


def evaluate(door, metrics_of, *, batch_size, mesh, name, lay_out=lambda batch: batch):
  """Averages the metrics of all rows, batch by batch.

  Args:
    door: data.offline.OfflineDoor.
    metrics_of: `placed batch -> metrics`, scalars that are means over the batch.
    batch_size: rows computed together; the last batch may hold fewer.
    mesh: the mesh.
    name: of the method.
    lay_out: `batch -> batch`, which may pack it.
  Returns:
    {`eval/<name>/<metric>`: mean over the rows, and `..._se`, the standard error over batches}.
  """
  parts = sharding.batch_size(mesh) if mesh is not None else 1
  count = len(door) // parts * parts
  found, sizes = collections.defaultdict(list), []
  order = door.in_turn()[:count]
  for start in range(0, count, batch_size):
    places = order[start:start + batch_size]
    batch = training_step.place(lay_out(door.take(places)), mesh)
    metrics = sharding.fetch(metrics_of(batch))
    sizes.append(len(places))
    for key, value in metrics.items():
      found[key].append(float(value))
  weights = np.asarray(sizes, float) / max(sum(sizes), 1)
  result = {}
  for key, values in found.items():
    values = np.asarray(values)
    mean = float(weights @ values)
    result[f'eval/{name}/{key}'] = mean
    if len(values) > 1:
      spread = weights @ np.square(values - mean) / (len(values) - 1)
      result[f'eval/{name}/{key}_se'] = float(np.sqrt(spread))
  return result
