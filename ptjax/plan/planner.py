"""`--plan`: what a run would need, without running it.

Memory comes from the run's own programs, compiled for the real mesh from shapes alone (on virtual
CPU devices where the machine has not got them); FLOPs and bytes are counted from shapes; seconds
are those divided by stated rates (rates.py). fit.py asks how much would fit, text.py writes it all
down.
"""

import collections
import dataclasses
import math
import os
import re

import jax
import jax.numpy as jnp

from ptjax import assembly
from ptjax import config as settings
from ptjax import doors
from ptjax import huge_pages
from ptjax import learned
from ptjax import process
from ptjax import sharding
from ptjax import stages
from ptjax.data import sources
from ptjax.evaluation import tasks
from ptjax.models import costs
from ptjax.models import hub
from ptjax.models import presets
from ptjax.plan import dry_batch
from ptjax.plan import dry_run
from ptjax.plan import fit as plan_fit
from ptjax.plan import rates as device_rates
from ptjax.plan import text as plan_text
from ptjax.training import step as training_step
from ptjax.training import trained

# Hub models whose shape is known without fetching anything.
KNOWN_SHAPES = {
    **{f'Qwen/Qwen2.5-{size}{kind}': f'qwen2.5-{size.lower()}'
       for size in ('0.5B', '1.5B', '7B') for kind in ('', '-Instruct')},
    'openai-community/gpt2': 'gpt2',
}
# Of a run on a CPU, beside all else that a plan counts: its programs, what compiling them leaves,
# pages of libraries. Measured of 1 M parameters: 250 of SFT, 255 to 380 with rollouts.
_RUNTIME_MIB, _DRAWING_MIB, _HUGE_PAGES_MIB = 260, 60, 30
PARTS = ('rollout', 'passes', 'update')  # of a stage, that can be compiled alone


@dataclasses.dataclass(frozen=True)
class Work:
  """One part of an optimizer step, or what is done once before the first."""
  name: str
  flops: float = 0.0  # of all devices together
  moved: float = 0.0  # bytes between a device and its memory: weights, caches, optimizer, logits
  received: dict = dataclasses.field(default_factory=dict)  # collective -> bytes a device receives
  near: float = 0.0  # of these, bytes from devices of its own node
  once: bool = False

  def seconds(self, rates, devices):
    """Sums computing and communication; neither overlap nor host time is assumed."""
    return (max(self.flops / devices / rates.flops, self.moved / rates.bytes)
            + self.near / rates.link
            + (sum(self.received.values()) - self.near) / rates.network)

  def shared(self, updates):
    """This work where it is done once in so many optimizer steps."""
    return dataclasses.replace(
        self, flops=self.flops / updates, moved=self.moved / updates,
        received={kind: size / updates for kind, size in self.received.items()},
        near=self.near / updates)


@dataclasses.dataclass(frozen=True)
class StageEstimate:
  """What a stage needs; bytes are per device."""
  name: str
  rows: costs.Rows  # of a whole rollout, or of a batch of demonstrations
  resident: dict  # part -> bytes, there all the time
  phases: dict  # phase -> {part -> bytes}, each there while the phase lasts
  work: tuple  # Work
  programs: dict  # name -> dry_run.Program
  remat: str = ''  # what the update recomputes, and whether that was left to us
  may_pack: bool = False  # whether shorter completions than those planned may share rows

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
  process.use_compile_cache(config.log.compile_cache)
  mesh = planning_mesh(config.mesh)
  plans, policies, rows = _prepare(config, mesh)
  model = policies['policy'].config
  rates = device_rates.assumed(config.plan, model, mesh)
  found, fits = [], []
  for one, own in zip(plans, rows):
    measure = lambda plan, parts=PARTS, own=own: stage(plan, policies, mesh, own, parts)
    found.append(measure(one))
    fits.append(plan_fit.fit(one, found[-1], measure, sharding.batch_size(mesh), rates.memory))
  return plan_text.text(config, model, mesh, rates, found, fits,
                        local=all(own is not None for own in rows))


def planning_mesh(text):
  """Builds the mesh, on virtual CPU devices if the machine has fewer than it names."""
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
  plans, policies, rows = _prepare(config, mesh)
  return policies['policy'].config, [
      stage(one, policies, mesh, own) for one, own in zip(plans, rows)]


def _prepare(config, mesh):
  """The stages' plans, the models, and for each stage what `training_rows` gives."""
  plans = stages.stage_plans(config)
  policies = assembly.load_policies(config, plans, load=load_policy)
  assembly.check(plans, policies['policy'].config, mesh)
  return plans, policies, [training_rows(plan, config) for plan in plans]


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


def training_rows(plan, config):
  """The rows a stage of a run would train on; None where that takes a network to say."""
  drops = plan.config.data.decontaminate == 'drop' and config.eval.dataset is not None
  known = config.model in presets.names() or os.path.isdir(config.model)
  names = [plan.config.dataset, *([tasks.split(config.eval.dataset)[1]] if drops else [])]
  if not known or any(map(_on_hub, names)):
    return None
  return doors.training_rows(plan, config)[0] if drops else doors.load_rows(plan.config)


