"""Times training steps and compares memory: full fine-tuning beside LoRA and DoRA, in one call.

  python scripts/bench_lora.py                               # a small model, float32
  python scripts/bench_lora.py --preset=gpt2 --rows=4
  python scripts/bench_lora.py --preset=qwen2.5-0.5b --dtype=bfloat16 --rows=32 --completion=512
  python scripts/bench_lora.py --arms=full,lora --targets=query,value --rank=4

Every arm is the launcher's own train step (supervised loss, AdamW, clipping) on the same weights
and rows; only what trains differs. Steps of the arms are taken in turn, so that all meet the same
machine. Memory is the compiler's: what the step holds (weights, gradients, optimizer, activations).
A preference method without cached log-probs holds a reference too: a second copy of the weights in
full fine-tuning, none with adapters, whose base it is. Prints one table and one JSON line per arm.
"""

import argparse
import functools
import json
import statistics
import time

import jax
import numpy as np

import bench_common
from ptjax import config as settings
from ptjax import types
from ptjax.losses import imitation
from ptjax.models import costs
from ptjax.models import presets
from ptjax.models import transformer
from ptjax.training import forward as forwards
from ptjax.training import optimizer as optimizers
from ptjax.training import state as training_state
from ptjax.training import step as training_step
from ptjax.training import trained

ARMS = ('full', 'lora', 'rslora', 'dora')


