"""Measures how the cost of a GRPO step grows with each of its sizes, one size at a time.

  python scripts/bench_scaling.py                          # all axes, some eight minutes
  python scripts/bench_scaling.py --axis=vocab --axis=layers
  python scripts/bench_scaling.py --width=256 --repetitions=9

From a base shape one size is doubled again and again. Of every point: CPU seconds of a rollout and
of an update, medians over turns in which all points of an axis come one after the other (CPU
seconds, for the machine may be busy); beside them what does not depend on the machine, FLOPs
counted from shapes and bytes from the compiler. Below each axis stands the exponent k of y ~ x^k
that fits best, over all points and over the last two, where fixed costs have mostly gone. Time that
grows faster than FLOPs, or memory that grows faster than the arrays it holds, would be a fault.

`XLA GFLOP` is the compiler's count of an update, in which the body of a loop, over layers or over
chunks of the head, counts once. Axis `devices` splits the base shape over virtual CPU devices
(fsdp), with completions so short that the head is one chunk on any number of them; its memory and
FLOPs are per device, its CPU seconds those of all together. Prints one table per axis and one JSON
line per point.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time

import bench_common

AXES = {
    'prompts': (4, 8, 16, 32), 'group': (2, 4, 8, 16), 'prompt': (32, 64, 128, 256),
    'completion': (16, 32, 64, 128), 'vocab': (1024, 4096, 16384, 65536), 'layers': (1, 2, 4, 8),
    'devices': (1, 2, 4, 8)}
COLUMNS = {  # key -> (title, what a number is divided by, format)
    'rollout_cpu': ('rollout CPU s', 1, '.3f'), 'update_cpu': ('update CPU s', 1, '.3f'),
    'rollout_flops': ('rollout GFLOP', 1e9, '.3f'), 'update_flops': ('update GFLOP', 1e9, '.3f'),
    'update_flops_compiler': ('XLA GFLOP', 1e9, '.3f'),
    'rollout_bytes': ('rollout MiB', 2**20, '.1f'),
    'update_temporaries': ('temps MiB', 2**20, '.1f'),
    'update_arguments': ('arguments MiB', 2**20, '.1f')}


@dataclasses.dataclass(frozen=True)
class Shape(bench_common.Sizes):
  """A step's sizes."""
  layers: int = 2
  width: int = 128
  mlp: int = 384
  vocab: int = 1024
  prompts: int = 8
  group: int = 4
  prompt: int = 32  # tokens of every prompt
  completion: int = 32  # tokens of every completion
  devices: int = 1


