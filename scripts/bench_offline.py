"""Times supervised and preference training of ptjax beside TRL's trainers, in one call.

  python scripts/bench_offline.py                                  # sft beside SFTTrainer
  python scripts/bench_offline.py --method=dpo --setting=tuned
  python scripts/bench_offline.py --model=DIR --dataset=FILE.jsonl --prompt=512 --completion=256
  python scripts/bench_offline.py --peer=none

Ours is the launcher's own job, the peer is TRL's SFTTrainer or DPOTrainer: the same weights from
one Hugging Face directory, the same file, equally many examples per step, float32, AdamW. Without
--model and --dataset both are made: random weights of the shape below, a tokenizer of words, rows
of random words whose completions have log-normal lengths. Settings:

  default  each side as it comes: ptjax packs (sft) or batches rows of like length and keeps the
           reference's log-probs (dpo); TRL pads, recomputes activations, runs the reference
  padded   neither packs; both batch rows of like length (dpo: ours does), TRL keeps activations
  tuned    TRL packs too, into rows as wide as ours (sft), or keeps the reference's log-probs
           (dpo), and keeps activations

Each side is a process of its own and passes the file in turn with the other: one pass to warm up,
then --repetitions timed ones. A further start of ours finds its programs compiled (`warm s`).
Prints one table and one JSON line per row, and refuses to compare where the sides trained on
different numbers of tokens. The peer needs the `bench` extra.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time

import bench_common

PEERS = {'trl': 'bench_peer_trl_offline.py', 'none': None}
SETTINGS = ('default', 'padded', 'tuned')


@dataclasses.dataclass(frozen=True)
class Job(bench_common.Sizes):
  """What both sides do."""
  method: str = 'sft'
  setting: str = 'default'
  model: str = ''  # directory; empty: random weights of the shape below
  dataset: str = ''  # .jsonl of prompt and completion, or chosen and rejected; empty: made
  rows: int = 128  # of a made file
  batch: int = 16  # examples per step
  prompt: int = 64  # tokens of the longest prompt
  completion: int = 256  # tokens of the longest completion, its end token included
  mean: int = 64  # tokens of a made completion, about
  learning_rate: float = 1e-4
  seed: int = 0
  row_tokens: int = 0  # width of packed rows, and how many a step takes; as ours chooses
  row_count: int = 0
  folder: str = ''  # for what a run writes


def parse(argv=None):
  """Returns (arguments, Job)."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  choices = {'method': ('sft', 'dpo'), 'setting': SETTINGS}
  Job.add_flags(parser, choices=choices, hidden=('row_tokens', 'row_count', 'folder'))
  parser.add_argument('--peer', choices=sorted(PEERS), default='trl')
  parser.add_argument('--repetitions', type=int, default=3, help='timed passes of each side')
  parser.add_argument('--set', action='append', default=[], help='a setting of ours to change')
  parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
  arguments = parser.parse_args(argv)
  return arguments, Job.parsed(arguments)


# --- what both sides read


def make_rows(job, path):
  """Writes rows of random words; the lengths of completions are log-normal around `mean`."""
  import numpy as np
  rng = np.random.default_rng(job.seed)

  def words(low, high, size):
    count = int(np.clip(size, low, high))
    return ' '.join(f'w{i}' for i in rng.integers(job.vocab - 3, size=count))
  parts = ('completion',) if job.method == 'sft' else ('chosen', 'rejected')
  with open(path, 'w', encoding='utf-8') as file:
    for _ in range(job.rows):
      row = {'prompt': words(4, job.prompt, rng.integers(8, job.prompt + 1))}
      for part in parts:
        row[part] = ' ' + words(4, job.completion - 1, rng.lognormal(np.log(job.mean), 0.6))
      file.write(json.dumps(row) + '\n')
  return path


# --- a worker: a line when its first step is done, when it has passed the file once, and then one
# --- for each pass that a line on its standard input asks for


