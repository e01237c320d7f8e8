"""Times whole GRPO steps (rollout, reward, advantages, update) of ptjax beside peers, in one call.

  python scripts/bench_grpo.py                     # beside transformers' generate + torch
  python scripts/bench_grpo.py --peer=trl,hf --prompt=256
  python scripts/bench_grpo.py --peer=trl --setting=tuned --lengths=geometric
  python scripts/bench_grpo.py --peer=tunix --peer_python=/path/to/its/venv/bin/python
  python scripts/bench_grpo.py --peer=trl --preset=qwen2.5-0.5b --dtype=bfloat16   # on a GPU
  python scripts/bench_grpo.py --peer=none

Ours is the launcher's own run with the launcher's own settings (`--set` changes one). Peers:

  hf     `transformers`' generate and a lean torch update, see bench_peer_hf.py
  trl    TRL's GRPOTrainer with generate; as it comes it recomputes activations in the update,
         --setting=tuned keeps them
  tunix  Google's Tunix with its own rollout engine; its pins conflict with ours, so it lives in
         an environment of its own, whose interpreter --peer_python names

Each side is a process of its own on the same weights, prompts and reward (the share of low ids)
and takes its steps in turn with the others, so that all meet the same machine; a step makes one
AdamW update. Completions are all of full length or, with --lengths=geometric, as long as ours
drew them: one id of every --mean ends a completion, so lengths are nearly geometric, and peers
are made to stop where ours did, in the same step. Prints one table and one JSON line per row, and
refuses to compare where token or parameter counts differ. The peers need the `bench` extra.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile

import bench_common

PEERS = {'hf': 'bench_peer_hf.py', 'trl': 'bench_peer_trl_grpo.py',
         'tunix': 'bench_peer_tunix.py', 'none': None}
WARM_UP = {'fixed': 2, 'geometric': 12}  # steps of ours: other lengths are other programs
PEER_WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class Job(bench_common.Sizes):
  """What all sides do."""
  prompts: int = 8
  group: int = 8
  prompt: int = 32  # tokens of every prompt
  completion: int = 0  # tokens of every completion, or at most; 0: 64, of geometric lengths 512
  lengths: str = 'fixed'  # or geometric
  mean: int = 64  # tokens, of geometric lengths
  dtype: str = 'float32'  # of activations and products; weights are float32
  setting: str = 'default'  # of the peer, or tuned
  learning_rate: float = 1e-4
  seed: int = 0
  folder: str = ''  # model, prompts, and what a run writes

  def __post_init__(self):
    if not self.completion:
      object.__setattr__(self, 'completion', 64 if self.lengths == 'fixed' else 512)


def parse(argv=None):
  """Returns (arguments, Job)."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  choices = {'lengths': ('fixed', 'geometric'), 'dtype': ('float32', 'bfloat16'),
             'setting': ('default', 'tuned')}
  Job.add_flags(parser, choices=choices, hidden=('folder',))
  parser.add_argument('--preset', choices=('qwen2.5-0.5b', 'qwen2.5-1.5b'),
                      help='the shape of this model in place of layers, width, ... and vocab')
  parser.add_argument('--peer', default='hf', help=f'one or several of {", ".join(PEERS)}')
  parser.add_argument('--peer_python', help='interpreter of the peers; default: this one')
  parser.add_argument('--repetitions', type=int, default=7, help='timed steps of each side')
  parser.add_argument('--warm_up', type=int, help='steps of ours before those; default: 2, of '
                      'geometric lengths 12')
  parser.add_argument('--set', action='append', default=[], help='a setting of ours to change')
  parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
  arguments = parser.parse_args(argv)
  arguments.peers = [name for name in arguments.peer.split(',') if name != 'none']
  for name in arguments.peers:
    if name not in PEERS:
      parser.error(f'--peer={name}: expected one or several of {", ".join(PEERS)}')
  if 'tunix' in arguments.peers and arguments.lengths != 'fixed':
    parser.error('--peer=tunix: its sampler cannot be made to stop where ours did; take '
                 '--lengths=fixed')
  return arguments, Job.parsed(arguments)


# --- what all sides read; peers import it without ptjax


def stop_ids(job):
  """The token ids that end a completion, where any does: of uniform draws one in `mean`."""
  return list(range(1, job.vocab, job.mean))


def prompt_ids(job):
  """The prompts, `prompts` lists of `prompt` token ids, none of which ends a completion."""
  import random
  draw = random.Random(job.seed)
  ids = sorted(set(range(3, job.vocab)) - set(stop_ids(job)))
  return [[draw.choice(ids) for _ in range(job.prompt)] for _ in range(job.prompts)]