def _on_hub(dataset):
  name = dataset.partition('@')[0].partition(':')[0]
  return bool(re.fullmatch(r'[\w.-]+/[\w.-]+', name)) and not os.path.exists(name) and not (
      os.path.splitext(name)[1] in sources.SUFFIXES)


def stage(plan, policies, mesh, rows, parts=PARTS):
  """Compiles a stage's programs and puts its numbers together.

  Args:
    plan: stages.StagePlan.
    policies: role -> assembly.Policy.
    mesh: the mesh.
    rows: see `dry_batch.make`.
    parts: which of PARTS.
  """
  model = policies['policy'].config
  compiled = {role: dataclasses.replace(policy, config=dry_run.compiled_dtype(policy.config, mesh))
              for role, policy in policies.items()}
  here = device_rates.is_this_machine(plan.config.plan, model, mesh)
  made, widest = dry_batch.make(
      plan, compiled, mesh, rows, memory=device_rates.memory(plan.config.plan, model, mesh),
      here=here)
  found = _Found(made.plan, policies, mesh, made, widest)
  if 'rollout' in parts:
    found.add_rollouts()
  if 'passes' in parts:
    found.add_passes()
  if 'update' in parts:
    found.add_update()
  if here:
    found.add_process()
  return StageEstimate(plan.stage.name, widest.rows, found.resident, found.phases,
                       tuple(found.work), found.programs,
                       remat=made.plan.config.model_settings.remat
                       + ' (auto)' * (plan.config.model_settings.remat == 'auto'),
                       may_pack=plan.online and plan.packs_completions)


class _Found:
  """What is known of a stage so far."""

  def __init__(self, plan, policies, mesh, made, widest):
    self._plan, self._policies, self._mesh = plan, policies, mesh
    self._made, self._widest = made, widest
    self._updates = plan.updates_per_rollout
    self.resident = _resident(made, widest, mesh)
    self.phases, self.work, self.programs = {}, [], {}
    scorers = learned.scoring_models(plan.config) if plan.online else {}
    for name, model in scorers.items():  # what they compute with is a batch of 64 at most
      self.resident[name] = dry_run.bytes_per_device(dry_run.placed_params(model, mesh))
      self.work.append(Work(
          name, costs.log_prob_flops(model, widest.rows), self._weights(model)).shared(
              self._updates))

  def add_process(self):
    """What the system sees beside arrays, of a process that runs on the CPU.

    Freed memory stays with the process (process.keep_freed_memory), and the pieces that a rollout
    leaves are too small for the one that an update takes.
    """
    mib = _RUNTIME_MIB + _DRAWING_MIB * bool(self._widest.draws)
    self.resident['programs and runtime'] = 2**20 * (mib + _HUGE_PAGES_MIB * huge_pages.asked_for())
    drawn = [parts for phase, parts in self.phases.items() if phase.startswith('rollout')]
    if drawn and 'update' in self.phases:
      self.phases['update'][plan_fit.KEPT] = max(sum(parts.values()) for parts in drawn)

  def _model(self, role):
    return self._policies['teacher' if role == 'teacher' else 'policy'].config

  def _weights(self, model):
    """Bytes of weights that a device reads in one pass, gathered along fsdp."""
    return costs.product_weights(model) * jnp.dtype(model.dtype).itemsize / (
        self._mesh.shape['tensor'])

  def add_rollouts(self):
    """Everything that is drawn; it finds lengths that the model has no positions for."""
    for number, (name, rows) in enumerate(self._widest.draws):
      role, options = self._made.drawn_by()[name]
      model, who = self._model(role), '' if name == 'policy' else name
      rollout = dry_run.rollout(model, options, self._mesh, rows)
      self.programs.update({f'{part}, {name}' if number else part: program
                            for part, program in rollout.programs.items()})
      phase = f'rollout, {who}' if who else 'rollout'
      self.phases[phase] = _rollout_memory(rollout)
      if self._plan.config.lora.rank and role not in ('reference', 'teacher'):
        self.phases[phase]['merged weights'] = self.resident['base']
      steps = self._updates / self._widest.draw_share
      for work in _rollout_work(model, self._mesh, rows, rollout, self._weights(model)):
        self.work.append(dataclasses.replace(
            work.shared(steps), name=f'{work.name}, {who}' if who else work.name))

  def add_passes(self):
    """Forward passes over each rollout, and the reference's over the rows of an offline stage."""
    for name, batch in self._widest.passes.items():
      role, output = self._made.passes()[name]
      said = name.replace('_', ' ').replace('log probs', 'log-probs')
      scoring = self._pass(said, role, output, batch)
      self.phases[said] = {'activations': scoring.temporaries + scoring.outputs}
      self.work.append(self._pass_work(said, role, batch, scoring).shared(self._updates))
    if self._made.reads_reference:
      # Before the optimizer's state is there, and in the update's parts: never the fullest moment.
      said, batch = 'reference log-probs', self._widest.batch
      scoring = self._pass(said, 'reference', 'log_probs', batch)
      one = self._pass_work(said, 'reference', batch, scoring)
      self.work.append(dataclasses.replace(one.shared(1 / self._widest.batches), once=True))

  def _pass(self, said, role, output, batch):
    program = dry_run.forward_pass(self._made, role, output, batch, self._mesh)
    self.programs[said] = program
    return program

  def _pass_work(self, said, role, batch, program):
    model, parts = self._model(role), self._plan.config.training.micro_batches
    return Work(said, costs.log_prob_flops(model, dry_batch.rows_of(batch)),
                parts * self._weights(model), program.received, program.near)

  def add_update(self):
    """The optimizer step."""
    made, mesh, options = self._made, self._mesh, self._plan.config.training
    update = self.programs['update'] = dry_run.update(made, self._widest.batch, mesh)
    gradients = min(dry_run.bytes_per_device(made.shapes('policy')), update.temporaries)
    self.phases['update'] = {'gradients': gradients,
                             'activations': update.temporaries - gradients + update.outputs}
    # Forward and twice that backward read the weights, in several parts of a loss that looks at the
    # whole batch a further forward pass; the optimizer reads and writes them, their gradient and
    # its own state.
    per_token = _per_token(self._plan, self._widest.batch)
    passes = options.micro_batches * (4 if options.micro_batches > 1 and not per_token else 3)
    state = made.targets()
    moved = passes * self._weights(self._model('policy')) + 2 * (
        dry_run.bytes_per_device((state.params, state.opt_state)) + gradients)
    flops = _update_flops(self._plan, self._policies, self._widest, per_token)
    self.work.append(Work('update', flops, moved, update.received, update.near))


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


