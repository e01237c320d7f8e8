"""SFT, GRPO, SFT then GRPO, LUFFY, SRFT and HPT on one task, from scratch, at equal token budget.

The task is to add two numbers modulo ten. Its demonstrations are a careless teacher's: three of
five answers are one too high, so imitation alone ends below one half right however long it lasts.
The model starts from random weights, which answer one sum in hundreds, so rewards alone give next
to nothing to learn from. A method has to take the form from the demonstrations and the truth from
the rewards.

Every arm passes the same number of completion tokens, demonstrations and rollouts together, through
its updates; sampled tokens are trained tokens here. All share model, prompts, batch of prompts,
optimizer and learning rate. Finished arms are not run again.

Command: python experiments/hybrid_arithmetic.py --out=runs/hybrid [--seeds=5] [--scale=1.0]
         python -m ptjax.launch --config=experiments/hybrid_arithmetic.py  (the HPT arm)
Hardware: two CPU cores.
Expected time: about 1 minute per arm and seed.
Number to reach: within 40 % of the held-out sums SFT and GRPO stall; see BENCHMARKS.md.
"""

import argparse
import json
import pathlib

import numpy as np
from scipy import stats

from ptjax import config
from ptjax import job

TASK = 'arithmetic:max_operand=29,test_fraction=0.25'  # 678 sums to learn from, 222 held out
METRIC = 'eval/arithmetic/acc_strict'
BUDGET = 120_000  # completion tokens through the update, per arm
PROMPTS, GROUP, LENGTH = 64, 4, 2  # per step; completions per prompt; tokens of an answer
LEARNING_RATE = 1e-3
ARMS = {  # name -> --algo, with the fraction of the budget that each stage gets
    'SFT': {'sft': 1.0}, 'GRPO': {'dr_grpo': 1.0}, 'SFT then GRPO': {'sft': 0.4, 'dr_grpo': 0.6},
    'LUFFY': {'luffy': 1.0}, 'SRFT': {'srft': 1.0}, 'HPT': {'hpt': 1.0}}
_TOKENS_PER_STEP = {
    'sft': 2 * PROMPTS * LENGTH, 'dr_grpo': PROMPTS * GROUP * LENGTH,
    **dict.fromkeys(('luffy', 'srft', 'hpt'), PROMPTS * (GROUP + 1) * LENGTH)}


def get_config(arm='HPT', seed=0, scale=1.0, out_dir=None):
  """One arm as a config."""
  steps = {name: max(2, int(scale * share * BUDGET / _TOKENS_PER_STEP[name]))
           for name, share in ARMS[arm].items()}
  return config.Config(
      algo=','.join(steps), dataset=f'{TASK},careless=0.6', seed=seed, out_dir=out_dir,
      stages={name: {'training.steps': count} for name, count in steps.items()},
      data=config.DataSettings(packing=False),  # so that a supervised step's tokens are known
      training=config.TrainingSettings(batch_size=2 * PROMPTS),
      rollout=config.RolloutSettings(
          num_prompts=PROMPTS, group_size=GROUP, max_completion_tokens=LENGTH),
      optimizer=config.OptimizerSettings(
          learning_rate=LEARNING_RATE, schedule='cosine', warmup_steps=10, end_fraction=0.1,
          beta2=0.99),
      eval=config.EvaluationSettings(
          dataset=f'{TASK}@test', every_steps=max(1, int(40 * scale)), limit=512, batch_size=512),
      log=config.LogSettings(tensorboard=False))


def run_arm(arm, seed, scale, folder):
  """Runs an arm unless it is finished; returns its records."""
  path = folder / f'{arm.replace(" ", "_")}-{seed}'
  if not (path / 'model').exists() and not job.run(get_config(arm, seed, scale, str(path))):
    raise SystemExit('interrupted; the same command goes on')
  return [json.loads(line) for line in open(path / 'metrics.jsonl')]


def interval(values):
  """Mean and half width of its 95 % interval over seeds, by Student's t; NaN for one seed."""
  values = np.asarray(values, float)
  if len(values) < 2:
    return values.mean(), float('nan')
  return values.mean(), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def table(results):
  """Markdown: one line per arm. Accuracies are of 512 held-out sums, greedy."""
  lines = ['| arm | held-out accuracy, mean ± 95 % | each seed | tokens trained on | '
           'seconds in steps |', '| --- | --- | --- | --- | --- |']
  for arm, runs in results.items():
    final = [_evaluated(records)[-1][METRIC] for records in runs]
    mean, half = interval(final)
    tokens = np.mean([records[-1]['num_tokens'] for records in runs])
    seconds = np.mean([sum(r.get('step_time', 0.0) for r in records) for records in runs])
    lines.append(f'| {arm} | {mean:.3f} ± {half:.3f} | {", ".join(f"{x:.3f}" for x in final)} | '
                 f'{tokens:,.0f} | {seconds:.0f} |')
  return '\n'.join(lines)


def figure(results, path):
  """Held-out accuracy against tokens trained on, the mean over seeds and its range."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot
  drawn, axis = pyplot.subplots(figsize=(7, 4))
  for arm, runs in results.items():
    evaluated = [_evaluated(records) for records in runs]
    tokens = [record['num_tokens'] for record in evaluated[0]]
    values = np.array([[record[METRIC] for record in records] for records in evaluated])
    line, = axis.plot(tokens, values.mean(0), label=arm)
    axis.fill_between(tokens, values.min(0), values.max(0), alpha=0.15, color=line.get_color())
  axis.set(xlabel='completion tokens trained on', ylabel='held-out accuracy', ylim=(0, 1))
  axis.legend(loc='center left', bbox_to_anchor=(1.0, 0.5))
  drawn.tight_layout()
  drawn.savefig(path)


def _evaluated(records):
  return [{'num_tokens': 0, **record} for record in records if METRIC in record]


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--scale', type=float, default=1.0, help='of the token budget')
  parser.add_argument('--arms', default=','.join(ARMS), help='some of them, with commas between')
  given = parser.parse_args(argv)
  given.out.mkdir(parents=True, exist_ok=True)
  results = {arm: [] for arm in given.arms.split(',')}
  for seed in range(given.seeds):
    for arm in results:
      results[arm].append(run_arm(arm, seed, given.scale, given.out))
  text = table(results)
  (given.out / 'table.md').write_text(text + '\n')
  figure(results, given.out / 'figure.png')
  print(f'{text}\ntable   {given.out / "table.md"}\nfigure  {given.out / "figure.png"}')


if __name__ == '__main__':
  main()