def parse(argv=None):
  """Returns the arguments."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--preset', choices=presets.names(), help='in place of the sizes below')
  bench_common.Sizes.add_flags(parser)
  parser.add_argument('--rows', type=int, default=8)
  parser.add_argument('--prompt', type=int, default=64, help='tokens of every prompt')
  parser.add_argument('--completion', type=int, default=64, help='trained tokens of every row')
  parser.add_argument('--dtype', default='float32', help='of activations')
  parser.add_argument('--param_dtype', default='float32', help='of the weights')
  parser.add_argument('--remat', choices=transformer.REMAT, default='none')
  parser.add_argument('--arms', default='full,lora,dora')
  parser.add_argument('--rank', type=int, default=8)
  parser.add_argument('--targets', default='all-linear')
  parser.add_argument('--repetitions', type=int, default=7, help='timed steps of each arm')
  arguments = parser.parse_args(argv)
  unknown = set(arguments.arms.split(',')) - set(ARMS)
  if unknown:
    parser.error(f'--arms: {", ".join(sorted(unknown))}; expected some of {", ".join(ARMS)}')
  return arguments


def model_config(arguments):
  """The TransformerConfig of all arms."""
  dtypes = {'dtype': arguments.dtype, 'param_dtype': arguments.param_dtype}
  if arguments.preset:
    return presets.get(arguments.preset, **dtypes)
  return presets.get(
      'tiny', **bench_common.Sizes.parsed(arguments).model_fields(),
      max_length=arguments.prompt + arguments.completion, **dtypes)


def make_batch(arguments, vocab_size):
  """Random rows, the same for every arm."""
  rng = np.random.default_rng(0)
  draw = lambda width: rng.integers(0, vocab_size, (arguments.rows, width)).astype(np.int32)
  return training_step.place(types.TokenBatch(
      prompt_tokens=draw(arguments.prompt),
      prompt_lengths=np.full(arguments.rows, arguments.prompt, np.int32),
      tokens=draw(arguments.completion), on_policy=np.asarray(True), inputs={},
      loss_mask=np.ones((arguments.rows, arguments.completion), bool)), None)


def tree_bytes(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


class Arm:
  """One way of training, compiled and warm."""

  def __init__(self, name, arguments, model, params, batch):
    adapters = settings.LoraSettings() if name == 'full' else settings.LoraSettings(
        rank=arguments.rank, variant=name, targets=tuple(arguments.targets.split(',')))
    start = jax.jit(functools.partial(trained.start, adapters))
    if name == 'full':  # its state is donated, the others go on reading the weights
      params = jax.tree.map(lambda leaf: leaf.copy(), params)
      own, self._frozen = params, {}
    else:
      own, _ = start(params, jax.random.key(1))
      self._frozen = {'base': params}
    optimizer, _ = optimizers.make_optimizer(settings.OptimizerSettings(), 1, own)
    step = training_step.make_train_step(
        forwards.make_forward(model, remat=arguments.remat,
                              lora_scale=adapters.scale if adapters.rank else None),
        imitation.sft_loss, optimizer)
    self._state, self._batch = training_state.init(own, optimizer), batch
    started = time.perf_counter()
    self._compiled = step.lower(self._state, batch, self._frozen).compile()
    self.compile_seconds = time.perf_counter() - started
    memory = self._compiled.memory_analysis()
    weights, optimizer_bytes = tree_bytes(params), tree_bytes(self._state.opt_state)
    per_layer = 0 if name == 'full' else (
        sum(leaf.size for leaf in jax.tree.leaves(own)) // model.num_layers)
    rows = costs.Rows(arguments.rows, arguments.prompt, 1, arguments.completion)
    held = (memory.argument_size_in_bytes + memory.output_size_in_bytes
            - memory.alias_size_in_bytes + memory.temp_size_in_bytes)
    self.facts = {
        'name': name, 'trained_parameters': sum(leaf.size for leaf in jax.tree.leaves(own)),
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
        'weights_bytes': weights, 'optimizer_bytes': optimizer_bytes,
        'temporary_bytes': memory.temp_size_in_bytes, 'step_bytes': held,
        'with_reference_bytes': held + (weights if name == 'full' else 0),
        'flops': costs.update_flops(model, rows, remat=arguments.remat, adapters=per_layer)}
    self.seconds, self.cpu_seconds = [], []
    for _ in range(2):
      self.step()
    self.seconds.clear(), self.cpu_seconds.clear()

  def step(self):
    """Takes a step and notes its time."""
    started, cpu = time.perf_counter(), time.process_time()
    self._state, metrics = self._compiled(self._state, self._batch, self._frozen)
    jax.block_until_ready((self._state, metrics))
    self.seconds.append(time.perf_counter() - started)
    self.cpu_seconds.append(time.process_time() - cpu)
    if not np.isfinite(float(metrics['loss'])):
      raise SystemExit(f'{self.facts["name"]}: the loss is not finite')

  def row(self, arguments):
    """What this arm did, medians over its steps."""
    return {
        'bench': 'lora', **self.facts, 'options': vars(arguments),
        'step_seconds': statistics.median(self.seconds), 'step_seconds_min': min(self.seconds),
        'step_seconds_max': max(self.seconds), 'cpu_seconds': statistics.median(self.cpu_seconds),
        'tokens_per_second': (arguments.rows * (arguments.prompt + arguments.completion)
                              / statistics.median(self.seconds)),
        'compile_seconds': self.compile_seconds, 'device': jax.devices()[0].device_kind,
        'versions': {'jax': jax.__version__}, 'machine': bench_common.machine()}


def print_table(rows):
  """Prints the rows; ratios are to the first one."""
  mib = lambda name: lambda row: format(row[name] / 2**20, '.1f')
  columns = {
      'trained': lambda row: f'{row["trained_parameters"]:,}',
      'weights MiB': mib('weights_bytes'), 'optimizer MiB': mib('optimizer_bytes'),
      'temporary MiB': mib('temporary_bytes'), 'step MiB': mib('step_bytes'),
      'with reference': mib('with_reference_bytes'),
      'GFLOP': lambda row: format(row['flops'] / 1e9, '.1f'),
      'step s': lambda row: format(row['step_seconds'], '.4f'),
      'CPU s': lambda row: format(row['cpu_seconds'], '.3f'),
      'tokens/s': lambda row: format(row['tokens_per_second'], '.0f')}
  print(' ' * 8 + ''.join(f'{title:>15}' for title in columns) + '   memory     time')
  for row in rows:
    memory, seconds = (row[name] / rows[0][name] for name in ('step_bytes', 'step_seconds'))
    print(f'{row["name"]:8}' + ''.join(f'{show(row):>15}' for show in columns.values())
          + f'{memory:8.2f}x{seconds:8.2f}x')


def main(argv=None):
  arguments = parse(argv)
  model = model_config(arguments)
  params = jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(0))
  batch = make_batch(arguments, model.vocab_size)
  arms = [Arm(name, arguments, model, params, batch) for name in arguments.arms.split(',')]
  for _ in range(arguments.repetitions):
    for arm in arms:
      arm.step()
  rows = [arm.row(arguments) for arm in arms]
  print_table(rows)
  for row in rows:
    print(json.dumps(row))


if __name__ == '__main__':
  main()