def _per_token(plan, batch):
  """Whether the update makes its gradient in one pass, each token's as soon as it is scored."""
  loss, parts = plan.bind().loss, plan.config.training.micro_batches
  if parts > 1 and training_step.model_outputs(loss) != training_step.outputs_of_head(loss):
    return False  # a critic's values are wanted first
  found, seen = [], jax.ShapeDtypeStruct(batch.loss_mask.shape, jnp.float32)
  batch = batch.replace(inputs={'reference_log_probs': seen, **batch.inputs})  # of one that follows
  state, key = training_step.initial_loss_state(loss), jax.random.key(0)
  jax.eval_shape(lambda batch: found.append(
      training_step.head_slope(loss, batch, loss_state=state, key=key)), batch)
  return found[0] is not None


def _update_flops(plan, policies, widest, per_token):
  """FLOPs of an optimizer step, of all that takes part."""
  model, config = policies['policy'].config, plan.config
  rows = dry_batch.rows_of(widest.batch)
  options = {'remat': config.model_settings.remat, 'micro_batches': config.training.micro_batches,
             'per_token': per_token}
  flops = costs.update_flops(model, rows, adapters=_adapters(plan, model), **options)
  outputs = training_step.model_outputs(plan.bind().loss)
  if 'values' in outputs and config.critic == 'model':
    flops += costs.update_flops(dataclasses.replace(model, num_labels=1), rows, **options)
  if 'divergence' in outputs:
    flops += costs.log_prob_flops(policies['teacher'].config, rows) * (
        1 + (config.training.micro_batches > 1 and not per_token))
  return flops


def _adapters(plan, model):
  """Weights of one layer's adapters, 0 where the whole model trains."""
  if not plan.config.lora.rank:
    return 0
  found = trained.shapes(plan.config.lora, hub.param_shapes(model))['layers']
  return sum(leaf.size for leaf in jax.tree.leaves(found)) // model.num_layers


def _rollout_memory(rollout):
  """Parts of the rollout; its temporaries are those of the moment at which it holds most."""
  extra = [rollout.programs['prefill'].temporaries]
  if 'chunk' in rollout.programs:
    extra.append(rollout.programs['chunk'].temporaries + rollout.copies)
  return {'weights': rollout.weights, 'KV cache of prompts': rollout.store,
          'KV cache of completions': rollout.own, 'tokens, log-probs': rollout.completions,
          'temporaries': max(extra)}


def _rollout_work(model, mesh, rows, rollout, weights):
  """Prefill and decoding of one rollout."""
  shards = sharding.batch_size(mesh)
  logits = rows.completions / shards * model.vocab_size / mesh.shape['tensor'] * 4
  # A step reads the weights, both caches, and passes three times over float32 logits.
  moved = sum(rollout.steps * (weights + rollout.store + rollout.own * window / rollout.windows[-1]
                               + 3 * rollout.share * logits)
              for window in rollout.windows)
  decode = sum(rollout.steps * rollout.share * costs.decode_flops(model, rows, window)
               for window in rollout.windows)
  before = [rollout.programs[name] for name in ('weights', 'prefill')]
  chunks = [rollout.programs['chunk'] for _ in rollout.windows]
  total = lambda programs: dict(sum(
      (collections.Counter(program.received) for program in programs), collections.Counter()))
  near = lambda programs: sum(program.near for program in programs)
  return [Work('prefill', costs.prefill_flops(model, rows), weights, total(before), near(before)),
          Work('decode', decode, moved, total(chunks), near(chunks))]
