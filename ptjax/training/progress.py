"""What the terminal shows: a bar or, where nobody watches, a line at times; at the end a table."""

import pathlib
import sys
import time

import jax
import tqdm

from ptjax.training import charts
from ptjax.training import metrics as metrics_files


class Progress:
  """Shows how training goes, on process 0 alone.

  Args:
    total: optimizer steps of the whole run.
    initial: steps already taken when this process started.
    every_seconds: between lines where the stream is no terminal; first and last step always show.
    stream: where to write, default stderr.
    clock: returns seconds; for tests.
  """

  def __init__(self, total, *, initial=0, every_seconds=10.0, stream=None, clock=time.monotonic):
    self._total, self._initial = total, initial
    self._every_seconds, self._clock = every_seconds, clock
    self._stream = sys.stderr if stream is None else stream
    self._quiet = jax.process_index() != 0
    self._started = clock()
    self._shown = None  # when the last line was written
    self._bar = None
    if not self._quiet and self._stream.isatty():
      self._bar = tqdm.tqdm(
          total=total, initial=initial, file=self._stream, dynamic_ncols=True, leave=True,
          bar_format='{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining} {postfix}')

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def update(self, step, metrics):
    """Shows the metrics of optimizer step `step`."""
    if self._quiet:
      return
    if self._bar is not None:
      self._bar.set_postfix_str(summary(metrics), refresh=False)
      self._bar.update(step - self._bar.n)
      return
    now = self._clock()
    if self._shown is None or step >= self._total or now - self._shown >= self._every_seconds:
      self._shown = now
      done = step - self._initial
      left = (now - self._started) / done * (self._total - step) if done > 0 else None
      ending = '' if left is None else f'  {spell_seconds(left)} left'
      print(f'step {step}/{self._total}  {summary(metrics)}{ending}', file=self._stream,
            flush=True)

  def close(self):
    """Leaves the terminal as it should be."""
    if self._bar is not None:
      self._bar.close()


def summary(metrics):
  """One line of a step's metrics: stage, reward, loss, evaluation, tokens per second."""
  parts = [str(metrics['stage'])] if 'stage' in metrics else []
  for name in ('reward', 'loss'):
    if metrics.get(name) is not None:
      parts.append(f'{name} {float(metrics[name]):.4g}')
  for name in metrics_files.names([metrics], 'eval/')[:1]:  # a task's main metric comes first
    parts.append(f'{name.removeprefix("eval/")} {float(metrics[name]):.4g}')
  for name in ('perf/rollout_tokens_per_second', 'perf/train_tokens_per_second'):
    if metrics.get(name) is not None:
      parts.append(f'{float(metrics[name]):,.0f} tokens/s')
      break
  return '  '.join(parts)


def spell_seconds(seconds):
  """3725 -> '1:02:05', 65 -> '1:05'."""
  minutes, seconds = divmod(int(round(seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def final_table(out_dir):
  """Returns the table of a run's results from its metrics.jsonl."""
  return table(metrics_files.read(pathlib.Path(out_dir) / metrics_files.METRICS))


def table(records):
  """A small table: evaluations at the end of each stage, then how the last stage went.

  Args:
    records: those of metrics.jsonl.
  Returns:
    Lines of text; evaluations have the interval they were recorded with.
  """
  if not records:
    return 'no step was taken'
  stages = metrics_files.by_stage(records)
  rows = []
  for name in metrics_files.names(records, 'eval/'):
    last = [metrics_files.last(part, name) for part in stages.values()]
    rows.append((name.removeprefix('eval/'), [_estimate(record, name) for record in last]))
  lines = _align([('', list(stages))] + rows) if rows else []
  stage, part = list(stages.items())[-1]
  course = []
  for name in ('reward', 'loss', 'kl', 'entropy', 'completions/mean_length'):
    values = [r[name] for r in part if name in r]
    if values:
      course.append((name, [charts.spell(values[0]), charts.spell(values[-1])]))
  if course:
    lines += _align([(f'{stage}, {len(part)} steps', ['first', 'last'])] + course)
  return '\n'.join(lines)


def _estimate(record, name):
  if record is None:
    return ''
  interval = metrics_files.interval(record, name)
  return charts.spell(record[name]) + (
      '' if interval is None else ' [{}, {}]'.format(*(f'{edge:.3g}' for edge in interval)))


def _align(rows):
  columns = list(zip(*([label, *cells] for label, cells in rows)))
  widths = [max(len(cell) for cell in column) for column in columns]
  return ['  '.join([row[0].ljust(widths[0])]
                    + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]).rstrip()
          for row in zip(*columns)]
