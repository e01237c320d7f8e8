"""Times the start of the default job, from the creation of the process to its first steps.

  python scripts/bench_startup.py                  # cold, then warm
  python scripts/bench_startup.py --peer=trl       # and a start of TRL's GRPOTrainer
  python scripts/bench_startup.py --set=model=...  # of another job

`cold` finds no compiled program in its cache folder, `warm` is a second start with the same folder.
The job is the launcher's own with a warm start of one step instead of 640, so that the first step
of GRPO comes soon. Each start is a process of its own; they come in turn, and medians are printed:
one table of the two moments (the end of the first supervised step, of the first GRPO step), one of
where the time before the last of them goes, and one JSON line per row. The peer, which needs the
`bench` extra, takes one step of a model of the same size on as many prompts, completions and
tokens.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time

import bench_common

PEERS = {'trl': 'bench_peer_trl_start.py', 'none': None}
# What a start consists of, in order; the first found while another is running counts there.
PARTS = ('imports', 'model, data', 'weights, optimizer', 'evaluation', 'batch', 'step')


def parse(argv=None):
  """Returns the arguments."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--peer', choices=sorted(PEERS), default='none')
  parser.add_argument('--repetitions', type=int, default=3, help='starts of each kind')
  parser.add_argument('--set', action='append', default=[], help='a setting of the job to change')
  parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
  parser.add_argument('--folder', default='', help=argparse.SUPPRESS)
  return parser.parse_args(argv)


class Watch:
  """Says at each stage's first step how long everything took, and ends the process at the last."""

  def __init__(self, stages):
    self._out = bench_common.own_output()
    self._stages, self._seen = stages, 0
    self._parts = {name: {'seconds': 0.0, 'compile_seconds': 0.0} for name in PARTS}
    self._inside = False
    self.compiles = bench_common.compilations()
    self._traced = bench_common.durations('/jax/core/compile/jaxpr_trace_duration',
                                          '/jax/core/compile/jaxpr_to_mlir_module_duration')

  @contextlib.contextmanager
  def part(self, name):
    """Counts what happens inside as `name`, unless another part is being counted already."""
    if self._inside:
      yield
      return
    self._inside = True
    started, compiled = time.perf_counter(), sum(self.compiles)
    try:
      yield
    finally:
      self._inside = False
      self._parts[name]['seconds'] += time.perf_counter() - started
      self._parts[name]['compile_seconds'] += sum(self.compiles) - compiled

  def wrap(self, name, function):
    """Returns `function`, counted as `name`."""
    @functools.wraps(function)
    def counted(*args, **kwargs):
      with self.part(name):
        return function(*args, **kwargs)
    return counted

  def first_step(self):
    """Reports a stage's first step."""
    self._seen += 1
    print(json.dumps({
        'seconds': time.time() - bench_common.process_started(), 'cpu': time.process_time(),
        'programs': len(self.compiles), 'compile_seconds': sum(self.compiles),
        'trace_seconds': sum(self._traced), 'parts': self._parts}), file=self._out, flush=True)
    if self._seen == self._stages:
      os._exit(0)  # what the run would do next, writing checkpoints, is not its start


def worker(arguments):
  """One start of the launcher."""
  watch = Watch(stages=2)
  with watch.part('imports'):
    import jax

    from ptjax import assembly
    from ptjax import doors
    from ptjax import job
    from ptjax import launch
    from ptjax import stage_run
  run = stage_run.StageRun
  assembly.load_policies = watch.wrap('model, data', assembly.load_policies)
  doors.load_data = watch.wrap('model, data', doors.load_data)
  for name in ('__init__', 'begin', 'source'):
    setattr(run, name, watch.wrap('weights, optimizer', getattr(run, name)))
  evaluation = job._Run._evaluation
  job._Run._evaluation = lambda self, made: watch.wrap('evaluation', evaluation(self, made))

  def around_step(step):
    first = True

    def watched(state, batch):
      nonlocal first
      with watch.part('step'):
        out = step(state, batch)
        if first:
          jax.block_until_ready(out)
      if first:
        watch.first_step()
        first = False
      return out
    return watched

  bench_common.around_steps(lambda run, function: watch.wrap('batch', function), around_step)
  out = tempfile.mkdtemp(dir=arguments.folder)
  changes = ['warm_start.steps=1', f'log.compile_cache={arguments.folder}/compiled', *arguments.set]
  return launch.main(['launch', '--algo=grpo', f'--out_dir={out}/run',
                      *(f'--set={change}' for change in changes)])


