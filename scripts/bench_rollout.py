"""Times rollouts, in one call beside what they are compared with.

  python scripts/bench_rollout.py                      # fixed length, beside transformers' generate
  python scripts/bench_rollout.py --prompt=256
  python scripts/bench_rollout.py --peer=none
  python scripts/bench_rollout.py --mode=variable      # slots beside static batches
  python scripts/bench_rollout.py --mode=variable --slots=0
  python scripts/bench_rollout.py --mode=sampling --vocab=32768

fixed: `--prompts` x `--group` completions, all of full length; each side is a process of its own
with weights of the same shape. variable: as many requests as slots allow, of geometric lengths that
the request decides (mean --mean, at most --completion), on --slots slots, beside static batches of
as many, with the whole cache attended to at every step or through growing windows, all drawing the
same tokens. sampling: a decode step's draw beside the argmax without log-probs, and exact top-p
beside one by sorting.

Arms take turns. Prints one table, with medians and ratios to the first row taken turn by turn, and
one JSON line per row. Where arms share a process they share its peak memory.
"""

import argparse
import dataclasses
import json
import statistics
import time

import bench_common


@dataclasses.dataclass(frozen=True)
class Job(bench_common.Sizes):
  """What all sides compute."""
  prompts: int = 0  # 0: 8, of variable lengths 16
  group: int = 8
  prompt: int = 32  # tokens of every prompt
  completion: int = 0  # tokens of every completion, or at most; 0: 64, of variable lengths 512
  mean: int = 64  # tokens, of variable lengths
  slots: int = 32  # of variable lengths; 0: as many as completions
  dtype: str = 'float32'
  seed: int = 0


DEFAULTS = {'fixed': {'prompts': 8, 'completion': 64}, 'sampling': {'prompts': 8, 'completion': 17},
            'variable': {'prompts': 16, 'completion': 512}}


