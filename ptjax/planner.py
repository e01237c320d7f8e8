"""`--plan`: what a run would need, without running it.

Memory comes from the run's own programs, compiled for the real mesh from shapes alone (on virtual
CPU devices where the machine has not got them); FLOPs and bytes are counted from shapes; seconds
are those divided by stated rates.
"""

import dataclasses
import json
import math
import os
import re
import time

import jax
import jax.numpy as jnp

from ptjax import assembly
from ptjax import config as settings
from ptjax import dry_batch
from ptjax import dry_run
from ptjax import learned
from ptjax import sharding
from ptjax import stages
from ptjax.data import sources
from ptjax.models import costs
from ptjax.models import hub
from ptjax.models import presets
from ptjax.training import step as training_step
from ptjax.training import trained

# Hub models whose shape is known without fetching anything.
KNOWN_SHAPES = {
    **{f'Qwen/Qwen2.5-{size}{kind}': f'qwen2.5-{size.lower()}'
       for size in ('0.5B', '1.5B', '7B') for kind in ('', '-Instruct')},
    'openai-community/gpt2': 'gpt2',
}
GIB = 2.0**30
_EFFICIENCY = 0.4  # of the data sheet's rates that a good program reaches


@dataclasses.dataclass(frozen=True)
class Rates:
  """What one device does per second."""
  name: str
  flops: float
  bytes: float  # to and from its memory
  link: float  # bytes received from other devices
  memory: float | None = None  # GiB it has, where known


# What makes a phase smaller.
_REMEDIES = {
    'update': 'raise training.micro_batches or set model_settings.remat=full',
    'log-probs': 'lower rollout.num_prompts or rollout.group_size',
    'values': 'lower rollout.num_prompts or rollout.group_size',
    'rollout': 'lower rollout.num_prompts, rollout.group_size or rollout.max_completion_tokens',
}

# Data sheets (SXM): dense bfloat16 and TF32 FLOP/s, memory and NVLink bytes/s (one way), GiB.
_DEVICES = {
    'A100': (312e12, 156e12, 2.04e12, 300e9, 80), 'H100': (989e12, 494e12, 3.35e12, 450e9, 80),
    'H200': (989e12, 494e12, 4.8e12, 450e9, 141),
}
_PER_NODE = 8
_NETWORK = 50e9  # bytes/s of each device's share of the network between nodes (400 Gbit/s)


@dataclasses.dataclass(frozen=True)
class Work:
  """One part of an optimizer step."""
  name: str
  flops: float  # of all devices together
  moved: float  # bytes between a device and its memory, where that may be the limit
  received: float  # bytes a device receives from others

  def seconds(self, rates, devices):
    """Sums computing and communication; neither overlap nor host time is assumed."""
    return (max(self.flops / devices / rates.flops, self.moved / rates.bytes)
            + self.received / rates.link)


@dataclasses.dataclass(frozen=True)
class StageEstimate:
  """What a stage needs; bytes are per device."""
  name: str
  rows: costs.Rows  # of a whole rollout, or of a batch of demonstrations
  resident: dict  # part -> bytes, there all the time
  phases: dict  # phase -> {part -> bytes}, each there while the phase lasts
  work: tuple  # Work, per optimizer step
  programs: dict  # name -> dry_run.Program

  @property
  def fullest(self):
    """The phase that holds most."""
    return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

  @property
  def peak(self):
    """Bytes of that phase with what is resident."""
    return sum(self.resident.values()) + sum(self.phases[self.fullest].values())


def plan(config):
  """Returns the plan as text; call before anything has touched a device.

  Raises:
    UserError: a config, mesh, model or data set that cannot work.
  """
  assembly.use_compile_cache(config.log.compile_cache)
  mesh = planning_mesh(config.mesh)
  model, stages = estimate(config, mesh)
  rates = assumed_rates(model, mesh)
  return '\n'.join([json.dumps(settings.to_dict(config), indent=2), '',
                    *_heading(config, model, mesh),
                    *(line for stage in stages for line in _stage_lines(stage, mesh, rates)),
                    '', *_notes(model, mesh, rates, stages)])


def planning_mesh(text):
  """Builds the mesh, on virtual CPU devices if the machine has fewer than it names."""
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # a job may use the GPU now
  sizes = [part.partition('=')[2].strip() for part in text.split(',') if part.strip()]
  count = math.prod(map(int, sizes)) if sizes and all(re.fullmatch(r'\d+', s) for s in sizes) else 0
  if not count:  # left to the machine's own devices, or malformed, which make_mesh explains
    return sharding.make_mesh(text)
  try:
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:
    pass  # devices are in use already, as in a notebook: they must do
  devices = jax.devices()
  if len(devices) != count:
    devices = jax.devices('cpu')[:count]
  return sharding.make_mesh(text, devices)