# --- the parent


def start(name, script, argv, environment=()):
  """Starts a worker and returns what it said at each first step."""
  process = bench_common.Worker(script, argv, environment)
  try:
    said = [process.read()]
    if name != 'trl':
      said.append(process.read())
  finally:
    process.kill()
  return said


def row_of(name, starts, arguments):
  """Medians over starts of one kind."""
  def median(step, key):
    return statistics.median(said[step][key] for said in starts)
  versions = starts[-1][-1].get('versions')
  if versions is None:
    import jax
    versions = {'jax': jax.__version__}
  row = {'bench': 'startup', 'name': name, 'set': arguments.set, 'repetitions': len(starts),
         'versions': versions, 'machine': bench_common.machine()}
  for step, label in enumerate(['first_step', 'grpo_step'][:len(starts[0])]):
    for key in ('seconds', 'cpu', 'programs', 'compile_seconds', 'trace_seconds'):
      if key in starts[0][step]:
        row[f'{label}_{key}'] = median(step, key)
  if 'parts' in starts[0][-1]:
    row['parts'] = {part: {key: statistics.median(said[-1]['parts'][part][key] for said in starts)
                           for key in ('seconds', 'compile_seconds')} for part in PARTS}
  return row


def print_tables(rows):
  """Prints when the first steps ended, and what the time went to."""
  titles = {'seconds': 's', 'cpu': 'CPU s', 'programs': 'programs', 'compile_seconds': 'compile s',
            'trace_seconds': 'trace s'}
  print(f'{"start":8}{"until":12}' + ''.join(f'{title:>11}' for title in titles.values()))
  for row in rows:
    for label, said in (('first_step', 'first step'), ('grpo_step', 'GRPO step')):
      cells = [row.get(f'{label}_{key}') for key in titles]
      if cells[0] is not None:
        print(f'{row["name"]:8}{said:12}' + ''.join(
            f'{"-" if cell is None else format(cell, "d" if key == "programs" else ".2f"):>11}'
            for key, cell in zip(titles, cells)))
  shown = [row for row in rows if 'parts' in row]
  print(f'\n{"part":22}' + ''.join(f'{row["name"] + " s":>10}{"compile":>10}' for row in shown))
  for part in PARTS:
    print(f'{part:22}' + ''.join(
        f'{row["parts"][part]["seconds"]:10.2f}{row["parts"][part]["compile_seconds"]:10.2f}'
        for row in shown))
  print(f'{"else":22}' + ''.join(
      f'{row["grpo_step_seconds"] - sum(p["seconds"] for p in row["parts"].values()):10.2f}{"":10}'
      for row in shown))


def main():
  arguments = parse()
  if arguments.worker:
    from ptjax import huge_pages
    huge_pages.restart()  # as the launcher does
    return worker(arguments)
  folder = tempfile.mkdtemp(prefix='bench_startup_')
  found = {'cold': [], 'warm': []}
  try:
    if arguments.peer != 'none':
      found[arguments.peer] = []
      bench_common.write_model(f'{folder}/model', vocab_size=32)  # as large as the default job's
    for turn in range(arguments.repetitions):
      own = f'{folder}/{turn}'
      os.mkdir(own)
      argv = [f'--folder={own}', *(f'--set={change}' for change in arguments.set)]
      for name in found:
        ours = name in ('cold', 'warm')
        script = 'bench_startup.py' if ours else PEERS[name]
        found[name].append(start(name, script, argv if ours else [f'--folder={folder}']))
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  rows = [row_of(name, starts, arguments) for name, starts in found.items()]
  print_tables(rows)
  for row in rows:
    print(json.dumps(row))


if __name__ == '__main__':
  sys.exit(main())
