"""Times the update of a GRPO step alone: what each of its choices is worth, side by side.

  python scripts/bench_update.py                             # all comparisons
  python scripts/bench_update.py --compare=prompt,lengths --peer=hf
  python scripts/bench_update.py --compare=compile --layers=24

Comparisons, each of arms that take turns in this process:
  prompt   each prompt computed once for its group, or repeated for every completion;
           prompts of 32 and of 256 tokens
  lengths  completions of geometric length in packed rows, or padded to the longest of them
  head     log-probs and entropy with their gradient from hidden states, vocabulary 32k: as losses
           of single tokens train it (the gradient made in the forward pass), by autodiff in
           chunks of several sizes, and from whole logits
  remat    what the backward pass recomputes
  compile  seconds to compile an update, without running it and without a cache of programs

Prints one table per comparison and one JSON line per row. `--peer=hf` adds a lean torch update of
the same batch, in a process of its own, to `prompt` and `lengths`; it needs the `parity` extra.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time

import bench_common

sys.path.insert(0, str(bench_common.HERE.parent))  # the repository beside it, not an installed one

COMPARISONS = ('prompt', 'lengths', 'head', 'remat', 'compile')
PEERS = {'hf': 'bench_peer_hf_update.py', 'none': None}


@dataclasses.dataclass(frozen=True)
class Shape(bench_common.Sizes):
  """What an update computes."""
  prompts: int = 8
  group: int = 8
  prompt: int = 32  # tokens of every prompt
  long_prompt: int = 256  # of `prompt`'s second pair of arms
  completion: int = 64  # tokens of every completion or, of `lengths`, on average
  cap: int = 512  # longest completion of `lengths`
  head_vocab: int = 32768  # of `head`
  learning_rate: float = 1e-4
  seed: int = 0


def parse(argv=None):
  """Returns (arguments, Shape)."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  Shape.add_flags(parser)
  parser.add_argument('--compare', default=','.join(COMPARISONS), help='comma-separated')
  parser.add_argument('--peer', choices=sorted(PEERS), default='none')
  parser.add_argument('--repetitions', type=int, default=7, help='timed updates of each arm')
  parser.add_argument('--worker', help=argparse.SUPPRESS)  # which batch a peer is to take
  arguments = parser.parse_args(argv)
  unknown = set(arguments.compare.split(',')) - set(COMPARISONS)
  if unknown:
    parser.error(f'--compare={arguments.compare}: expected some of {",".join(COMPARISONS)}')
  return arguments, Shape.parsed(arguments)


# --- batches, of NumPy alone, for peers make them too


def arrays(shape, kind):
  """Dict of the arrays of a batch: prompts [P, S], tokens [B, T], loss_mask and advantages.

  Args:
    shape: Shape.
    kind: 'short' or 'long' prompts and completions of one length; 'lengths': geometric ones.
  """
  import numpy as np
  rng = np.random.default_rng(shape.seed)
  b = shape.prompts * shape.group
  lengths = np.full(b, shape.completion)
  if kind == 'lengths':
    lengths = np.minimum(rng.geometric(1 / shape.completion, b), shape.cap)
  prompt = shape.long_prompt if kind == 'long' else shape.prompt
  ids = lambda *sizes: rng.integers(1, shape.vocab, sizes).astype(np.int32)
  return {'prompts': ids(shape.prompts, prompt), 'tokens': ids(b, int(lengths.max())),
          'loss_mask': np.arange(lengths.max()) < lengths[:, None],
          'advantages': rng.normal(size=b).astype(np.float32)}


def token_batch(found, *, repeat=1):
  """The types.TokenBatch of `arrays`, its prompts once per group or `repeat` times."""
  import numpy as np

  from ptjax import types
  prompts = np.repeat(found['prompts'], repeat, axis=0)
  return types.TokenBatch(
      prompt_tokens=prompts, prompt_lengths=np.full(len(prompts), prompts.shape[1], np.int32),
      tokens=found['tokens'], loss_mask=found['loss_mask'], on_policy=np.asarray(True),
      inputs={'advantages': found['advantages'],
              'rollout_log_probs': np.zeros(found['tokens'].shape, np.float32)})


# --- arms


class Arm:
  """A compiled program that can be run again and again.

  Args:
    name: shown.
    lower: `() -> jax.stages.Lowered`.
    call: `compiled -> result`, to be waited for.
    tokens: trained tokens of a run.
    **facts: further columns of its row.
  """

  def __init__(self, name, lower, call, tokens, **facts):
    self.name, self._call, self.tokens = name, call, tokens
    lowered = lower()
    started, cpu = time.perf_counter(), time.process_time()
    self._compiled = lowered.compile()
    self.facts = {**facts, 'compile_seconds': time.perf_counter() - started,
                  'compile_cpu_seconds': time.process_time() - cpu, 'compilations': 1,
                  'temporary_mib': self._compiled.memory_analysis().temp_size_in_bytes / 2**20}
    self.runs = []

  def run(self, *, timed=True):
    import jax
    started, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(self._call(self._compiled))
    if timed:
      self.runs.append({'seconds': time.perf_counter() - started,
                        'cpu_seconds': time.process_time() - cpu})

  def close(self):
    self._compiled = self._call = None