def text(ids):
  """Token ids as the tokenizer of `bench_common.write_model` reads them."""
  return ' '.join(f'w{i - 3}' for i in ids)


def low_ids(prompts, completions, *, completion_ids, vocab, **columns):
  """The reward of every side: the share of ids in the lower half of the vocabulary.

  Args:
    prompts, completions: unused, as are further columns.
    completion_ids: B lists of token ids.
    vocab: B times the size of the vocabulary.
  """
  del prompts, completions, columns
  return [sum(i < size / 2 for i in ids) / max(1, len(ids))
          for ids, size in zip(completion_ids, vocab)]


# --- our worker


def ptjax_worker(arguments, job):
  """Our side: the launcher, which waits for the parent before each step."""
  turns = bench_common.Turns()
  turns.wait()
  compiles = bench_common.compilations()
  import jax
  import transformers

  from ptjax import assembly
  from ptjax import launch
  from ptjax.models import hub
  from ptjax.training import experience
  # `transformers` gives every Qwen2 directory Qwen's own tokenizer, whatever is there.
  hub.load_tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained
  options_of, texts = assembly.sampling_options, experience.texts
  drawn = []  # lengths of the completions of this step

  def without_stop(*settings):
    return dataclasses.replace(options_of(*settings), stop_ids=())

  def noted(rollouts, tokenizer):
    drawn.extend(rollouts.loss_mask.sum(1).tolist())
    return texts(rollouts, tokenizer)

  if job.lengths == 'fixed':
    assembly.sampling_options = without_stop
  experience.texts = noted
  rollout_seconds = []

  def around_batch(run, function):
    del run

    def timed(*args):
      found = function(*args)
      rollout_seconds.append(found[1]['timing_s/rollout'])
      return found
    return timed

  def around_step(step):
    def reported(state, batch):
      out = jax.block_until_ready(step(state, batch))
      lengths, drawn[:] = list(drawn), ()
      turns.done(
          **bench_common.facts('ptjax', compiles), lengths=lengths,
          rollout=rollout_seconds.pop(), prompt_tokens=job.prompts * job.prompt,
          parameters=sum(leaf.size for leaf in jax.tree.leaves(out[0].params)))
      turns.wait()
      return out
    return reported

  bench_common.around_steps(around_batch, around_step)
  changes = [
      f'rollout.num_prompts={job.prompts}', f'rollout.group_size={job.group}',
      f'rollout.max_completion_tokens={job.completion}', f'data.max_prompt_tokens={job.prompt}',
      f'optimizer.learning_rate={job.learning_rate}', f'model_settings.dtype={job.dtype}',
      'checkpoint.every_steps=1000000', 'log.samples_every=1000000', 'log.tensorboard=False',
      f'log.compile_cache={job.folder}/compiled', *arguments.set]
  return launch.main([
      'launch', '--algo=grpo', f'--model={job.folder}/model', '--steps=1000000',
      f'--dataset={job.folder}/prompts.jsonl', f'--reward={os.path.abspath(__file__)}:low_ids',
      f'--seed={job.seed}', f'--out_dir={job.folder}/run', '--resume=never',
      *(f'--set={change}' for change in changes)])


# --- the parent


def prepare(job):
  """Writes the model and the prompts that all sides read."""
  import jax
  jax.config.update('jax_platforms', 'cpu')  # a GPU is for the workers
  bench_common.write_model(
      f'{job.folder}/model', family='qwen2', seed=job.seed, **job.model_fields(),
      max_length=max(1024, job.prompt + job.completion), stop_ids=stop_ids(job))
  with open(f'{job.folder}/prompts.jsonl', 'w', encoding='utf-8') as file:
    for ids in prompt_ids(job):
      file.write(json.dumps({'prompt': text(ids), 'vocab': job.vocab}) + '\n')


