"""SFT, DPO and SFT->DPO, each full and LoRA, on paraphrases and sonnets, at the scale of GPT-2.

Every arm is an ordinary run of the launcher in a process of its own, so its wall clock and its
memory are its own; the commands are printed. Finished arms are not run again. At the end one table
and one figure.

Command: python experiments/gpt2_sft_dpo_lora.py --model=DIR_OF_GPT2_124M --data=DIR --out=runs/gpt2
         python experiments/gpt2_sft_dpo_lora.py --small --data=DIR --out=runs/gpt2-small
         python -m ptjax.launch --config=experiments/gpt2_sft_dpo_lora.py (one arm, on that data)
  DIR holds quora/quora_pairs.csv, shakespeare/{sonnets,sonnets_held_out_dev,
  TRUE_sonnets_held_out_dev}.txt and, for --small, tinystories/tinystories_val_a.txt.
Hardware: one GPU; with --small two CPU cores.
Expected time: GPT-2 124M not yet run; --small --scale=0.3 about an hour on two busy cores.
Number to reach: what the study reports of GPT-2: full fine-tuning ahead of LoRA, small gains from
  DPO. With --small the base is a model of two million weights, pretrained here for some minutes:
  it shows that the grid runs and what each arm costs, not what GPT-2 can do.
"""

import argparse
import csv
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

from ptjax import config

METHODS = ('sft', 'dpo', 'sft,dpo')
TASKS = {'quora': 'eval/quora/acc', 'sonnets': 'eval/sonnets/chrf'}  # the number to compare
SIZES = {  # what differs between the small grid and GPT-2's
    True: dict(steps=60, batch=16, rate=1e-3, pairs=800, held_out=200, sonnet_tokens=400,
               pretraining=400, samples=1, quora_tokens=160),
    False: dict(steps=600, batch=32, rate=2e-5, pairs=10000, held_out=1000, sonnet_tokens=200,
                pretraining=0, samples=1, quora_tokens=160),
}


def get_config():
  """One arm: SFT, then DPO, of whole GPT-2 on paraphrase pairs made by `prepare`."""
  size = SIZES[False]
  return config.Config(
      algo='sft,dpo', model='openai-community/gpt2', dataset='runs/gpt2/data/quora.jsonl',
      data=config.DataSettings(max_prompt_tokens=size['quora_tokens']),
      rollout=config.RolloutSettings(max_completion_tokens=8),
      training=config.TrainingSettings(steps=size['steps'], batch_size=size['batch']),
      optimizer=config.OptimizerSettings(learning_rate=size['rate'], warmup_steps=10),
      eval=config.EvaluationSettings(dataset='quora:runs/gpt2/data/quora_held_out.csv'))


# --- data and base


def prepare(data, out, size, base):
  """Writes what all arms share: preference pairs and held-out rows of both tasks."""
  folder = out / 'data'
  folder.mkdir(parents=True, exist_ok=True)
  with open(data / 'quora' / 'quora_pairs.csv', newline='') as file:
    header, *rows = csv.reader(file, delimiter='\t')
  order = np.random.default_rng(0).permutation(len(rows))
  for name, chosen in (('quora_train', order[:size['pairs']]),
                       ('quora_held_out', order[-size['held_out']:])):
    with open(folder / f'{name}.csv', 'w', newline='') as file:
      csv.writer(file, delimiter='\t').writerows([header, *(rows[i] for i in chosen)])
  make = [sys.executable, 'scripts/make_preferences.py']
  run(make + ['--pairs=labels', f'--dataset={folder / "quora_train.csv"}',
              f'--out={folder / "quora.jsonl"}'], folder / 'quora.jsonl')
  run(make + ['--pairs=endings', f'--dataset={data / "shakespeare" / "sonnets.txt"}',
              f'--model={base}', f'--samples={size["samples"]}',
              f'--max_completion_tokens={size["sonnet_tokens"]}', '--keep_truncated',
              f'--out={folder / "sonnets.jsonl"}'], folder / 'sonnets.jsonl')


