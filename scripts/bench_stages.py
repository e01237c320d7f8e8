"""Where the time of an online step goes, and what a critic and a reward model add to it.

  python scripts/bench_stages.py                   # the default size: 8 prompts x 8, 32 + 64 tokens
  python scripts/bench_stages.py --steps=30 --width=128

Runs the launcher itself, arm by arm, on random weights of one shape: GRPO with a reward function;
PPO with the same, its critic a head on the policy or a model of its own; both PPOs with a reward
model of the policy's size. Prints the median seconds of each stage of a step, and `overhead`: the
part of a step's wall clock, as a fraction, that lies outside rollout, log-probs, reward and update.
Steps that compile are left out, as are the first two.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time

import bench_common

ARMS = {
    'grpo': ('--algo=grpo', '--reward=length(target=40)'),
    'ppo, head': ('--algo=ppo', '--reward=length(target=40)'),
    'ppo, model': ('--algo=ppo', '--reward=length(target=40)', '--set=critic=model'),
    'ppo, head, reward model': ('--algo=ppo', '--reward=model:{scorer}'),
    'ppo, model, reward model': ('--algo=ppo', '--reward=model:{scorer}', '--set=critic=model'),
}
STAGES = ('rollout', 'reward', 'log_probs', 'update')


@dataclasses.dataclass(frozen=True)
class Job(bench_common.Sizes):
  """What every arm does."""
  prompts: int = 8
  group: int = 8
  prompt: int = 32  # tokens of every prompt
  completion: int = 64  # tokens of a completion, at most
  steps: int = 12


def parse(argv=None):
  """Returns (arguments, Job)."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  Job.add_flags(parser)
  parser.add_argument('--arms', nargs='+', choices=ARMS, default=list(ARMS))
  arguments = parser.parse_args(argv)
  return arguments, Job.parsed(arguments)


def prepare(job, folder):
  """Writes policy, reward model and prompts."""
  import numpy as np
  for name, labels in (('policy', 0), ('scorer', 1)):
    bench_common.write_model(
        folder / name, seed=labels, num_labels=labels, **job.model_fields())
  rng = np.random.default_rng(0)
  with open(folder / 'prompts.jsonl', 'w', encoding='utf-8') as file:
    for row in rng.integers(job.vocab - 3, size=(64, job.prompt)):
      file.write(json.dumps({'prompt': ' '.join(f'w{i}' for i in row)}) + '\n')


def run(name, job, folder):
  """Trains one arm; returns its row."""
  from ptjax import launch
  from ptjax.training import metrics as metrics_files
  written = []
  write = metrics_files.MetricsWriter.write

  def noted(self, step, metrics):
    write(self, step, metrics)
    written.append((time.perf_counter(), metrics))
  metrics_files.MetricsWriter.write = noted
  sizes = {
      'training.steps': job.steps, 'rollout.num_prompts': job.prompts,
      'rollout.group_size': job.group, 'rollout.max_completion_tokens': job.completion,
      'data.max_prompt_tokens': job.prompt, 'checkpoint.every_steps': 10**6,
      'log.compile_cache': folder / 'compiled', 'log.report': False}
  try:
    code = launch.main([
        'launch', *(argument.format(scorer=folder / 'scorer') for argument in ARMS[name]),
        f'--model={folder / "policy"}', f'--dataset={folder / "prompts.jsonl"}',
        f'--out_dir={folder / name.replace(", ", "-").replace(" ", "_")}',
        *(f'--set={key}={value}' for key, value in sizes.items())])
  finally:
    metrics_files.MetricsWriter.write = write
  if code:
    raise SystemExit(f'{name} ended with code {code}')
  steps = [(now - before, metrics) for (before, last), (now, metrics) in zip(
      written[1:-1], written[2:-1]) if metrics['perf/compilations'] == last['perf/compilations']]
  if not steps:
    raise SystemExit(f'{name}: no step without a compilation; raise --steps')
  median = lambda stage: statistics.median(metrics[f'timing_s/{stage}'] for _, metrics in steps)
  wall = statistics.median(seconds for seconds, _ in steps)
  outside = statistics.median(
      1 - sum(metrics[f'timing_s/{stage}'] for stage in STAGES) / seconds
      for seconds, metrics in steps)
  return {'bench': 'stages', 'name': name, 'steps': len(steps), 'step_seconds': wall,
          **{stage: median(stage) for stage in STAGES}, 'overhead': outside,
          'sizes': dataclasses.asdict(job), 'machine': bench_common.machine()}


def main(argv=None):
  arguments, job = parse(argv)
  with tempfile.TemporaryDirectory(prefix='bench_stages_') as folder:
    folder = pathlib.Path(folder)
    prepare(job, folder)
    rows = [run(name, job, folder) for name in arguments.arms]
  print(f'{"":26}' + ''.join(f'{title:>11}' for title in (
      'step s', *STAGES, 'overhead', 'times first')))
  for row in rows:
    print(f'{row["name"]:26}' + ''.join(f'{row[key]:11.3f}' for key in ('step_seconds', *STAGES))
          + f'{row["overhead"]:11.1%}{row["step_seconds"] / rows[0]["step_seconds"]:11.2f}')
  for row in rows:
    print(json.dumps(row))


if __name__ == '__main__':
  sys.exit(main())
