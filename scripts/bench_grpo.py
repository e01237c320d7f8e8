"""Times whole GRPO steps (rollout, advantages, update) of ptjax beside a peer, in one call.

  python scripts/bench_grpo.py                     # ptjax beside transformers' generate + torch
  python scripts/bench_grpo.py --prompt=256
  python scripts/bench_grpo.py --vocab=32768
  python scripts/bench_grpo.py --peer=none

Each side is a process of its own, with weights of the same shape, and takes its steps in turn with
the other, so that both meet the same machine. A step draws every completion at full length (there
is no stop token), scores it by the tokens themselves, and makes one AdamW update. Prints one table
and one JSON line per row. The peer needs the `parity` extra.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import sys
import time

import bench_common

PEERS = {'hf': 'bench_peer_hf.py', 'none': None}


@dataclasses.dataclass(frozen=True)
class Shape:
  """What both sides compute."""
  layers: int = 4
  width: int = 256
  heads: int = 4
  kv_heads: int = 2
  mlp: int = 1024
  vocab: int = 2048
  prompts: int = 8
  group: int = 8
  prompt: int = 32  # tokens of every prompt
  completion: int = 64  # tokens of every completion
  learning_rate: float = 1e-4
  seed: int = 0


def parse(argv=None):
  """Returns (arguments, Shape)."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for field in dataclasses.fields(Shape):
    parser.add_argument(f'--{field.name}', type=field.type, default=field.default)
  parser.add_argument('--peer', choices=sorted(PEERS), default='hf')
  parser.add_argument('--repetitions', type=int, default=7, help='timed steps of each side')
  parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
  arguments = parser.parse_args(argv)
  return arguments, Shape(**{f.name: getattr(arguments, f.name)
                             for f in dataclasses.fields(Shape)})


# --- a worker: one line out when warm, then one line out per line in


def prompt_tokens(shape):
  """The prompts [P, S] of both sides."""
  import numpy as np
  rng = np.random.default_rng(shape.seed)
  return rng.integers(1, shape.vocab, (shape.prompts, shape.prompt)).astype(np.int32)


def advantages(tokens, group):
  """Group-normalised advantages [B] of a reward both sides can compute: the share of low ids."""
  import numpy as np
  rewards = (tokens < tokens.max() / 2).mean(1).reshape(-1, group)
  centred = rewards - rewards.mean(1, keepdims=True)
  return (centred / (rewards.std(1, keepdims=True) + 1e-6)).reshape(-1).astype(np.float32)