class Side:
  """A worker, and what it did."""

  def __init__(self, script, job, more=(), python=None):
    self._worker = bench_common.Worker(script, [*job.flags(), *more], python=python)
    self.kill = self._worker.kill
    self.warm_up, self.runs = [], []

  def step(self, lengths=None, *, timed):
    """Takes a step; a peer's completions get these lengths. Returns what the worker says of it."""
    found = self._worker.ask(lengths)
    (self.runs if timed else self.warm_up).append(found)
    return found

  def row(self, job):
    """What this side did, medians over its timed steps."""
    median = lambda name: statistics.median(run[name] for run in self.runs)
    seconds = [run['seconds'] for run in self.runs]
    tokens = sum(sum(run['lengths']) for run in self.runs)
    last = self.runs[-1]
    return {
        'bench': 'grpo', 'name': last['name'], 'versions': last['versions'],
        'device': last['device'], 'job': dataclasses.asdict(job), 'repetitions': len(seconds),
        'rollout_seconds': median('rollout'),
        'update_seconds': statistics.median(run['seconds'] - run['rollout'] for run in self.runs),
        'step_seconds': median('seconds'), 'step_seconds_min': min(seconds),
        'step_seconds_max': max(seconds), 'cpu_seconds': median('cpu'),
        'cores_used': sum(run['cpu'] for run in self.runs) / sum(seconds),
        'completion_tokens': tokens / len(seconds), 'tokens_per_second': tokens / sum(seconds),
        'longest': max(max(run['lengths']) for run in self.runs),
        'parameters': last['parameters'], 'prompt_tokens': last['prompt_tokens'],
        'peak_rss_mib': last['peak_rss_mib'], 'peak_device_mib': last['peak_device_mib'],
        'first_step_seconds': self.warm_up[0]['seconds'],
        'compile_seconds': last['compile_seconds'], 'compilations': last['compilations'],
        'compilations_timed': last['compilations'] - self.warm_up[-1]['compilations'],
        'machine': bench_common.machine()}


def check_comparable(sides):
  """Raises SystemExit where the sides did different work."""
  ours, *peers = sides
  for peer in peers:
    for mine, other in zip(ours.runs, peer.runs, strict=True):
      for name in ('prompt_tokens', 'parameters'):
        if other[name] != mine[name]:
          raise SystemExit(f'not comparable: {name} {mine[name]} and {other[name]}')
      if sorted(other['lengths']) != sorted(mine['lengths']):
        raise SystemExit(f'not comparable: a step with {sum(mine["lengths"])} completion tokens '
                         f'and {sum(other["lengths"])}, or of other lengths')


def print_table(rows):
  """Prints medians, and what each row takes as multiples of the first row's."""
  columns = {
      'rollout s': ('rollout_seconds', '.3f'), 'rest s': ('update_seconds', '.3f'),
      'step s': ('step_seconds', '.3f'), 'CPU s': ('cpu_seconds', '.2f'),
      'tokens/s': ('tokens_per_second', '.0f'), 'cores': ('cores_used', '.2f'),
      'RSS MiB': ('peak_rss_mib', '.0f'), 'GPU MiB': ('peak_device_mib', '.0f'),
      'first s': ('first_step_seconds', '.1f'), 'programs': ('compilations', 'd'),
      'compile s': ('compile_seconds', '.1f')}
  header, *lines = bench_common.table(rows, columns)
  print(header + '   times ptjax: step, CPU, RSS')
  for line, row in zip(lines, rows):
    row['times_ptjax'] = {
        name: row[name] / rows[0][name]
        for name in ('step_seconds', 'cpu_seconds', 'peak_rss_mib', 'rollout_seconds',
                     'update_seconds')}
    print(line + '   '
          + ' '.join(f'{ratio:5.2f}x' for ratio in list(row['times_ptjax'].values())[:3]))


def main():
  arguments, job = parse()
  if arguments.worker:
    from ptjax import huge_pages
    huge_pages.restart()  # as the launcher does
    return ptjax_worker(arguments, job)
  if arguments.preset:
    from ptjax.models import presets
    job = job.of_model(presets.get(arguments.preset))
  folder = tempfile.mkdtemp(prefix='bench_grpo_')
  sides = []
  try:
    compare(arguments, dataclasses.replace(job, folder=folder), sides)
  finally:
    for side in sides:
      side.kill()
    shutil.rmtree(folder, ignore_errors=True)


def compare(arguments, job, sides):
  """Runs all sides in turn and prints what they did; `sides` gets them as they start."""
  prepare(job)
  sides.append(Side('bench_grpo.py', job, [f'--set={change}' for change in arguments.set]))
  lengths = [sides[0].step(timed=False)['lengths']
             for _ in range(arguments.warm_up or WARM_UP[job.lengths])]
  for name in arguments.peers:
    sides.append(Side(PEERS[name], job, python=arguments.peer_python))
    for some in lengths[:PEER_WARM_UP]:
      sides[-1].step(some, timed=False)
  for _ in range(arguments.repetitions):
    found = sides[0].step(timed=True)
    for side in sides[1:]:
      side.step(found['lengths'], timed=True)
    check_comparable(sides)
    print(', '.join(f'{run["name"]} {run["seconds"]:.2f} s ({run["cpu"]:.2f} CPU)'
                    for run in (side.runs[-1] for side in sides)), file=sys.stderr, flush=True)
  rows = [side.row(job) for side in sides]
  print_table(rows)
  for row in rows:
    print(json.dumps(row))


if __name__ == '__main__':
  sys.exit(main())