class PeerArm:
  """The same batch in a worker of its own."""

  def __init__(self, script, shape, kind):
    self._worker = bench_common.Worker(script, [kind, *shape.flags()])
    self.facts = self._worker.read()
    self.name, self.tokens, self.runs = self.facts.pop('name'), self.facts.pop('tokens'), []

  def run(self, *, timed=True):
    found = self._worker.ask()
    if timed:
      self.runs.append(found)

  def close(self):
    self._worker.close()


def model_of(shape, **changes):
  from ptjax.models import presets
  return presets.get('tiny', **{**shape.model_fields(), **changes})


def update_arm(name, shape, batch, *, remat='dots'):
  """The launcher's train step of GRPO, on one batch."""
  import jax

  from ptjax import algorithms
  from ptjax import config as settings
  from ptjax.models import transformer
  from ptjax.training import algorithm as binding
  from ptjax.training import forward as training_forward
  from ptjax.training import layout
  from ptjax.training import optimizer as optimizers
  from ptjax.training import state as training_state
  from ptjax.training import step as training_step
  model = model_of(shape)
  bound = binding.bind(algorithms.get('grpo'), {})
  params = jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(shape.seed))
  optimizer, schedule = optimizers.make_optimizer(
      settings.OptimizerSettings(learning_rate=shape.learning_rate), 1, params)
  step = training_step.make_train_step(
      training_forward.make_forward(model, outputs=training_step.model_outputs(bound.loss),
                                    remat=remat),
      bound.loss, optimizer, schedule=schedule,
      part_tokens=layout.CPU_PART_TOKENS if jax.default_backend() == 'cpu' else None)
  placed = training_step.place(batch, None)
  rows = layout.rows_of(batch)
  here = [training_state.init(params, optimizer)]

  def call(compiled):
    here[0], metrics = compiled(here[0], placed, {})
    return here[0], metrics
  forward_tokens = rows.prompt_tokens.size + (0 if rows.packing is not None else rows.tokens.size)
  return Arm(name, lambda: step.lower(here[0], placed, {}), call, int(batch.loss_mask.sum()),
             forward_tokens=forward_tokens)