def estimate(config, mesh):
  """Compiles every stage's programs from shapes.

  Args:
    config: config.Config.
    mesh: the mesh.
  Returns:
    The TransformerConfig and a StageEstimate per stage.
  Raises:
    UserError: see `plan`.
  """
  plans = stages.stage_plans(config)
  policies = assembly.load_policies(config, plans, load=load_policy)
  model = policies['policy'].config
  assembly.check(plans, model, mesh)
  return model, [_stage(plan, policies, mesh) for plan in plans]


def load_policy(config, *, num_labels=0):
  """A model without its weights: as a run finds it or, of a hub name, its shape alone."""
  if config.model in presets.names() or os.path.isdir(config.model):
    return assembly.load_policy(config, num_labels=num_labels)
  dtypes = {'dtype': config.model_settings.dtype, 'param_dtype': config.model_settings.param_dtype,
            'num_labels': num_labels}
  if config.model in KNOWN_SHAPES:
    model = presets.get(KNOWN_SHAPES[config.model], **dtypes)
  else:
    model = hub.load_config(config.model, **dtypes)
  return assembly.Policy(model, None, (), None)


def _is_local(config):
  """Whether model and data can be read without a network."""
  known = config.model in presets.names() or os.path.isdir(config.model)
  name = config.dataset.partition('@')[0].partition(':')[0]
  on_hub = re.fullmatch(r'[\w.-]+/[\w.-]+', name) and not os.path.exists(name) and not (
      os.path.splitext(name)[1] in sources.SUFFIXES)
  return known and not on_hub


def _stage(plan, policies, mesh):
  """Compiles a stage's programs and puts its numbers together."""
  updates = plan.updates_per_rollout
  compiled = {role: dataclasses.replace(policy, config=dry_run.compiled_dtype(policy.config, mesh))
              for role, policy in policies.items()}
  made, widest = dry_batch.make(plan, compiled, mesh, local=_is_local(plan.config))
  held = _resident(made, widest, mesh)
  programs, phases, work = {}, {}, []
  scorers = learned.scoring_models(plan.config) if plan.online else {}
  for name, model in scorers.items():  # what they compute with is a batch of 64 at most
    held[name] = dry_run.bytes_per_device(dry_run.placed_params(model, mesh))
    work.append(Work(name, costs.log_prob_flops(model, widest.rows) / updates, 0, 0))
  for number, (name, rows) in enumerate(widest.draws):
    # First, for it finds lengths that the model has no positions for.
    role, options = made.drawn_by()[name]
    model = policies['teacher' if role == 'teacher' else 'policy'].config
    phase = 'rollout' if name == 'policy' else f'rollout, {name}'
    rollout = dry_run.rollout(model, options, mesh, rows)
    programs.update({part if not number else f'{part}, {name}': program
                     for part, program in rollout.programs.items()})
    phases[phase] = _rollout_memory(rollout)
    if plan.config.lora.rank and role not in ('reference', 'teacher'):
      phases[phase]['merged weights'] = held['base']
    work += _rollout_work(model, mesh, rows, rollout, updates, '' if name == 'policy' else name)
  for name, batch in widest.passes.items():
    role, _ = made.passes()[name]
    model = policies['teacher' if role == 'teacher' else 'policy'].config
    said = name.replace('_', ' ').replace('log probs', 'log-probs')
    scoring = programs[said] = dry_run.forward_pass(made, name, batch, mesh)
    phases[said] = {'activations': scoring.temporaries + scoring.outputs}
    work.append(Work(said, costs.log_prob_flops(model, dry_batch.rows_of(batch)) / updates, 0,
                     sum(scoring.received.values()) / updates))
  update = programs['update'] = dry_run.update(made, widest.batch, mesh)
  gradients = min(dry_run.bytes_per_device(made.shapes('policy')), update.temporaries)
  phases['update'] = {'gradients': gradients,
                      'activations': update.temporaries - gradients + update.outputs}
  work.append(Work('update', _update_flops(plan, policies, widest), 0,
                   sum(update.received.values())))
  return StageEstimate(plan.stage.name, widest.rows, held, phases, tuple(work), programs)


def _resident(made, widest, mesh):
  """Part -> bytes on one device, of what is there throughout the stage."""
  state = made.targets()
  critic = state.params.get('critic', {})
  trained_bytes, critic_bytes = map(dry_run.bytes_per_device, (state.params, critic))
  frozen = {name: dry_run.bytes_per_device(tree) for name, tree in made.frozen_shapes().items()}
  held = {'adapters' if 'base' in frozen else 'parameters': trained_bytes - critic_bytes}
  if critic:
    held['critic'] = critic_bytes
  held.update(frozen)
  if made.keeps_start and 'base' not in frozen:  # under adapters the base is the reference
    held['reference'] = dry_run.bytes_per_device(made.shapes('reference'))
  follower = dry_run.bytes_per_device(state.reference)
  if follower:
    held['reference'] = follower
  held['optimizer state'] = dry_run.bytes_per_device(state) - trained_bytes - follower
  held['one batch'] = dry_run.bytes_per_device(dry_run.place(widest.batch, mesh))
  return held