class Reporter:
  """Tells the parent what happens between the steps of a trainer.

  `step` is called after every step. Standard output, on which trainers print, becomes standard
  error.
  """

  def __init__(self, steps_per_pass, facts):
    """Starts at the creation of the process.

    Args:
      steps_per_pass: `() -> int`, asked after the first step.
      facts: `() -> dict` about this side, asked after the first pass.
    """
    self._out = bench_common.own_output()
    self._steps_per_pass, self._facts = steps_per_pass, facts
    self._steps = self._tokens = 0
    self._started = self._cpu = None

  def step(self, tokens, wait):
    """Counts a step; at the end of a pass, waits for the parent.

    Args:
      tokens: that the step trained on.
      wait: `wait()` returns when the step is computed.
    Returns:
      Whether to go on.
    """
    self._steps += 1
    self._tokens += tokens
    if self._steps == 1:
      wait()
      self._say(start_seconds=time.time() - bench_common.process_started(),
                start_cpu=time.process_time(), **self._facts())
    if self._steps % self._steps_per_pass():
      return True
    wait()
    seconds, cpu = 0.0, 0.0
    if self._started is not None:
      seconds, cpu = time.perf_counter() - self._started, time.process_time() - self._cpu
    self._say(seconds=seconds, cpu=cpu, trained_tokens=self._tokens,
              steps=self._steps_per_pass(), peak_rss_mib=bench_common.peak_rss_mib(),
              **self._facts())
    self._tokens = 0
    if not sys.stdin.readline():
      return False
    self._started, self._cpu = time.perf_counter(), time.process_time()
    return True

  def _say(self, **values):
    print(json.dumps(values), file=self._out, flush=True)


def ptjax_worker(arguments, job):
  """Our side: the launcher, with a reporter behind its train step."""
  compiles = bench_common.compilations()
  import jax

  from ptjax import launch
  doors = []

  def facts():
    door = doors[-1]
    packed = hasattr(door, 'width')
    return {
        **bench_common.facts('ptjax', compiles), 'row_tokens': door.width if packed else 0,
        'row_count': door.rows_per_batch if packed else 0}

  reporter = Reporter(lambda: doors[-1].steps_per_epoch, facts)
  trained = []

  def around_batch(run, function):
    doors.append(run._data.doors[run.plan.stage.index])

    def counted(*arguments):
      found = function(*arguments)
      trained.append(found[1]['train_tokens'])
      return found
    return counted

  def around_step(step):
    def reported(state, batch):
      out = step(state, batch)
      if not reporter.step(trained.pop(), lambda: jax.block_until_ready(out)):
        signal.raise_signal(signal.SIGTERM)  # the loop saves and leaves
      return out
    return reported

  bench_common.around_steps(around_batch, around_step)
  changes = [
      f'training.batch_size={job.batch}', f'optimizer.learning_rate={job.learning_rate}',
      f'data.max_prompt_tokens={job.prompt}', f'rollout.max_completion_tokens={job.completion}',
      f'data.packing={job.setting != "padded"}', 'checkpoint.every_steps=1000000',
      f'data.reference_cache={job.folder}/log_probs',
      f'log.compile_cache={job.folder}/compiled', *arguments.set]
  out = tempfile.mkdtemp(dir=job.folder)
  return launch.main([
      'launch', f'--algo={job.method}', f'--model={job.model}', f'--dataset={job.dataset}',
      '--steps=1000000', f'--seed={job.seed}', f'--out_dir={out}/run',
      *(f'--set={change}' for change in changes)])


# --- the parent


class Side:
  """A worker past its first step."""

  def __init__(self, script, job, more=()):
    self._worker = bench_common.Worker(
        script, [*job.flags(), *more],
        {'HF_DATASETS_CACHE': os.path.join(job.folder, 'datasets')})
    self.close, self.kill = self._worker.close, self._worker.kill
    self.first = self._worker.read()
    self.warm_up, self.runs = None, []

  def warm(self):
    """Lets the worker finish its first pass."""
    self.warm_up = self._worker.read()

  def run(self):
    """Lets the worker pass the file once more."""
    self.runs.append(self._worker.ask())

  def row(self, job, warm_start):
    """What this side did, medians over its passes."""
    median = lambda name: statistics.median(run[name] for run in self.runs)
    seconds = [run['seconds'] for run in self.runs]
    last = self.runs[-1]
    return {
        'bench': 'offline', 'name': last['name'], 'job': dataclasses.asdict(job),
        'dtype': 'float32', 'versions': last['versions'], 'device': last['device'],
        'repetitions': len(seconds), 'pass_seconds': median('seconds'),
        'pass_seconds_min': min(seconds), 'pass_seconds_max': max(seconds),
        'pass_cpu_seconds': median('cpu'), 'steps_per_pass': last['steps'],
        'trained_tokens_per_pass': last['trained_tokens'],
        'tokens_per_second': last['trained_tokens'] / median('seconds'),
        'tokens_per_cpu_second': last['trained_tokens'] / median('cpu'),
        'cores_used': median('cpu') / median('seconds'), 'peak_rss_mib': last['peak_rss_mib'],
        'compile_seconds': last['compile_seconds'], 'compilations': last['compilations'],
        'row_tokens': last['row_tokens'], 'row_count': last['row_count'],
        'start_seconds': self.first['start_seconds'], 'start_cpu_seconds': self.first['start_cpu'],
        'warm_start_seconds': warm_start and warm_start['start_seconds'],
        'warm_start_cpu_seconds': warm_start and warm_start['start_cpu'],
        'machine': bench_common.machine()}