def parse(argv=None):
  """Returns (arguments, Job)."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  Job.add_flags(parser)
  parser.add_argument('--mode', choices=sorted(DEFAULTS), default='fixed')
  parser.add_argument('--peer', choices=['hf', 'none'], default='hf', help='of fixed lengths')
  parser.add_argument('--repetitions', type=int, default=7, help='timed turns of each arm')
  parser.add_argument('--warm_up', type=int, default=0, help='turns before; 0: 2, or variable 8')
  parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
  arguments = parser.parse_args(argv)
  arguments.warm_up = arguments.warm_up or (8 if arguments.mode == 'variable' else 2)
  job = Job.parsed(arguments)
  return arguments, dataclasses.replace(job, **{
      name: value for name, value in DEFAULTS[arguments.mode].items() if not getattr(job, name)})


def prompt_tokens(job):
  """The prompts [P, S] of both sides."""
  import numpy as np
  rng = np.random.default_rng(job.seed)
  return rng.integers(1, job.vocab, (job.prompts, job.prompt)).astype(np.int32)


# --- ours


def make_rollout(job, group_prompts=None, **options):
  """Returns `draw(turn, limits=None) -> Rollouts on the host`, the sampler and the parameters.

  Args:
    job: Job.
    group_prompts: prompts per call, one call after the other; None: all at once.
    **options: SamplingOptions besides.
  """
  import jax
  import numpy as np

  from ptjax import keys
  from ptjax import types
  from ptjax.models import presets
  from ptjax.models import transformer
  from ptjax.rollout import sampler
  model = presets.get(
      'tiny', **job.model_fields(), dtype=job.dtype,
      max_length=max(1024, job.prompt + job.completion))
  params = jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(job.seed))
  sample = sampler.make_sampler(model, sampler.SamplingOptions(
      max_tokens=job.completion, group_size=job.group, **options))
  p, g = job.prompts, job.group
  prompts = types.Prompts(
      tokens=prompt_tokens(job), lengths=np.full(p, job.prompt, np.int32),
      ids=np.arange(p, dtype=np.int32), sample_ids=np.tile(np.arange(g, dtype=np.int32), (p, 1)))

  def draw(turn, limits=None):
    key, step, parts = keys.stream(job.seed, 'rollout', turn), group_prompts or p, []
    for start in range(0, p, step):
      some = slice(start, start + step)
      parts.append(jax.device_get(sample(
          params, jax.tree.map(lambda x, some=some: x[some], prompts), key,
          None if limits is None else limits[some.start * g:some.stop * g])))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)
  return draw, sample, sum(leaf.size for leaf in jax.tree.leaves(params))


def ptjax_worker(job):
  """Our side of fixed lengths."""
  turns = bench_common.Turns()
  turns.wait()
  compiles = bench_common.compilations()
  draw, _, parameters = make_rollout(job)
  turn = 0
  while True:
    tokens = draw(turn).loss_mask.sum()
    turns.done(**bench_common.facts('ptjax', compiles), tokens=int(tokens), parameters=parameters)
    turn = turns.wait()


class Arm:
  """An arm in this process.

  Args:
    name: shown.
    function: `function(turn) -> tokens`, which waits for what it computes.
    compiles: as of `bench_common.compilations`.
  """

  def __init__(self, name, function, compiles=()):
    self._name, self._function, self._compiles = name, function, compiles
    self._own_compiles, self.runs = [], []

  def step(self, turn, *, keep):
    """Takes a turn."""
    before = len(self._compiles)
    started, cpu = time.perf_counter(), time.process_time()
    tokens = self._function(turn)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    self._own_compiles += self._compiles[before:]
    if keep:
      self.runs.append({
          **bench_common.facts(self._name, self._own_compiles), 'seconds': seconds, 'cpu': cpu,
          'tokens': int(tokens), 'peak_rss_mib': bench_common.peak_rss_mib()})


class Side(Arm):
  """An arm in a process of its own."""

  def __init__(self, script, argv):
    super().__init__(script, None)
    self._worker = bench_common.Worker(script, argv)
    self.kill = self._worker.kill

  def step(self, turn, *, keep):
    run = self._worker.ask(turn)
    if keep:
      self.runs.append(run)


def variable_arms(job):
  """Slots, static batches at full width, static batches with windows that grow."""
  import numpy as np

  from ptjax.rollout import schedule

  def lengths(turn):
    rng = np.random.default_rng([job.seed, turn])
    return np.minimum(rng.geometric(1 / job.mean, job.prompts * job.group), job.completion)

  class Static(schedule.Schedule):
    """All of a batch until its last completion is done."""
    def __init__(self, shards, completions, slots, windows, steps, compiled=(), active=None):
      super().__init__(shards, completions, slots, windows, steps)
      self._counts = [slots]

  def arm(name, make_schedule=schedule.Schedule, full=False, **options):
    draw, sample, _ = make_rollout(job, **options)
    if full:
      sample._windows = sample._windows[-1:]

    def function(turn):
      found, schedule.Schedule = schedule.Schedule, make_schedule
      try:
        return draw(turn, lengths(turn)).loss_mask.sum()
      finally:
        schedule.Schedule = found
    return Arm(name, function, compiles)

  compiles = bench_common.compilations()
  batch = max(1, (job.slots or job.prompts * job.group) // job.group)  # prompts
  return [arm('slots', slots=job.slots),
          arm('static, full width', Static, True, group_prompts=batch),
          arm('static, windows', Static, group_prompts=batch)]


def sampling_arms(job):
  """Rollouts that take the argmax alone, that draw, and with top-p; then top-p by itself."""
  import jax
  import jax.numpy as jnp

  from ptjax.rollout import logits as sampling

  def argmax(logits, keys, **options):
    del keys, options
    return jnp.argmax(logits, -1).astype(jnp.int32), jnp.zeros(len(logits))

  def by_sort(logits, keys, *, top_p, **options):
    del options
    probs = jax.nn.softmax(logits)
    order = jnp.argsort(-probs, axis=-1)
    ranked = jnp.take_along_axis(probs, order, -1)
    kept = jnp.where(jnp.cumsum(ranked, -1) - ranked < top_p, ranked, 0.0)
    tokens = jnp.take_along_axis(order, jax.vmap(jax.random.categorical)(
        keys, jnp.log(kept))[:, None], -1)[:, 0]
    return tokens, jnp.log(jnp.take_along_axis(probs, tokens[:, None], -1)[:, 0])

  def rollout(name, sample=None, **options):
    draw, _, _ = make_rollout(job, **options)

    def function(turn):
      found, sampling.sample = sampling.sample, sample or sampling.sample
      try:
        return draw(turn).loss_mask.sum()
      finally:
        sampling.sample = found
    return Arm(name, function, compiles)

  compiles = bench_common.compilations()
  rows = job.prompts * job.group
  logits = 2 * jax.random.normal(jax.random.key(job.seed), (rows, job.vocab))

  def alone(name, sample, **options):
    jitted = jax.jit(lambda logits, keys: sample(logits, keys, **options))

    def function(turn):
      jax.block_until_ready(jitted(logits, jax.random.split(jax.random.key(turn), rows)))
      return rows
    return Arm(name, function, compiles)

  return ([rollout('argmax alone', argmax), rollout('sampled'), rollout('top-p 0.95', top_p=0.95)],
          [alone('draw: top-p 0.95', sampling.sample, top_p=0.95),
           alone('draw: top-p by sort', by_sort, top_p=0.95),
           alone('draw: whole softmax', sampling.sample)])


# --- the parent


def row(arm, first, job, mode):
  """What an arm did: medians, and its times as multiples of the first arm's, turn by turn."""
  median = lambda name: statistics.median(run[name] for run in arm.runs)
  ratio = lambda name: statistics.median(
      run[name] / other[name] for run, other in zip(arm.runs, first.runs))
  last, seconds = arm.runs[-1], [run['seconds'] for run in arm.runs]
  tokens = sum(run['tokens'] for run in arm.runs)
  return {
      'bench': 'rollout', 'mode': mode, 'name': last['name'], 'versions': last['versions'],
      'device': last['device'], 'job': dataclasses.asdict(job), 'repetitions': len(seconds),
      'seconds': median('seconds'), 'seconds_min': min(seconds), 'seconds_max': max(seconds),
      'cpu_seconds': median('cpu'),
      'cores_used': sum(run['cpu'] for run in arm.runs) / sum(seconds),
      'tokens': tokens / len(seconds), 'tokens_per_second': tokens / sum(seconds),
      'peak_rss_mib': last['peak_rss_mib'], 'compilations': last['compilations'],
      'compile_seconds': last['compile_seconds'],
      'times_first': {'seconds': ratio('seconds'), 'cpu_seconds': ratio('cpu')},
      'machine': bench_common.machine()}


