"""Pictures of an inspection: tokens coloured by weight, and the curve of the weights."""

import pathlib

import numpy as np

from ptjax import config
from ptjax.inspect import sweep

_COLOURS = {'encouraged': 'tab:blue', 'chosen': 'tab:blue', 'desirable': 'tab:blue',
            'discouraged': 'tab:red', 'rejected': 'tab:red', 'undesirable': 'tab:red'}
_MAX_ROWS, _MAX_TEXT = 48, 32  # rows drawn; tokens per row up to which their text is written


def plot(inspection, path):
  """Draws the tokens coloured by weight, and the curve of weight against ratio or margin.

  Blue tokens are encouraged, red ones discouraged; a cross is a token its mask has stopped. Of a
  loss that is no policy gradient the colours show the size of the gradient its outputs get.

  Args:
    inspection: weights.Inspection.
    path: .png, .svg or .pdf.
  """
  suffix = pathlib.Path(path).suffix
  if suffix not in ('.png', '.svg', '.pdf'):
    raise config.UserError(f'{path}: expected a name that ends in .png, .svg or .pdf')
  canvas = _figure(11, 6.5)
  left, right = canvas.subplots(1, 2, width_ratios=(3, 2))
  canvas.suptitle(f'{inspection.name}: {inspection.split}')
  _tokens(left, inspection, canvas)
  _curve(right, inspection)
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  canvas.savefig(path, dpi=110, metadata={'Date': None} if suffix == '.svg' else None)


def plot_matrix(names, families, matrix, path):
  """Draws cosines [K, K] between the gradients of algorithms, a line between families."""
  canvas = _figure(15, 14)
  axes = canvas.subplots()
  image = axes.imshow(matrix, cmap='RdBu', vmin=-1, vmax=1, interpolation='none')
  canvas.colorbar(image, ax=axes, label='cosine of the gradients', shrink=0.5)
  axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
  axes.set_yticks(range(len(names)), names, fontsize=7)
  for i in range(1, len(names)):
    if families[i] != families[i - 1]:
      axes.axhline(i - 0.5, color='black', linewidth=0.5)
      axes.axvline(i - 0.5, color='black', linewidth=0.5)
  axes.set_title('Which way each algorithm pushes one model on one batch of 24 completions')
  canvas.savefig(path, dpi=90)


def _figure(width, height):
  """A canvas of so many inches, without a window."""
  from matplotlib import figure  # here, so that nothing else waits for it or needs it
  return figure.Figure(figsize=(width, height), layout='constrained')


def _tokens(axes, inspection, canvas):
  """A cell per token."""
  shown, mask, label = inspection.weights, inspection.loss_mask, 'weight, −∂loss/∂log π'
  if not inspection.parts:
    name, shown = _sizes(inspection)
    mask, label = np.ones(shown.shape, bool), f'size of ∂loss/∂{name}'
  shown, mask = shown[:_MAX_ROWS], mask[:_MAX_ROWS]
  reach = np.abs(shown).max() or 1.0
  colours = ({'cmap': 'RdBu', 'vmin': -reach} if inspection.parts else {'cmap': 'Blues', 'vmin': 0})
  image = axes.imshow(np.where(mask, shown, np.nan), vmax=reach, aspect='auto',
                      interpolation='none', **colours)
  canvas.colorbar(image, ax=axes, label=label)
  axes.set_xlabel('token')
  axes.set_facecolor('0.93')
  if inspection.parts:
    _annotate(axes, inspection)


def _annotate(axes, inspection):
  """The text of the tokens, crosses on stopped ones, and what the rows are."""
  rows = min(len(inspection.weights), _MAX_ROWS)
  stopped = inspection.loss_mask & (inspection.weights == 0) & np.any(
      [part.tokens & (part.stable == 0) for part in inspection.parts.values()], axis=0)
  height, width = np.nonzero(stopped[:rows])
  axes.scatter(width, height, marker='x', s=60, color='0.7', linewidths=1.5)
  if inspection.tokens and inspection.weights.shape[1] <= _MAX_TEXT:
    reach = np.abs(inspection.weights).max()
    for i, t in zip(*np.nonzero(inspection.loss_mask[:rows])):
      dark = abs(inspection.weights[i, t]) > 0.6 * reach
      axes.text(t, i, inspection.tokens[i][t], ha='center', va='center', fontsize=8,
                color='white' if dark else 'black', parse_math=False)
  sides = inspection.sides[:rows]
  starts = [i for i, side in enumerate(sides) if i == 0 or side != sides[i - 1]]
  for start in starts[1:]:
    axes.axhline(start - 0.5, color='black', linewidth=1)
  if len(starts) > 1:
    axes.set_yticks(starts, [sides[i].removesuffix('_log_probs') for i in starts])
  else:
    axes.set_ylabel('completion')


def _sizes(inspection):
  """The first output that has a gradient, and that gradient's size as [R, T]."""
  for name, gradient in inspection.gradients.items():
    if gradient.any():
      if gradient.ndim == 3:  # over the vocabulary, or classes
        return name, np.linalg.norm(gradient, axis=-1)
      return name, np.abs(np.atleast_2d(gradient).reshape(len(gradient), -1))
  return 'its outputs', np.zeros((1, 1))


def _curve(axes, inspection):
  found = sweep.curve(inspection)
  if found is None:
    axes.text(0.5, 0.5, '\n'.join(['no weight on any token', *(
        f'{name}: {why}' for name, why in inspection.others.items())]), ha='center', va='center')
    axes.set_axis_off()
    return
  for name, y in found.lines.items():
    axes.plot(found.x, y, color=_COLOURS[name], label=name)
  for name, (x, y) in found.dots.items():
    axes.plot(x, y, 'o', color=_COLOURS[name], alpha=0.5, markersize=4)
  # Some weights grow without end: the axis ends where most of the batch and the curve are.
  seen = np.concatenate([*found.lines.values(), *(y for _, y in found.dots.values())])
  low, high = np.quantile(seen, (0.05, 0.95))
  room = 0.25 * max(high - low, 1e-3)
  axes.set_ylim(min(low, 0.0) - room, max(high, 0.0) + room)
  axes.set_xlim(found.x[0], found.x[-1])
  axes.axhline(0.0, color='0.8', linewidth=1, zorder=0)
  axes.set_xlabel(found.label)
  axes.set_ylabel(found.unit)
  axes.legend(title='line: all at once; dots: this batch', fontsize=8, title_fontsize=8)