def small_base(data, out, size):
  """A GPT-2 of two million weights with its own vocabulary, pretrained on stories and verse."""
  from ptjax.models import hub, presets, transformer
  import jax
  import tokenizers
  import transformers
  texts = [data / 'tinystories' / 'tinystories_val_a.txt', data / 'shakespeare' / 'sonnets.txt',
           data / 'quora' / 'quora_pairs.csv']
  fresh, corpus = out / 'fresh', out / 'corpus'
  if not (fresh / 'config.json').exists():
    corpus.mkdir(parents=True, exist_ok=True)
    with open(corpus / 'pretraining.txt', 'w') as file:
      file.write('\n\n'.join(path.read_text() for path in texts[:1]))
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train([str(path) for path in texts], vocab_size=1024, special_tokens=['<|endoftext|>'],
                  show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token='<|endoftext|>', eos_token='<|endoftext|>')
    model = presets.get('gpt2', vocab_size=len(tokenizer), width=192, num_layers=4, num_heads=6,
                        num_kv_heads=6, mlp_width=768, max_length=1024)
    hub.export(str(fresh), model, transformer.init(model, jax.random.key(0)), tokenizer)
  done = out / 'base' / 'model'
  run([sys.executable, '-m', 'ptjax.launch', '--algo=cpt', f'--model={fresh}',
       f'--dataset={corpus / "pretraining.txt"}', f'--out_dir={out / "base"}',
       f'--steps={size["pretraining"]}', *settings(
           training__batch_size=16, optimizer__learning_rate=2e-3, optimizer__schedule='cosine',
           optimizer__warmup_steps=20, data__max_prompt_tokens=128,
           rollout__max_completion_tokens=128)], done)
  return done


# --- arms


def arms():
  """Every (task, method, whether by adapters)."""
  return list(itertools.product(TASKS, METHODS, (False, True)))


def settings(**values):
  """`--set` arguments, with `__` for the dot."""
  return [f'--set={name.replace("__", ".")}={value}' for name, value in values.items()]


def arm_command(out, size, base, data, task, method, lora, seed):
  """The launcher's arguments of one arm."""
  folder = out / 'data'
  held_out = (f'quora:{folder / "quora_held_out.csv"}' if task == 'quora' else
              f'sonnets:{data / "shakespeare" / "TRUE_sonnets_held_out_dev.txt"}')
  values = dict(
      training__batch_size=size['batch'], optimizer__warmup_steps=5, eval__limit=size['held_out'],
      # LoRA's usual rate is ten times that of full fine-tuning; DPO's a tenth of SFT's.
      optimizer__learning_rate=size['rate'] * (10 if lora else 1) * (0.1 if method == 'dpo' else 1),
      lora__rank=8 * lora, log__tensorboard=False)
  if method == 'sft,dpo':
    values['stages__dpo__optimizer__learning_rate'] = size['rate'] * (1 if lora else 0.1)
  if task == 'quora':
    values.update(data__max_prompt_tokens=size['quora_tokens'], rollout__max_completion_tokens=8)
  else:
    values.update(data__max_prompt_tokens=128, rollout__max_completion_tokens=size['sonnet_tokens'],
                  data__overlong='truncate')
  return [sys.executable, '-m', 'ptjax.launch', f'--algo={method}', f'--model={base}',
          f'--dataset={folder / task}.jsonl', f'--eval_dataset={held_out}', f'--seed={seed}',
          f'--steps={size["steps"]}',
          f'--out_dir={folder.parent / name_of(task, method, lora, seed)}',
          *settings(**values)]


def name_of(task, method, lora, seed):
  return f'{task}-{method.replace(",", "_")}-{"lora" if lora else "full"}-{seed}'


def run(command, result):
  """Runs a command unless its result is there; returns what its process cost, else None."""
  if pathlib.Path(result).exists():
    return None
  print('$', ' '.join(map(str, command[1:])), flush=True)
  started = time.perf_counter()
  process = subprocess.Popen([str(part) for part in command])
  _, status, usage = os.wait4(process.pid, 0)
  if status:
    raise SystemExit(f'failed with exit status {os.waitstatus_to_exitcode(status)}')
  return {'seconds': time.perf_counter() - started, 'peak_bytes': usage.ru_maxrss * 1024,
          'cpu_seconds': usage.ru_utime + usage.ru_stime}


