"""Line charts as inline SVG: text in, text out, nothing fetched when the page is opened."""

import html
import math

WIDTH, HEIGHT = 340, 190  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 24  # margins around the plot
MAX_POINTS = 400  # per chart; more are thinned, keeping every extreme that can be seen


def line_chart(name, segments, bands=()):
  """Draws one metric over optimizer steps.

  Args:
    name: the metric, for the tooltip and `data-metric`.
    segments: lists of (step, value), each drawn as one unbroken line; values are finite.
    bands: (step, low, high) intervals, drawn as vertical bars.
  Returns:
    An <svg> element. Its `data-range` holds the steps and values at the plot's edges,
    `x0 x1 y0 y1`, so that every point can be read back from the drawing.
  """
  x0, x1, y0, y1 = _range(segments, bands)

  def place(step, value):
    x = LEFT + (step - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
    y = HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
    return f'{x:.2f},{y:.2f}'

  parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-metric="{html.escape(name)}" '
           f'data-range="{x0!r} {x1!r} {y0!r} {y1!r}"><title>{html.escape(name)}</title>']
  for value in ticks(y0, y1):
    _, y = place(x0, value).split(',')
    parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
                 f'<text class="tick" x="{LEFT - 5}" y="{y}" dy="0.32em" text-anchor="end">'
                 f'{spell(value)}</text>')
  for step in ticks(x0, x1):
    x, _ = place(step, y0).split(',')
    parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - 7}" text-anchor="middle">'
                 f'{spell(step)}</text>')
  for step, low, high in bands:
    x, bottom = place(step, low).split(',')
    _, top = place(step, high).split(',')
    parts.append(f'<line class="band" x1="{x}" x2="{x}" y1="{bottom}" y2="{top}"/>')
  total = sum(len(segment) for segment in segments)
  for segment in segments:
    points = thin(segment, max(MAX_POINTS * len(segment) // max(total, 1), 4))
    parts.append(f'<polyline points="{" ".join(place(*point) for point in points)}"/>')
    if len(points) == 1 or total <= 40:
      for point in points:
        x, y = place(*point).split(',')
        parts.append(f'<circle cx="{x}" cy="{y}" r="2"/>')
  return ''.join(parts) + '</svg>'


def thin(points, limit):
  """Keeps at most about `limit` of (step, value) points: of each run its lowest and highest."""
  if len(points) <= limit:
    return list(points)
  runs = max(limit // 2 - 1, 1)
  inner = points[1:-1]
  kept = {0, len(points) - 1}
  for i in range(runs):
    start, stop = 1 + len(inner) * i // runs, 1 + len(inner) * (i + 1) // runs
    if start < stop:
      kept.add(min(range(start, stop), key=lambda j: points[j][1]))
      kept.add(max(range(start, stop), key=lambda j: points[j][1]))
  return [points[i] for i in sorted(kept)]


def ticks(low, high, count=4):
  """About `count` round numbers within [low, high]."""
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  size = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
  first = math.ceil(low / size - 1e-9)
  return [i * size for i in range(first, math.floor(high / size + 1e-9) + 1)]


def spell(value):
  """A number short enough for a table or an axis: four digits of a float; None is not finite."""
  if value is None:
    return 'not finite'
  if isinstance(value, int):
    return f'{value:,}'
  return f'{value:.4g}'


def _range(segments, bands):
  """Steps and values at the plot's edges; never empty, never without extent."""
  steps = [x for segment in segments for x, _ in segment]
  values = [y for segment in segments for _, y in segment]
  values += [edge for _, low, high in bands for edge in (low, high)]
  x0, x1, y0, y1 = min(steps), max(steps), min(values), max(values)
  if x0 == x1:
    x0, x1 = x0 - 1, x1 + 1
  margin = 0.05 * (y1 - y0)
  if margin <= 1e-9 * max(abs(y0), abs(y1)):
    margin = 0.1 * max(abs(y0), abs(y1)) or 1.0
  return float(x0), float(x1), float(y0 - margin), float(y1 + margin)