def head_arm(name, shape, score):
  """Value and gradient of a function of all log-probs and entropies, from hidden states."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from ptjax.models import transformer
  model = model_of(shape, vocab_size=shape.head_vocab)
  found = arrays(shape, 'short')
  states = np.random.default_rng(1).normal(size=(*found['tokens'].shape, shape.width))
  params = {'embed': jax.jit(transformer.init, static_argnums=0)(
      model, jax.random.key(shape.seed))['embed']}

  def loss(params, states, tokens):
    return token_loss(score(model, params, states, tokens))
  inputs = params, jnp.asarray(states, jnp.float32), jnp.asarray(found['tokens'])
  step = jax.jit(jax.value_and_grad(loss, (0, 1)))
  return Arm(name, lambda: step.lower(*inputs), lambda compiled: compiled(*inputs),
             found['tokens'].size, forward_tokens=found['tokens'].size)


def token_loss(out):
  """Of single tokens, and not linear."""
  import jax.numpy as jnp
  return (out['log_probs'] * jnp.cos(out['log_probs']) + 0.1 * out['entropy']).sum()


def whole_logits(model, params, states, tokens):
  """Log-probs and entropy as they are written down."""
  import jax
  import jax.numpy as jnp

  from ptjax.models import transformer
  full = jax.nn.log_softmax(transformer.logits(model, params, states))
  own = jnp.take_along_axis(full, tokens[..., None], axis=-1)[..., 0]
  return {'log_probs': own, 'entropy': -(jnp.exp(full) * full).sum(-1)}


def in_chunks(chunk):
  """head.score by autodiff, `chunk` tokens of each completion at a time."""
  import functools

  from ptjax.models import head
  return functools.partial(head.score, chunk=chunk)


def as_trained(model, params, states, tokens):
  """head.score with the gradient made in the forward pass, as the train step has it."""
  import jax
  import jax.numpy as jnp

  from ptjax.models import head
  from ptjax.training import per_token
  shape = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
  slope = per_token.split(jax.grad(token_loss), {'log_probs': shape, 'entropy': shape})
  return head.score(model, params, states, tokens, slope=slope)


def arms(comparison, shape, peer=None):
  """Yields (title, makers of the arms), the first of which the others are compared with."""
  def with_peer(makers, kind):
    return makers + ([lambda: PeerArm(peer, shape, kind)] if peer else [])
  if comparison == 'prompt':
    for kind in ('short', 'long'):
      found = arrays(shape, kind)
      once, repeated = token_batch(found), token_batch(found, repeat=shape.group)
      yield f'prompt {once.prompt_tokens.shape[1]}', with_peer([
          lambda once=once: update_arm('once', shape, once),
          lambda repeated=repeated: update_arm('repeated', shape, repeated)], kind)
  elif comparison == 'lengths':
    from ptjax.training import packing
    padded = token_batch(arrays(shape, 'lengths'))
    packed = packing.Packer(width=shape.width, always=True)(padded)
    sizes = packed.packed.rows.prompt_tokens.shape
    yield f'lengths: longest {padded.tokens.shape[1]}, {sizes[0]} rows of {sizes[1]}', with_peer([
        lambda: update_arm('packed', shape, packed), lambda: update_arm('padded', shape, padded)],
        'lengths')
  elif comparison == 'head':
    sizes = sorted({max(1, shape.completion // n) for n in (32, 8, 2, 1)})
    yield f'head, vocabulary {shape.head_vocab}', [
        lambda: head_arm('as trained', shape, as_trained),
        *(lambda n=n: head_arm(f'chunk {n * shape.prompts * shape.group}', shape, in_chunks(n))
          for n in sizes),
        lambda: head_arm('whole logits', shape, whole_logits)]
  elif comparison == 'remat':
    batch = token_batch(arrays(shape, 'short'))
    yield 'remat', [lambda remat=remat: update_arm(remat, shape, batch, remat=remat)
                    for remat in ('dots', 'none', 'full')]
  else:
    batch = token_batch(arrays(shape, 'short'))
    yield f'compile, {shape.layers} layers', [lambda: update_arm('update', shape, batch)]


# --- the parent


def measure(makers, repetitions):
  """Lets arms take turns; returns them."""
  made = [make() for make in makers]
  if repetitions:
    for arm in made:
      arm.run(timed=False)
  for turn in range(repetitions):
    for arm in made[::-1] if turn % 2 else made:  # nobody always comes behind the same one
      arm.run()
  return made


def check_comparable(made):
  """Raises SystemExit where the arms train on different numbers of tokens."""
  counts = {arm.name: arm.tokens for arm in made}
  if len(set(counts.values())) > 1:
    raise SystemExit(f'not comparable: trained tokens {counts}')


def rows_of(title, made, shape):
  """The rows of a comparison, medians over the turns."""
  import jax
  rows = []
  for arm in made:
    median = lambda name: statistics.median(run[name] for run in arm.runs) if arm.runs else None
    seconds, cpu = median('seconds'), median('cpu_seconds')
    row = {'bench': 'update', 'comparison': title, 'name': arm.name,
           'versions': {'jax': jax.__version__}, 'device': jax.devices()[0].device_kind,
           'dtype': 'float32', 'shape': dataclasses.asdict(shape), 'repetitions': len(arm.runs),
           'tokens': arm.tokens, 'seconds': seconds, 'cpu_seconds': cpu,
           'peak_rss_mib': bench_common.peak_rss_mib(),
           'machine': bench_common.machine(), **arm.facts}
    if arm.runs:
      row.update(
          seconds_min=min(run['seconds'] for run in arm.runs),
          seconds_max=max(run['seconds'] for run in arm.runs), cores_used=cpu / seconds,
          tokens_per_second=arm.tokens / seconds)
      row.update({f'times_{made[0].name}': statistics.median(
          other['seconds'] / own['seconds'] for other, own in zip(arm.runs, made[0].runs)),
                  f'cpu_times_{made[0].name}': cpu / rows[0]['cpu_seconds'] if rows else 1.0})
    rows.append(row)
  return rows


def print_table(title, rows):
  """Prints medians, and each arm's time as a multiple of the first one's."""
  first = rows[0]['name']
  columns = {
      's': ('seconds', '.3f'), 'CPU s': ('cpu_seconds', '.3f'), 'cores': ('cores_used', '.2f'),
      'tokens/s': ('tokens_per_second', '.0f'), 'rows hold': ('forward_tokens', 'd'),
      'temp MiB': ('temporary_mib', '.0f'), 'compile s': ('compile_seconds', '.1f'),
      f'x {first}': (f'times_{first}', '.2f'), 'x CPU': (f'cpu_times_{first}', '.2f')}
  print('', title, *bench_common.table(rows, columns, name=14, cell=13), sep='\n')


def main():
  arguments, shape = parse()
  everything = []
  for comparison in arguments.compare.split(','):
    for title, makers in arms(comparison, shape, PEERS[arguments.peer]):
      made = measure(makers, 0 if comparison == 'compile' else arguments.repetitions)
      check_comparable(made)
      rows = rows_of(title, made, shape)
      print_table(title, rows)
      sys.stdout.flush()
      everything += rows
      for arm in made:
        arm.close()
  print()
  for row in everything:
    print(json.dumps(row))


if __name__ == '__main__':
  main()
