"""Runs a whole job: folder, stages, checkpoints, evaluation, report."""

import functools
import os
import shlex
import shutil
import sys
import traceback

import jax
import jax.numpy as jnp

from ptjax import assembly
from ptjax import config as settings
from ptjax import sharding
from ptjax.evaluation import evaluate as evaluation
from ptjax.evaluation import tasks
from ptjax.models import hub
from ptjax.rollout import sampler
from ptjax.training import algorithm as binding
from ptjax.training import checkpoint
from ptjax.training import experience
from ptjax.training import loop
from ptjax.training import metrics as metrics_files
from ptjax.training import offline
from ptjax.training import online
from ptjax.training import optimizer as optimizers
from ptjax.training import progress
from ptjax.training import report
from ptjax.training import run_folder
from ptjax.training import state as training_state
from ptjax.training import step as training_step


def run(config, *, argv=None):
  """Runs `config` to its end, or on from where its folder's newest checkpoint stands.

  Args:
    config: config.Config.
    argv: the command line, for the report and for the advice how to go on; default sys.argv.
  Raises:
    UserError: something the user can set right; found before training where possible.
    TrainingFailed, or what a stage raised; the traceback is then in error.txt.
  """
  assembly.keep_freed_memory()
  assembly.use_compile_cache(config.log.compile_cache)
  mesh = sharding.make_mesh(config.mesh)
  plans = assembly.stage_plans(config)
  policy = assembly.load_policy(config)
  assembly.check(config, plans, policy.config, mesh)
  data = assembly.load_data(config, plans, policy)
  with run_folder.open_run(config, assembly.out_dir(config), argv=argv) as folder:
    run_folder.check_writable(folder.path, assembly.bytes_needed(policy, config))
    try:
      with _Run(config, folder, mesh, policy, plans, data) as job:
        completed = job.run()
    except settings.UserError:
      raise
    except Exception as error:
      path = folder.write_error(traceback.format_exc())
      error.add_note(f'(traceback in {path})')
      raise
    finally:
      if data.rewards is not None:
        data.rewards.close()
  if not completed and jax.process_index() == 0:
    print(f'interrupted; a checkpoint is saved. To go on: {resume_command(config, argv)}')


def resume_command(config, argv=None):
  """The command that continues the run of `config` which `argv` started."""
  arguments = (sys.argv if argv is None else argv)[1:]
  if config.resume == 'never':
    arguments = [*arguments, '--resume=auto']  # of a repeated flag the last counts
  return shlex.join(['python', '-m', 'ptjax.launch', *arguments])