def _update_flops(plan, policies, widest):
  """FLOPs of an optimizer step, of all that takes part."""
  model, config = policies['policy'].config, plan.config
  rows = dry_batch.rows_of(widest.batch)
  options = {'remat': config.model_settings.remat, 'micro_batches': config.training.micro_batches}
  flops = costs.update_flops(model, rows, adapters=_adapters(plan, model), **options)
  outputs = training_step.model_outputs(plan.bind().loss)
  if 'values' in outputs and config.critic == 'model':
    flops += costs.update_flops(dataclasses.replace(model, num_labels=1), rows, **options)
  if 'divergence' in outputs:
    flops += costs.log_prob_flops(policies['teacher'].config, rows) * (
        1 + (config.training.micro_batches > 1))
  return flops


def _adapters(plan, model):
  """Weights of one layer's adapters, 0 where the whole model trains."""
  if not plan.config.lora.rank:
    return 0
  found = trained.shapes(plan.config.lora, hub.param_shapes(model))['layers']
  return sum(leaf.size for leaf in jax.tree.leaves(found)) // model.num_layers


def _rollout_memory(rollout):
  """Parts of the rollout; its temporaries are those of the moment at which it holds most."""
  widest = rollout.own[-1]
  extra = [rollout.programs['prefill'].temporaries + rollout.own[0] - widest]
  extra += rollout.own[-2:-1]  # while the widest caches are made, the ones before are there
  if 'chunk' in rollout.programs:
    extra.append(rollout.programs['chunk'].temporaries)
  return {'weights': rollout.weights, 'KV cache of prompts': rollout.store,
          'KV cache of completions': widest, 'tokens, log-probs': rollout.slots,
          'temporaries': max(extra)}