def parse(argv=None):
  """Returns (arguments, Shape)."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  Shape.add_flags(parser)
  parser.add_argument('--axis', action='append', choices=sorted(AXES), help='default: all')
  parser.add_argument('--points', type=int, choices=(2, 3, 4), default=4,
                      help='of each axis, from its least size on')
  parser.add_argument('--repetitions', type=int, default=5)
  parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
  arguments = parser.parse_args(argv)
  return arguments, Shape.parsed(arguments)


class Point:
  """One shape, compiled and warm."""

  def __init__(self, shape):
    import jax
    import numpy as np
    import optax

    from ptjax import sharding
    from ptjax import types
    from ptjax.losses import policy_gradient
    from ptjax.models import costs
    from ptjax.models import hub
    from ptjax.models import presets
    from ptjax.models import transformer
    from ptjax.rollout import sampler
    from ptjax.rollout import schedule
    from ptjax.training import forward
    from ptjax.training import state as training_state
    from ptjax.training import step as training_step
    model = presets.get('tiny', **shape.model_fields())
    mesh = sharding.make_mesh('', jax.devices()[:shape.devices])
    optimizer, params = optax.adamw(1e-4), hub.param_shapes(model)
    shardings = training_state.shardings(mesh, params, optimizer)
    init = lambda key: training_state.init(transformer.init(model, key), optimizer)
    self._state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    step = training_step.make_train_step(
        forward.make_forward(model, remat='dots'), policy_gradient.grpo_loss, optimizer,
        mesh=mesh, state_sharding=shardings)
    rng = np.random.default_rng(0)
    rows = shape.prompts * shape.group
    self._prompts = types.Prompts(
        tokens=rng.integers(shape.vocab, size=(shape.prompts, shape.prompt)).astype(np.int32),
        lengths=np.full(shape.prompts, shape.prompt, np.int32),
        ids=np.arange(shape.prompts, dtype=np.int32),
        sample_ids=np.tile(np.arange(shape.group, dtype=np.int32), (shape.prompts, 1)))
    self._sample = sampler.make_sampler(model, sampler.SamplingOptions(
        max_tokens=shape.completion, group_size=shape.group), mesh=mesh)
    self._key = jax.random.key(1)
    drawn = self._rollout()
    batch = types.TokenBatch(
        prompt_tokens=self._prompts.tokens, prompt_lengths=self._prompts.lengths,
        tokens=drawn.tokens, loss_mask=drawn.loss_mask, on_policy=np.asarray(True),
        inputs={'advantages': rng.normal(size=rows).astype(np.float32),
                'rollout_log_probs': drawn.log_probs})
    self._batch = training_step.place(jax.tree.map(np.asarray, batch), mesh)
    with sharding.use(mesh):
      self._step = step.lower(self._state, self._batch, {}).compile()
    self._update()
    memory, sizes = self._step.memory_analysis(), costs.Rows(
        shape.prompts, shape.prompt, shape.group, shape.completion)
    programs = [program.memory_analysis() for program in self._sample._programs.values()]
    steps = self._sample.last_stats['steps']
    windows = schedule.window_sizes(steps)
    self.facts = {
        **dataclasses.asdict(shape),
        'rollout_flops': (costs.prefill_flops(model, sizes)
                          + steps * costs.decode_flops(model, sizes, windows[-1])) / shape.devices,
        'update_flops': costs.update_flops(model, sizes, remat='dots') / shape.devices,
        'update_flops_compiler': self._step.cost_analysis()['flops'],
        'rollout_bytes': max(m.argument_size_in_bytes + m.temp_size_in_bytes
                             + m.output_size_in_bytes - m.alias_size_in_bytes for m in programs),
        'update_temporaries': memory.temp_size_in_bytes,
        'update_arguments': memory.argument_size_in_bytes}

  def _rollout(self):
    import jax
    return jax.block_until_ready(self._sample(self._state.params, self._prompts, self._key))

  def _update(self):
    import jax
    self._state, metrics = self._step(self._state, self._batch, {})
    jax.block_until_ready((self._state, metrics))

  def turn(self):
    """CPU seconds of one rollout and one update."""
    started = time.process_time()
    self._rollout()
    between = time.process_time()
    self._update()
    return between - started, time.process_time() - between


def worker(arguments, shape):
  """Measures one axis, which must be the only one given; prints a line of JSON per point."""
  axis, = arguments.axis
  out = bench_common.own_output()
  import jax
  if axis == 'devices':
    jax.config.update('jax_num_cpu_devices', max(AXES[axis][:arguments.points]))
    short = max(2, min(shape.completion, 512 // (shape.prompts * shape.group)))
    shape = dataclasses.replace(shape, completion=short)
  points = [Point(dataclasses.replace(shape, **{axis: size}))
            for size in AXES[axis][:arguments.points]]
  turns = [[point.turn() for point in points] for _ in range(arguments.repetitions)]
  for i, point in enumerate(points):
    rollouts, updates = zip(*(turn[i] for turn in turns))
    print(json.dumps({
        'bench': 'scaling', 'axis': axis, **point.facts, 'repetitions': len(turns),
        'rollout_cpu': statistics.median(rollouts), 'update_cpu': statistics.median(updates),
        'versions': {'jax': jax.__version__}, 'device': jax.devices()[0].device_kind,
        'machine': bench_common.machine()}), file=out, flush=True)


# --- the parent


def exponent(sizes, values):
  """The k of values ~ sizes^k, by least squares on logarithms; None where a value is 0."""
  if min(values) <= 0:
    return None
  x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
  middle_x, middle_y = statistics.fmean(x), statistics.fmean(y)
  return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y)) / sum(
      (a - middle_x) ** 2 for a in x)


def exponents(axis, rows):
  """Returns {key: (k over all points, k over the last two)}."""
  sizes = [row[axis] for row in rows]
  return {key: (exponent(sizes, [row[key] for row in rows]),
                exponent(sizes[-2:], [row[key] for row in rows[-2:]])) for key in COLUMNS}


def print_table(axis, rows):
  """Prints an axis: its points, then the exponents."""
  print(f'\n{axis:12}' + ''.join(f'{title:>15}' for title, _, _ in COLUMNS.values()))
  for row in rows:
    print(f'{row[axis]:<12}' + ''.join(
        f'{format(row[key] / unit, kind):>15}' for key, (_, unit, kind) in COLUMNS.items()))
  found = exponents(axis, rows)
  for place, name in enumerate(('exponent', 'at the end')):
    print(f'{name:12}' + ''.join(
        f'{"-" if found[key][place] is None else format(found[key][place], ".2f"):>15}'
        for key in COLUMNS))


def main():
  arguments, shape = parse()
  if arguments.worker:
    return worker(arguments, shape)
  shared = [*shape.flags(), f'--points={arguments.points}',
            f'--repetitions={arguments.repetitions}']
  for axis in arguments.axis or AXES:
    process = bench_common.Worker('bench_scaling.py', [*shared, f'--axis={axis}'])
    try:
      rows = [process.read() for _ in AXES[axis][:arguments.points]]
    finally:
      process.kill()
    print_table(axis, rows)
    for row in rows:
      print(json.dumps(row), flush=True)


if __name__ == '__main__':
  sys.exit(main())