class _Run:
  """One run's open files and what its stages share."""

  def __init__(self, config, folder, mesh, policy, plans, data):
    self._config, self._folder, self._mesh = config, folder, mesh
    self._policy, self._plans, self._data = policy, plans, data
    self._compilations = loop.CompilationCounter()
    self._checkpointer = checkpoint.Checkpointer(
        folder.checkpoints, keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous)
    self._total_steps = plans[-1].stage.first_step + plans[-1].stage.steps
    self._counters = {'num_tokens': 0}
    self._evaluate = self._make_evaluate()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._checkpointer.close()  # waits: what is being written is not lost to an error

  def run(self):
    """Trains every stage, then writes model and report; returns False if it was interrupted."""
    restored = None
    if self._folder.resuming:
      restored = self._checkpointer.restore(self._targets)
    else:
      shutil.rmtree(self._folder.path / 'reference', ignore_errors=True)
    first = restored.metadata['stage'] if restored else 0
    at_step = restored.step if restored else None
    self._writer = metrics_files.MetricsWriter(
        self._folder.path, resume_step=at_step, tensorboard=self._config.log.tensorboard)
    completed = True
    with self._writer, loop.Interrupt() as interrupt, progress.Progress(
        self._total_steps, initial=at_step or 0) as self._progress:
      params = None
      for plan in self._plans[first:]:
        params, completed = self._stage(plan, params, restored, interrupt)
        restored = None
        if not completed:
          break
      self._checkpointer.wait()
    if not completed:
      return False
    hub.export(os.path.join(self._folder.path, 'model'), self._policy.config, params,
               self._policy.tokenizer, stop_ids=self._policy.stop_ids)
    if jax.process_index() == 0:
      self._finish()
    return True

  def _finish(self):
    lines = [f'model   {self._folder.path / "model"}']
    if self._config.log.report:
      lines.append(f'report  {report.write_report(self._folder.path)}')
    print(progress.final_table(self._folder.path))
    print('\n'.join(lines))

  def _bind(self, plan):
    """The stage's algorithm and optimizer.

    Returns:
      (algorithm.Bound, optimizer, schedule, `init(params) -> TrainState`, the state's shardings).
    """
    training = self._config.training
    per_rollout = training.mini_batches * training.epochs if plan.row.door == 'prompts' else 1
    bound = binding.bind(plan.row, plan.hyperparameters, updates_per_rollout=per_rollout)
    shapes = hub.param_shapes(self._policy.config)
    optimizer, schedule = optimizers.make_optimizer(plan.optimizer, plan.stage.steps, shapes)
    loss_state = training_step.initial_loss_state(bound.loss)
    return (bound, optimizer, schedule,
            lambda params: training_state.init(params, optimizer, loss_state),
            training_state.shardings(self._mesh, shapes, optimizer, loss_state))

  def _targets(self, metadata):
    """Shapes and shardings of the state that a checkpoint with this metadata holds."""
    _, _, _, init, shardings = self._bind(self._plans[metadata['stage']])
    return _with_shardings(
        jax.eval_shape(init, hub.param_shapes(self._policy.config)), shardings)

  def _stage(self, plan, params, restored, interrupt):
    """Trains one stage, from `params` or a restored checkpoint; returns (params, completed)."""
    stage, config = plan.stage, self._config
    online_stage = plan.row.door == 'prompts'
    bound, optimizer, schedule, init, shardings = self._bind(plan)
    if restored is not None:
      state = restored.arrays
      self._counters = restored.metadata['counters']
    else:
      if params is None:
        params = self._policy.load(functools.partial(sharding.tree_sharding, self._mesh))
      state = jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)
      if stage.index == 0 and self._evaluate is not None:
        self._record(0, {**self._evaluate(state.params), 'stage': 'start'}, None)
    temperature = config.rollout.temperature if online_stage else 1.0
    forward = assembly.make_forward(self._policy.config, temperature, config.model_settings.remat)
    reference = self._reference(bound, stage, state, shardings, restored) if online_stage else None
    source = self._source(plan, bound, forward, shardings, reference)
    if restored is not None and restored.experience is not None:
      source.restore(restored.experience, restored.metadata['pending_metrics'])
    train_step = training_step.make_train_step(
        forward, bound.loss, optimizer, schedule=schedule, seed=config.seed, mesh=self._mesh,
        micro_batches=config.training.micro_batches if plan is self._plans[-1] else 1,
        state_sharding=shardings)

    def save(step, state, pending, pending_metrics, counters):
      self._checkpointer.save(step, state, {
          'stage': stage.index, 'counters': counters, 'pending_metrics': pending_metrics,
      }, experience=pending)

    state, completed = loop.run(
        stage, state, source, train_step, record=self._record, save=save,
        evaluate=self._evaluate, eval_every=config.eval.every_steps,
        checkpoint_every=config.checkpoint.every_steps,
        max_bad_steps=config.training.max_bad_steps, interrupt=interrupt,
        counters=self._counters)
    return state.params, completed

  def _source(self, plan, bound, forward, shardings, reference):
    config = self._config
    if plan.row.door == 'demonstrations':
      return offline.DemonstrationSource(self._data.demonstrations[plan.stage.index],
                                         mesh=self._mesh)
    log_probs = training_step.make_log_prob_step(
        forward, mesh=self._mesh, params_sharding=shardings.params)
    host_log_probs = lambda params, batch: sharding.fetch(
        log_probs(params, training_step.place(batch, self._mesh)))
    collector = experience.Collector(
        door=self._data.prompts, tokenizer=self._policy.tokenizer,
        sample=sampler.make_sampler(
            self._policy.config, assembly.sampling_options(config, self._policy), mesh=self._mesh,
            decode_text=self._policy.tokenizer.decode),
        reward_set=self._data.rewards, estimator=bound.estimator, rollout=config.rollout,
        seed=config.seed, mask_truncated=config.training.mask_truncated,
        old_log_probs=host_log_probs if bound.needs_old_log_probs else None,
        reference_log_probs=None if reference is None else functools.partial(
            host_log_probs, reference),
        num_samples=config.log.samples)
    return online.RolloutSource(collector, config.training, seed=config.seed, mesh=self._mesh,
                                samples_every=config.log.samples_every)

  def _reference(self, bound, stage, state, shardings, restored):
    """The frozen reference: the policy as this stage found it, kept on disk for a resume."""
    if not bound.needs_reference:
      return None
    folder = self._folder.path / 'reference' / str(stage.index)
    with checkpoint.Checkpointer(folder, keep=1, asynchronous=False) as kept:
      if restored is None:
        reference = jax.tree.map(jnp.copy, state.params)
        kept.save(0, reference, {})
        return reference
      found = kept.restore(_with_shardings(state.params, shardings.params))
      if found is None:
        raise settings.UserError(f'{folder} is gone, and with it the reference this run was '
                                 'trained against; restore it, or start anew in another --out_dir')
      return found.arrays

  def _record(self, step, metrics, samples):
    metrics['perf/compilations'] = self._compilations.count
    if jax.process_index() == 0:
      self._writer.write(step, metrics)
      if samples:
        self._writer.write_samples(step, samples)
    self._progress.update(step, metrics)

  def _make_evaluate(self):
    """Returns `evaluate(params) -> metrics`, or None where there is nothing to evaluate on."""
    if self._data.evaluation is None:
      return None
    settings_ = self._config.eval
    generate = assembly.make_generate(self._config, self._policy, self._mesh)
    def evaluate(params):
      return evaluation.evaluate(
          self._data.evaluation, functools.partial(generate, params),
          samples=settings_.samples, ks=settings_.k)
    return evaluate


def _with_shardings(shapes, shardings):
  return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d),
                      shapes, shardings)