def _rollout_work(model, mesh, rows, rollout, updates, who):
  """Prefill and decoding, per optimizer step; `who` draws, if not the policy as usual."""
  named = lambda part: f'{part}, {who}' if who else part
  received = lambda name: sum(rollout.programs[name].received.values())
  shards = sharding.batch_size(mesh)
  logits = rows.completions / shards * model.vocab_size / mesh.shape['tensor'] * 4
  # A step reads the weights (of an untied embedding a few rows only), both caches, and passes
  # three times over float32 logits.
  embedding = 0 if model.tie_embeddings else (
      model.vocab_size * model.width * jnp.dtype(model.dtype).itemsize // mesh.shape['tensor'])
  moved = sum(rollout.steps * (rollout.weights - embedding + rollout.store
                               + rollout.own[-1] * window / rollout.windows[-1] + 3 * logits)
              for window in rollout.windows)
  decode = sum(rollout.steps * costs.decode_flops(model, rows, window)
               for window in rollout.windows)
  chunks = len(rollout.windows) * (received('chunk') if rollout.windows else 0)
  return [
      Work(named('prefill'), costs.prefill_flops(model, rows) / updates, 0,
           (received('weights') + received('prefill')) / updates),
      Work(named('decode'), decode / updates, moved / updates, chunks / updates)]


def assumed_rates(model, mesh):
  """The rates seconds are reckoned with: a GPU's, or this CPU's for a program meant for it."""
  device = mesh.devices.flat[0]
  if device.platform == 'cpu' and mesh.size == 1 and model.dtype == 'float32':
    return measured_rates()
  name = next((n for n in _DEVICES if n in device.device_kind), 'H100')
  half, single, memory, link, size = _DEVICES[name]
  several = mesh.size > _PER_NODE
  if several:  # a collective over all devices is as fast as its slowest link
    link = _NETWORK
  return Rates(f'{_EFFICIENCY:.0%} of the data sheet of {name}'
               + ', 400 Gbit/s each between nodes' * several,
               _EFFICIENCY * (half if model.dtype == 'bfloat16' else single),
               _EFFICIENCY * memory, _EFFICIENCY * link, size)


def measured_rates():
  """This device's float32 matrix-product FLOP/s and memory bytes/s, each the best of three."""
  turns = 4
  def best(function, argument):
    # In a loop, so that no fresh memory is touched for the first time.
    compiled = jax.jit(lambda x: jax.lax.fori_loop(0, turns, lambda _, y: function(y), x))
    jax.block_until_ready(compiled(argument))
    times = []
    for _ in range(3):
      started = time.perf_counter()
      jax.block_until_ready(compiled(argument))
      times.append((time.perf_counter() - started) / turns)
    return min(times)
  matrix, vector = jnp.ones((1024, 1024), jnp.float32), jnp.ones(1 << 23, jnp.float32)
  memory = 2 * vector.nbytes / best(lambda x: x + 1, vector)
  return Rates('products and copies measured here now',
               2 * 1024**3 / best(lambda x: x @ matrix / 1024, matrix), memory, memory)


# --- text


def _heading(config, model, mesh):
  count = sum(leaf.size for leaf in jax.tree.leaves(hub.param_shapes(model)))
  where = f'{mesh.size} {mesh.devices.flat[0].platform} device' + 's' * (mesh.size > 1)
  sizes = 'the longest of the data' if _is_local(config) else 'the limits set'
  return [f'model   {config.model}: {count / 1e6:,.1f} M parameters, {model.num_layers} layers, '
          f'width {model.width}, vocabulary {model.vocab_size}, {model.param_dtype} computing in '
          f'{model.dtype}',
          'mesh    ' + ', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())
          + f', planned on {where}', f'lengths {sizes}']


def _stage_lines(stage, mesh, rates):
  rows = stage.rows
  yield ''
  if rows.packed:
    yield (f'stage {stage.name}: {rows.prompts} packed row' + 's' * (rows.prompts > 1)
           + f' of {rows.prompt_tokens} tokens, up to '
           f'{rows.completion_tokens} of them targets')
  else:
    yield (f'stage {stage.name}: {rows.prompts} prompts x {rows.group_size}, up to '
           f'{rows.prompt_tokens} + {rows.completion_tokens} tokens')
  yield '  memory per device'
  for part, size in stage.resident.items():
    yield _row(part, size)
  for phase, parts in stage.phases.items():
    for part, size in parts.items():
      yield _row(f'{phase}: {part}', size)
  yield _row(f'peak, in {stage.fullest}', stage.peak)
  yield f'  {"work per optimizer step":26}{"FLOP":>12}{"moved":>12}{"received":>12}{"seconds":>10}'
  for work in stage.work:
    shown = work.name if len(work.name) < 24 else f'...{work.name[-20:]}'
    yield (f'    {shown:24}{_scaled(work.flops, 1000):>12}{_bytes(work.moved):>12}'
           f'{_bytes(work.received):>12}{work.seconds(rates, mesh.size):10,.3f}')
  flops, seconds = (sum(x) for x in zip(*(
      (work.flops, work.seconds(rates, mesh.size)) for work in stage.work)))
  yield f'    {"together":24}{_scaled(flops, 1000):>12}{"":24}{seconds:10,.3f}'


def _row(name, size):
  shown = name if len(name) < 36 else f'...{name[-32:]}'  # a model's path tells by its end
  return f'    {shown:36}{_bytes(size):>12}'


def _bytes(size):
  return _scaled(size, 1024, 'iB') if size else '-'


def _scaled(number, base, unit=''):
  """Writes a number with the prefix that keeps it short, e.g. 3.55 GiB; mega is the least."""
  number, power = number / base**2, 0
  while number >= 1000 and power < 3:
    number, power = number / base, power + 1
  return f'{number:,.{2 if power else 1}f} {"MGTP"[power]}{unit}'


def _notes(model, mesh, rates, stages):
  compiled = sum(program.seconds for stage in stages for program in stage.programs.values())
  yield (f'{sum(len(stage.programs) for stage in stages)} programs compiled in {compiled:.0f} s; '
         'nothing was run.')
  yield ('FLOP are of all devices, with all that is recomputed; bytes moved (between a device and '
         'its memory, counted for decoding alone) and received (from other devices) are per '
         'device.')
  yield (f'Seconds assume {rates.flops / 1e12:,.3g} TFLOP/s, {rates.bytes / 1e9:,.3g} GB/s moved '
         f'and {rates.link / 1e9:,.3g} GB/s received ({rates.name}), no overlap of computing and '
         'receiving, every completion at full length, and no time for rewards.')
  if dry_run.compiled_dtype(model, mesh) != model:
    yield (f'Temporaries and bytes received are those of programs in float32, since XLA widens '
           f'{model.dtype} on CPU; on a GPU both are smaller, activations down to half.')
  for stage in stages:
    if rates.memory and stage.peak > 0.92 * rates.memory * GIB:
      yield (f'Stage {stage.name} does not fit into {rates.memory} GiB in its phase '
             f'{stage.fullest}: {_remedy(stage.fullest)}; or split over more devices (--mesh).')


def _remedy(phase):
  return next(remedy for name, remedy in _REMEDIES.items() if name in phase)