def check_comparable(sides):
  """Raises SystemExit where the two sides did different work."""
  for name, words in (('trained_tokens', 'tokens trained on'), ('steps', 'optimizer steps')):
    counts = [sorted({run[name] for run in side.runs}) for side in sides]
    if any(count != counts[0] or len(count) > 1 for count in counts):
      raise SystemExit(f'not comparable: {words} in a pass: '
                       + ' and '.join(', '.join(map(str, count)) for count in counts))


def print_table(rows):
  """Prints medians, and each row's throughput and memory as ratios: the first row's over its."""
  columns = {
      'pass s': ('pass_seconds', '.2f'), 'CPU s': ('pass_cpu_seconds', '.2f'),
      'tokens/s': ('tokens_per_second', '.0f'), '/CPU s': ('tokens_per_cpu_second', '.0f'),
      'cores': ('cores_used', '.2f'), 'RSS MiB': ('peak_rss_mib', '.0f'),
      'start s': ('start_seconds', '.1f'), 'its CPU': ('start_cpu_seconds', '.1f'),
      'warm s': ('warm_start_seconds', '.1f'), 'its CPU ': ('warm_start_cpu_seconds', '.1f'),
      'programs': ('compilations', 'd'), 'compile s': ('compile_seconds', '.1f')}
  header, *lines = bench_common.table(rows, columns)
  print(header + '   ours/its tokens/s, CPU, RSS')
  for line, row in zip(lines, rows):
    row['ours_over_its'] = {
        name: rows[0][name] / row[name]
        for name in ('tokens_per_second', 'tokens_per_cpu_second', 'peak_rss_mib')}
    print(line + '   ' + ' '.join(f'{ratio:5.2f}x' for ratio in row['ours_over_its'].values()))


def main():
  arguments, job = parse()
  if arguments.worker:
    from ptjax import huge_pages
    huge_pages.restart()  # as the launcher does
    return ptjax_worker(arguments, job)
  folder = tempfile.mkdtemp(prefix='bench_offline_')
  try:
    compare(arguments, dataclasses.replace(
        job, folder=folder, model=job.model or bench_common.write_model(
            f'{folder}/model', seed=job.seed, **job.model_fields()),
        dataset=job.dataset or make_rows(job, f'{folder}/rows.jsonl')))
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def compare(arguments, job):
  """Runs both sides in turn and prints what they did."""
  changes = [f'--set={change}' for change in arguments.set]
  sides = [Side('bench_offline.py', job, changes)]
  try:
    sides[0].warm()
    if PEERS[arguments.peer]:
      if job.setting == 'tuned':
        job = dataclasses.replace(job, row_tokens=sides[0].first['row_tokens'],
                                  row_count=sides[0].first['row_count'])
      sides.append(Side(PEERS[arguments.peer], job))
      sides[-1].warm()
    for _ in range(arguments.repetitions):
      for side in sides:
        side.run()
    check_comparable(sides)
    for side in sides:
      side.close()
    again = Side('bench_offline.py', job, changes)
    again.kill()
  finally:
    for side in sides:
      side.kill()
  rows = [side.row(job, again.first if side is sides[0] else None) for side in sides]
  print_table(rows)
  for row in rows:
    print(json.dumps(row))


if __name__ == '__main__':
  sys.exit(main())