def serve(step, facts):
  """Warms `step` up, then runs it whenever the parent asks.

  Args:
    step: `step() -> (tokens [B, T], seconds of the rollout)`; returns when all is computed.
    facts: `facts() -> dict` about this side, asked once it is warm.
  """
  started = time.perf_counter()
  step()
  first = time.perf_counter() - started
  step()  # what a second step still compiles belongs to the warm-up
  print(json.dumps({'first_step_seconds': first, **facts()}), flush=True)
  for _ in sys.stdin:
    started, cpu = time.perf_counter(), time.process_time()
    tokens, rollout = step()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(json.dumps({
        'rollout': rollout, 'update': seconds - rollout, 'step': seconds, 'cpu': cpu,
        'cores_used': cpu / seconds, 'completion_tokens': tokens.size,
        'peak_rss_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), flush=True)


def ptjax_worker(shape):
  """Our side: the programs that the launcher runs, float32."""
  import jax
  import numpy as np

  from ptjax import algorithms
  from ptjax import config as settings
  from ptjax import keys
  from ptjax import types
  from ptjax.models import presets
  from ptjax.models import transformer
  from ptjax.rollout import sampler
  from ptjax.training import algorithm as binding
  from ptjax.training import forward as training_forward
  from ptjax.training import optimizer as optimizers
  from ptjax.training import state as training_state
  from ptjax.training import step as training_step

  compiles = bench_common.compilations()
  model = presets.get(
      'tiny', num_layers=shape.layers, width=shape.width, num_heads=shape.heads,
      num_kv_heads=shape.kv_heads, mlp_width=shape.mlp, vocab_size=shape.vocab)
  bound = binding.bind(algorithms.get('grpo'), {})
  params = jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(shape.seed))
  optimizer, schedule = optimizers.make_optimizer(
      settings.OptimizerSettings(learning_rate=shape.learning_rate), 1, params)
  train_step = training_step.make_train_step(
      training_forward.make_forward(model, outputs=training_step.model_outputs(bound.loss),
                                    remat=settings.ModelSettings().remat),
      bound.loss, optimizer, schedule=schedule)
  sample = sampler.make_sampler(model, sampler.SamplingOptions(
      max_tokens=shape.completion, group_size=shape.group))
  p, g = shape.prompts, shape.group
  prompts = types.Prompts(
      tokens=prompt_tokens(shape), lengths=np.full(p, shape.prompt, np.int32),
      ids=np.arange(p, dtype=np.int32), sample_ids=np.tile(np.arange(g, dtype=np.int32), (p, 1)))
  state = training_state.init(params, optimizer)
  count = 0

  def step():
    nonlocal state, count
    started = time.perf_counter()
    rollouts = jax.device_get(sample(
        state.params, prompts, keys.stream(shape.seed, 'rollout', count)))
    rollout = time.perf_counter() - started
    state, metrics = train_step(state, training_step.place(types.TokenBatch(
        prompt_tokens=prompts.tokens, prompt_lengths=prompts.lengths, tokens=rollouts.tokens,
        loss_mask=rollouts.loss_mask, on_policy=np.asarray(True),
        inputs={'advantages': advantages(rollouts.tokens, g),
                'rollout_log_probs': rollouts.log_probs}), None))
    jax.block_until_ready((state, metrics))
    count += 1
    return rollouts.tokens[rollouts.loss_mask], rollout

  serve(step, lambda: {
      'name': 'ptjax', 'versions': {'jax': jax.__version__},
      'device': jax.devices()[0].device_kind, 'prompt_tokens': prompts.tokens.size,
      'parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params)),
      'compile_seconds': sum(compiles), 'compilations': len(compiles)})


# --- the parent


class Side:
  """A worker, warm."""

  def __init__(self, script, argv):
    self._worker = bench_common.Worker(script, argv)
    self.close = self._worker.close
    self.facts = self._worker.read()
    self.runs = []

  def step(self):
    self.runs.append(self._worker.ask())

  def row(self, shape):
    """What this side did, medians over its steps."""
    median = lambda name: statistics.median(run[name] for run in self.runs)
    steps = [run['step'] for run in self.runs]
    tokens = self.runs[0]['completion_tokens']
    return {
        'bench': 'grpo', **self.facts, 'shape': dataclasses.asdict(shape), 'dtype': 'float32',
        'repetitions': len(steps), 'rollout_seconds': median('rollout'),
        'update_seconds': median('update'), 'step_seconds': median('step'),
        'step_seconds_min': min(steps), 'step_seconds_max': max(steps),
        'completion_tokens': tokens, 'tokens_per_second': tokens / median('step'),
        'cpu_seconds': median('cpu'), 'cores_used': median('cores_used'),
        'peak_rss_mib': max(run['peak_rss_mib'] for run in self.runs),
        'machine': bench_common.machine()}


def check_comparable(sides):
  """Raises SystemExit where the two sides did different work."""
  ours, *peers = sides
  for peer in peers:
    for name in ('prompt_tokens', 'parameters'):
      if peer.facts[name] != ours.facts[name]:
        raise SystemExit(f'not comparable: {name} {ours.facts[name]} and {peer.facts[name]}')
  counts = {run['completion_tokens'] for side in sides for run in side.runs}
  if len(counts) > 1:
    raise SystemExit(f'not comparable: steps with {sorted(counts)} completion tokens')


def print_table(rows):
  """Prints medians, and each row's step time as a multiple of the first row's."""
  columns = {
      'rollout s': ('rollout_seconds', '.3f'), 'update s': ('update_seconds', '.3f'),
      'step s': ('step_seconds', '.3f'), 'CPU s': ('cpu_seconds', '.2f'),
      'tokens/s': ('tokens_per_second', '.0f'), 'cores': ('cores_used', '.2f'),
      'RSS MiB': ('peak_rss_mib', '.0f'), 'first s': ('first_step_seconds', '.1f'),
      'programs': ('compilations', 'd'), 'compile s': ('compile_seconds', '.1f')}
  print(' ' * 12 + ''.join(f'{title:>10}' for title in columns) + '  times ptjax')
  for row in rows:
    row['times_ptjax'] = {name: row[f'{name}_seconds'] / rows[0][f'{name}_seconds']
                          for name in ('rollout', 'update', 'step')}
    print(f'{row["name"]:12}'
          + ''.join(f'{format(row[key], kind):>10}' for key, kind in columns.values())
          + f'{row["times_ptjax"]["step"]:12.2f}x')


def main():
  arguments, shape = parse()
  if arguments.worker:
    return ptjax_worker(shape)
  argv = [f'--{name}={value}' for name, value in dataclasses.asdict(shape).items()]
  sides = [Side('bench_grpo.py', argv)]
  if PEERS[arguments.peer]:
    sides.append(Side(PEERS[arguments.peer], argv))
  for _ in range(arguments.repetitions):
    for side in sides:
      side.step()
    check_comparable(sides)
  rows = [side.row(shape) for side in sides]
  for side in sides:
    side.close()
  print_table(rows)
  for row in rows:
    print(json.dumps(row))


if __name__ == '__main__':
  main()