def run_arm(command, out, name):
  """Runs one arm and keeps what it cost beside it."""
  cost = run(command, out / name / 'cost.json')
  if cost is not None:
    (out / name / 'cost.json').write_text(json.dumps(cost))


def measured(out, name, metric):
  """The arm's record: the metric before and after, with its standard error, and its cost."""
  records = [json.loads(line) for line in open(out / name / 'metrics.jsonl')]
  found = [record for record in records if metric in record]
  train = sum(record.get('step_time', 0.0) for record in records)
  return {'before': found[0][metric], 'after': found[-1][metric],
          'standard_error': found[-1][f'{metric}_se'], 'training_seconds': train,
          **json.loads((out / name / 'cost.json').read_text())}


# --- what comes out


def table(results):
  """Markdown: one line per arm, mean over seeds and half the range between them."""
  lines = ['| task | method | weights | before | after | per-run SE | over seeds | seconds | '
           'in steps | CPU s | peak MiB |', '| --- ' * 11 + '|']
  for (task, method, lora), runs in results.items():
    mean = lambda key: float(np.mean([run[key] for run in runs]))
    after = [run['after'] for run in runs]
    spread = f'±{(max(after) - min(after)) / 2:.3f} ({len(after)})' if len(after) > 1 else '-'
    lines.append(
        f'| {task} | {method} | {"LoRA" if lora else "full"} | {mean("before"):.3f} | '
        f'{mean("after"):.3f} | {mean("standard_error"):.3f} | {spread} | {mean("seconds"):.0f} | '
        f'{mean("training_seconds"):.0f} | {mean("cpu_seconds"):.0f} | '
        f'{mean("peak_bytes") / 2**20:.0f} |')
  return '\n'.join(lines)


def figure(results, path):
  """Bars of each arm's result, with its standard error, per task."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot
  drawn, axes = pyplot.subplots(1, len(TASKS), figsize=(10, 4), squeeze=False)
  for axis, (task, metric) in zip(axes[0], TASKS.items()):
    arms = [(key, runs) for key, runs in results.items() if key[0] == task]
    names = [f'{method}\n{"LoRA" if lora else "full"}' for (_, method, lora), _ in arms]
    axis.bar(names, [np.mean([r['after'] for r in runs]) for _, runs in arms],
             yerr=[np.mean([r['standard_error'] for r in runs]) for _, runs in arms])
    axis.axhline(np.mean([r['before'] for _, runs in arms for r in runs]), linestyle=':',
                 color='black')
    axis.set_title(f'{metric} (dotted: before)')
  drawn.tight_layout()
  drawn.savefig(path)


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', help='a directory with the weights of GPT-2')
  parser.add_argument('--small', action='store_true', help='a small base, made and trained here')
  parser.add_argument('--data', type=pathlib.Path, required=True)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--seeds', type=int, default=1)
  parser.add_argument('--scale', type=float, default=1.0, help='of the numbers of steps and rows')
  given = parser.parse_args(argv)
  if given.small == bool(given.model):
    parser.error('give either --model or --small')
  size = dict(SIZES[given.small])
  for name in ('steps', 'pairs', 'held_out', 'pretraining'):
    size[name] = max(2, int(size[name] * given.scale))
  out = given.out.absolute()
  base = small_base(given.data, out, size) if given.small else given.model
  prepare(given.data, out, size, base)
  results = {}
  for task, method, lora in arms():
    for seed in range(given.seeds):
      name = name_of(task, method, lora, seed)
      run_arm(arm_command(out, size, base, given.data, task, method, lora, seed), out, name)
      results.setdefault((task, method, lora), []).append(measured(out, name, TASKS[task]))
  text = table(results)
  (out / 'table.md').write_text(text + '\n')
  (out / 'results.json').write_text(json.dumps(
      [{'task': task, 'method': method, 'lora': lora, 'runs': runs}
       for (task, method, lora), runs in results.items()], indent=1))
  figure(results, out / 'figure.png')
  print(text)
  print(f'table   {out / "table.md"}\nfigure  {out / "figure.png"}')


if __name__ == '__main__':
  main()
