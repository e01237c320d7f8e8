"""One stage made ready to train: its state, frozen trees, batches, step and evaluation."""

import dataclasses
import functools
import inspect
import os

import jax
import jax.numpy as jnp

from ptjax import assembly
from ptjax import keys
from ptjax import reference
from ptjax import sharding
from ptjax.data import log_prob_cache
from ptjax.models import hub
from ptjax.rollout import sampler
from ptjax.training import experience
from ptjax.training import held_out
from ptjax.training import layout
from ptjax.training import offline
from ptjax.training import online
from ptjax.training import optimizer as optimizers
from ptjax.training import packing
from ptjax.training import recipes
from ptjax.training import state as training_state
from ptjax.training import step as training_step
from ptjax.training import trained


class StageRun:
  """What a stage trains with.

  Args:
    plan: stages.StagePlan.
    policies: role -> assembly.Policy; 'policy' is the one that trains.
    data: doors.Data.
    mesh: the mesh.
    folder: pathlib.Path of the run.
    here: whether the update is for the machine that compiles it.
  """

  def __init__(self, plan, policies, data, mesh, folder, *, here=True):
    self.plan, self._here = plan, here
    self._config = plan.config
    self._policies, self._policy = policies, policies['policy']
    self._data, self._mesh = data, mesh
    self._folder = folder / 'reference' / str(plan.stage.index)
    self.bound = plan.bind()
    shapes = hub.param_shapes(self._policy.config)
    if self._has_critic:
      shapes = {**shapes, 'critic': jax.eval_shape(self._init_critic, shapes)}
    self._whole_shapes = _with_shardings(shapes, sharding.tree_sharding(mesh, shapes))
    self._shapes = trained.shapes(self._config.lora, shapes)
    self._optimizer, self._schedule = optimizers.make_optimizer(
        self._config.optimizer, plan.stage.steps, self._shapes)
    self._loss_state = training_step.initial_loss_state(self.bound.loss)
    self._shardings = training_state.shardings(
        mesh, self._shapes, self._optimizer, self._loss_state, follows=self._follows)
    self._frozen = {}
    self._start = None  # the model as the stage found it, where something still reads it
    merge = functools.partial(trained.whole, self._config.lora)
    self._merge = jax.jit(merge, out_shardings=sharding.tree_sharding(mesh, shapes))
    self._forward = assembly.make_forward(plan, policies)
    self._samplers = {}
    self._packers = packing.packers(
        None if plan.online else data.doors.get(plan.stage.index),
        width=self._policy.config.width,
        multiple=sharding.batch_size(mesh) * self._config.training.micro_batches,
    ) if plan.packs_completions else {}

  # --- state

  def targets(self):
    """Shapes and shardings of the state that this stage's checkpoints hold."""
    return _with_shardings(jax.eval_shape(self._init, self._shapes), self._shardings)

  def shapes(self, role):
    """Shapes and shardings of a role's parameters: of 'policy' those that train, else a model's."""
    if role == 'policy':
      return self.targets().params
    if role == 'teacher':
      found = hub.param_shapes(self._policies[role].config)
      return _with_shardings(found, self._place(found))
    return self._model_shapes

  def frozen_shapes(self):
    """Shapes and shardings of the trees that take part in a step without training."""
    found = {'base': self._model_shapes} if self._config.lora.rank else {}
    return {**found, **{role: self.shapes(role) for role in self._frozen_roles}}

  def begin(self, params):
    """Returns the state before the first step, from the model's parameters (or None: load them)."""
    if params is None:
      params = self._policy.load(self._place)
    model = params  # what stays frozen has no critic
    if self._has_critic:
      params = {**params, 'critic': jax.jit(
          self._init_critic, out_shardings=self._place(self._whole_shapes['critic']))(params)}
    if self.keeps_start:
      reference.save_params(self._folder / 'params', model)
    self._load_frozen()
    self._attach_reference(model)
    lora = self._config.lora
    key = keys.stream(self._config.seed, 'lora', self.plan.stage.index)
    if lora.rank:
      self._start = self._frozen['base'] = model
      params = jax.jit(lambda p, k: trained.start(lora, p, k)[0],
                       out_shardings=self._shardings.params)(params, key)
    elif self.keeps_start:
      self._start = jax.tree.map(jnp.copy, model)
    self._teach_self()
    return jax.jit(self._init, out_shardings=self._shardings, donate_argnums=0)(params)

  def resume(self, step):
    """Gets everything but the state, which is in the checkpoint, as it was after `step` steps."""
    if self.keeps_start:
      self._start = reference.load_params(self._folder / 'params', self._model_shapes)
      if self._config.lora.rank:
        self._frozen['base'] = self._start
      rollouts = -(-int(step) // self.plan.updates_per_rollout)  # begun by then
      number = self._round(rollouts - 1) if rollouts else 0
      if number:
        self._start = reference.load_params(self._folder / f'round_{number}', self._model_shapes)
    self._load_frozen()
    self._attach_reference(None)

  def whole(self, params):
    """The policy's parameters, of what trains."""
    if self._config.lora.rank:
      params = self._merge(params, self._frozen)
    return {name: tree for name, tree in params.items() if name != 'critic'}

  @property
  def base(self):
    """The frozen parameters under adapters."""
    return self._frozen['base']

  @property
  def _has_critic(self):
    return 'values' in training_step.model_outputs(self.bound.loss)

  def _init_critic(self, params):
    """A fresh critic: a head of zeros on the policy's states or, whole, on a copy of its layers."""
    head = {'kernel': jnp.zeros((self._policy.config.width, 1), jnp.float32),
            'bias': jnp.zeros(1, jnp.float32)}
    if self._config.critic == 'head':
      return head
    body = {name: tree for name, tree in params.items() if name not in ('head', 'score')}
    return {**jax.tree.map(jnp.copy, body), 'score': head}

  def _init(self, params):
    return training_state.init(params, self._optimizer, self._loss_state, follows=self._follows)

  @property
  def _follows(self):
    """Whether the reference moves, and so lies in the state."""
    return self.bound.follow is not None

  def _place(self, shapes):
    return sharding.tree_sharding(self._mesh, shapes)

  @property
  def keeps_start(self):
    """Whether the stage goes on reading the model it began with: adapters' base, or reference."""
    reads = self.bound.needs_reference or self._self_taught or (
        {'reference', 'mixture'} & set(self._recipe.samplers))
    return bool(self._config.lora.rank or self.plan.online and reads)

  @property
  def _self_taught(self):
    """Whether the teacher is the policy as the stage found it, shown more than the policy is."""
    return self._recipe.privileged is not None and self._config.teacher is None

  def _teach_self(self):
    if self._self_taught:
      self._frozen['teacher'] = self._start

  @property
  def _model_shapes(self):
    return {name: tree for name, tree in self._whole_shapes.items() if name != 'critic'}

  # --- rounds, in each of which another policy is the reference

  def _round(self, index):
    """In which round rollout number `index` is drawn; from 0."""
    steps = self._config.training.renew_reference_steps
    if steps is None and self._recipe.renews_reference:
      door = self._data.doors[self.plan.stage.index]
      steps = door.steps_per_epoch * self.plan.updates_per_rollout
    return index * self.plan.updates_per_rollout // steps if steps else 0

  def _renew(self, params, index):
    """Makes the policy the reference where a round begins, and keeps it for a resume."""
    number = self._round(index)
    if not index or number == self._round(index - 1):
      return False
    self._start = jax.tree.map(jnp.copy, self.whole(params))
    reference.save_round(self._folder, number, self._start)
    checkpoints = self._config.checkpoint
    oldest = self._round(max(0, index - -(-(checkpoints.keep + 1) * checkpoints.every_steps //
                                           self.plan.updates_per_rollout)))
    reference.drop_rounds(self._folder, oldest)
    self._teach_self()
    return True

  @property
  def _frozen_roles(self):
    return [role for role in ('teacher',)
            if role in self.plan.row.models and role in self._policies]

  def _load_frozen(self):
    for role in self._frozen_roles:
      if not self._self_taught:
        self._frozen[role] = self._policies[role].load(self._place)
    self._teach_self()

  def lay_out(self, batch, use='update'):
    """A host batch, with packed rows where the stage packs them; `use` is 'update' or 'pass'."""
    return self._packers[use](batch) if self._packers else batch

  # --- what the loop calls

  def train_step(self):
    """Returns `(state, batch) -> (state, metrics)`."""
    step = self.update()
    return lambda state, batch: step(state, batch, self._frozen)

  def update(self):
    """Returns the compiled `(state, batch, frozen) -> (state, metrics)`."""
    small = self._here and self._mesh.size == 1 and jax.default_backend() == 'cpu'
    return training_step.make_train_step(
        self._forward, self.bound.loss, self._optimizer, schedule=self._schedule,
        seed=self._config.seed, follow=self.bound.follow, mesh=self._mesh,
        state_sharding=self._shardings, micro_batches=self._config.training.micro_batches,
        part_tokens=layout.CPU_PART_TOKENS if small else None)

  def source(self):
    """Returns where the stage's batches come from."""
    config, door = self._config, self._data.doors[self.plan.stage.index]
    if self.bound.own_turn is not None:
      draw = self._sampler('policy', *self.drawn_by()['policy'])
      return offline.MixedSource(door, draw, self.bound.own_turn, seed=config.seed,
                                 mesh=self._mesh, samplers=self._samplers)
    if not self.plan.online:
      return offline.OfflineSource(door, mesh=self._mesh, lay_out=self.lay_out)
    samplers = self.samplers()
    log_probs = {name: self._pass(*what) for name, what in self.passes().items()}
    return online.RolloutSource(
        self.collector(door, samplers, log_probs, self._data.rewards), config.training,
        seed=config.seed, mesh=self._mesh, samples_every=config.log.samples_every,
        lay_out=self.lay_out, learners={**self._samplers, **self._packers})

  def collector(self, door, samplers, log_probs, reward_set):
    """Returns what makes batches of prompts (see experience.Collector for the arguments)."""
    config = self._config
    return experience.Collector(
        door=door, tokenizer=self._policy.tokenizer, samplers=samplers, reward_set=reward_set,
        estimator=self.bound.estimator, rollout=config.rollout, seed=config.seed,
        mask_truncated=config.training.mask_truncated, log_probs=log_probs, recipe=self._recipe,
        judge=self._data.judge,
        takes=frozenset(inspect.signature(self.bound.loss).parameters),
        num_samples=config.log.samples, extra_rollouts=self.plan.extra_rollouts,
        overlong_tokens=self.plan.overlong_tokens, overlap=config.rewards.overlap,
        renew=self._renew if self.keeps_start else None,
        max_teacher_tokens=self._policy.config.max_length - config.rollout.max_completion_tokens)

  def drawn_by(self):
    """Sampler's name -> (role of the model, SamplingOptions): who may be asked for completions."""
    options = assembly.sampling_options(self._config, self._policy)
    if self.bound.own_turn is not None:
      options = dataclasses.replace(options, group_size=1)
    found = {'policy': ('policy', options)}
    if 'greedy_rewards' in self._arguments:
      found['greedy'] = 'policy', dataclasses.replace(options, temperature=0.0, group_size=1)
    if 'optimal_values' in self._arguments or 'reference' in self._recipe.samplers:
      found['reference'] = 'reference', options
    if 'mixture' in self._recipe.samplers:
      share = self._config.rollout.reference_share
      found['mixture'] = 'mixture', dataclasses.replace(options, mixture=(1.0 - share, share))
    if 'teacher' in self._recipe.samplers:
      found['teacher'] = 'teacher', options
    return found

  def samplers(self):
    """Returns {name: (params, prompts, key) -> Completions} of all that `drawn_by` names."""
    return {name: self._sampler(name, *who) for name, who in self.drawn_by().items()}

  def passes(self):
    """Input's name -> (role of the model, output): forward passes over every rollout."""
    found = {}
    if self.bound.needs_old_log_probs and not self._config.rollout.reuse_log_probs:
      found['old_log_probs'] = 'policy', 'log_probs'
    if 'old_values' in self._arguments:
      found['old_values'] = 'policy', 'values'
    if self.bound.needs_reference:
      found['reference_log_probs'] = 'reference', 'log_probs'
    if 'teacher_log_probs' in self._arguments:
      found['teacher_log_probs'] = 'teacher', 'log_probs'
    return found

  def pass_step(self, role, output):
    """Returns the compiled `(params, batch, frozen) -> [B, T]` of one of `passes`."""
    forward = self._forward if role == 'policy' else (
        assembly.make_forward(self.plan, self._policies, role=role))
    return training_step.make_log_prob_step(
        forward, output=output, parts=self._config.training.micro_batches, mesh=self._mesh)

  @property
  def _recipe(self):
    return recipes.RECIPES[self.plan.row.recipe]

  @property
  def _arguments(self):
    """What loss and advantage estimator ask for."""
    functions = filter(None, (self.bound.loss, self.bound.estimator))
    return {name for function in functions for name in inspect.signature(function).parameters}

  def _sampler(self, name, role, options):
    policy = self._policies['teacher' if role == 'teacher' else 'policy']
    draw = sampler.make_sampler(policy.config, options, mesh=self._mesh,
                                decode_text=self._policy.tokenizer.decode)
    self._samplers[name] = draw
    if role == 'policy':
      return lambda params, prompts, key: draw(self.whole(params), prompts, key)
    if role == 'mixture':
      return lambda params, prompts, key: draw([self.whole(params), self._start], prompts, key)
    return lambda params, prompts, key: draw(self._frozen_model(role), prompts, key)

  def _pass(self, role, output):
    outputs = self._host_outputs(role, output)
    if role == 'policy':
      return outputs
    return lambda params, batch: outputs(self._frozen_model(role), batch)

  def _frozen_model(self, role):
    return self._start if role == 'reference' else self._frozen[role]

  def evaluation(self):
    """Returns `evaluate(params) -> metrics` of the stage's loss on held-out rows, or None."""
    door = self._data.held_out.get(self.plan.stage.index)
    if door is None:
      return None
    step = training_step.make_loss_step(self._forward, self.bound.loss, mesh=self._mesh)
    return lambda params: held_out.evaluate(
        door, lambda batch: step(params, batch, self._loss_state, frozen=self._frozen),
        batch_size=self._config.training.batch_size, mesh=self._mesh,
        name=self.plan.row.name, lay_out=self.lay_out)

  def _host_outputs(self, role, output='log_probs'):
    step = self.pass_step(role, output)
    return lambda params, batch: sharding.fetch(
        step(params, training_step.place(self.lay_out(batch, 'pass'), self._mesh),
             frozen=self._frozen))

  # --- the reference of an offline stage

  @property
  def reads_reference(self):
    """Whether the stage's rows come with log-probs of the model as the stage found it.

    Where the reference follows the policy only held-out rows do: their yardstick stays.
    """
    held_out = self._data.held_out.get(self.plan.stage.index)
    return (not self.plan.online and self.bound.needs_reference
            and (held_out is not None or not self._follows))

  def _attach_reference(self, params):
    """Gives offline rows their reference log-probs: computed from `params`, or read if None."""
    if not self.reads_reference:
      return
    score = self._host_outputs('reference')
    index = self.plan.stage.index
    if params is not None:
      weights = log_prob_cache.digest_params(params)
    for name, door in (('rows', None if self._follows else self._data.doors.get(index)),
                       ('held_out', self._data.held_out.get(index))):
      if door is None:
        continue
      key = log_prob_cache.Key(
          weights=None if params is None else weights,
          tokenizer=log_prob_cache.digest_tokenizer(self._policy.tokenizer),
          template=log_prob_cache.digest_template(self._policy.tokenizer),
          rows=door.examples.digest())
      kept = self._folder / name
      if params is None:
        reference.restore(door, key, kept)
        continue
      shared = reference.cache_folder(self._config.data.reference_cache, self._config.dataset,
                                      os.path.expanduser('~/.cache/ptjax/log_probs'))
      reference.attach(door, functools.partial(score, params), key, (shared, kept),
                       parts=sharding.batch_size(self._mesh),
                       batch_size=self._config.training.batch_size)


def _with_shardings(shapes, shardings):
  return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d),
                      shapes, shardings)