def check_comparable(arms):
  """Raises SystemExit where arms did different work."""
  for name in ('tokens', 'parameters'):
    for runs in zip(*(arm.runs for arm in arms), strict=True):
      if len({run.get(name) for run in runs}) > 1:
        raise SystemExit(f'not comparable: {name} ' + ', '.join(
            f'{run.get(name)} ({run["name"]})' for run in runs))


def print_table(rows):
  """Prints one line per row."""
  columns = {
      's': ('seconds', '.3f'), 'CPU s': ('cpu_seconds', '.3f'),
      'tokens/s': ('tokens_per_second', '.0f'), 'cores': ('cores_used', '.2f'),
      'RSS MiB': ('peak_rss_mib', '.0f'), 'programs': ('compilations', 'd'),
      'compile s': ('compile_seconds', '.1f')}
  header, *lines = bench_common.table(rows, columns, name=22)
  print(header + '   times first: s, CPU')
  for line, one in zip(lines, rows):
    print(line + '   ' + ' '.join(f'{ratio:6.2f}x' for ratio in one['times_first'].values()))


def compare(arms, arguments, job):
  """Lets arms take turns; returns their rows."""
  for turn in range(arguments.warm_up + arguments.repetitions):
    for arm in arms:
      arm.step(turn, keep=turn >= arguments.warm_up)
  check_comparable(arms)
  return [row(arm, arms[0], job, arguments.mode) for arm in arms]


def main():
  arguments, job = parse()
  if arguments.worker:
    ptjax_worker(job)
  if arguments.mode == 'fixed':
    peers = [] if arguments.peer == 'none' else ['bench_peer_hf_rollout.py']
    arms = []
    try:
      for script in ('bench_rollout.py', *peers):
        arms.append(Side(script, job.flags()))
      rows = compare(arms, arguments, job)
    finally:
      for arm in arms:
        arm.kill()
  elif arguments.mode == 'variable':
    rows = compare(variable_arms(job), arguments, job)
  else:
    rows = [one for arms in sampling_arms(job) for one in compare(arms, arguments, job)]
  print_table(rows)
  for one in rows:
    print(json.dumps(one))


if __name__ == '__main__':
  main()
