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


def parse(argv=None):
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name, default in (('layers', 4), ('width', 256), ('heads', 4), ('kv_heads', 2),
                        ('mlp', 1024), ('vocab', 2048), ('prompts', 8), ('group', 8),
                        ('prompt', 32), ('completion', 64), ('steps', 12)):
    parser.add_argument(f'--{name}', type=int, default=default)
  parser.add_argument('--arms', nargs='+', choices=ARMS, default=list(ARMS))
  return parser.parse_args(argv)


def prepare(options, folder):
  """Writes policy, reward model and prompts; returns the policy's directory."""
  import jax
  import numpy as np
  import tokenizers
  import transformers

  from ptjax.models import hub
  from ptjax.models import presets
  from ptjax.models import transformer
  words = ['<pad>', '<eos>', '<unk>', *(f'w{i}' for i in range(options.vocab - 3))]
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(
      {word: i for i, word in enumerate(words)}, unk_token='<unk>'))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, pad_token='<pad>', eos_token='<eos>', unk_token='<unk>')
  for name, labels in (('policy', 0), ('scorer', 1)):
    # As a Llama: `transformers` gives every Qwen2 directory Qwen's own tokenizer.
    model = presets.get(
        'tiny', family='llama', qkv_bias=False, num_layers=options.layers, width=options.width,
        num_heads=options.heads, num_kv_heads=options.kv_heads, mlp_width=options.mlp,
        vocab_size=options.vocab, num_labels=labels)
    params = jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(labels))
    hub.export(str(folder / name), model, params, tokenizer)
  rng = np.random.default_rng(0)
  with open(folder / 'prompts.jsonl', 'w', encoding='utf-8') as file:
    for row in rng.integers(options.vocab - 3, size=(64, options.prompt)):
      file.write(json.dumps({'prompt': ' '.join(f'w{i}' for i in row)}) + '\n')
  return folder / 'policy'


def run(name, options, folder):
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
      'training.steps': options.steps, 'rollout.num_prompts': options.prompts,
      'rollout.group_size': options.group, 'rollout.max_completion_tokens': options.completion,
      'data.max_prompt_tokens': options.prompt, 'checkpoint.every_steps': 10**6,
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
          'sizes': vars(options), 'machine': bench_common.machine()}


def main(argv=None):
  options = parse(argv)
  with tempfile.TemporaryDirectory(prefix='bench_stages_') as folder:
    folder = pathlib.Path(folder)
    prepare(options, folder)
    rows = [run(name, options, folder) for name in options.arms]
  print(f'{"":26}' + ''.join(f'{title:>11}' for title in (
      'step s', *STAGES, 'overhead', 'times first')))
  for row in rows:
    print(f'{row["name"]:26}' + ''.join(f'{row[key]:11.3f}' for key in ('step_seconds', *STAGES))
          + f'{row["overhead"]:11.1%}{row["step_seconds"] / rows[0]["step_seconds"]:11.2f}')
  for row in rows:
    print(json.dumps(row))


if __name__ == '__main__':
  sys.exit(main())
