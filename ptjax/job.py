"""Runs a whole job: folder, stages, checkpoints, evaluation, report."""

import functools
import json
import os
import shlex
import shutil
import sys
import traceback

import jax

from ptjax import asking
from ptjax import assembly
from ptjax import config as settings
from ptjax import doors
from ptjax import process
from ptjax import remat
from ptjax import sharding
from ptjax import stage_run
from ptjax import stages
from ptjax.evaluation import evaluate as evaluation
from ptjax.models import hub
from ptjax.models import peft
from ptjax.models import presets
from ptjax.training import checkpoint
from ptjax.training import compilations
from ptjax.training import doctor
from ptjax.training import loop
from ptjax.training import metrics as metrics_files
from ptjax.training import progress
from ptjax.training import report
from ptjax.training import run_folder


def run(config, *, argv=None):
  """Runs `config` to its end, or on from where its folder's newest checkpoint stands.

  Args:
    config: config.Config.
    argv: the command line, for the report and for the advice how to go on; default sys.argv.
  Returns:
    Whether the run came to its end; False where Ctrl-C or SIGTERM stopped it.
  Raises:
    UserError: something the user can set right; found before training where possible.
    TrainingFailed, or what a stage raised; the traceback is then in error.txt.
  """
  process.keep_freed_memory()
  process.use_compile_cache(config.log.compile_cache)
  mesh = sharding.make_mesh(config.mesh)
  plans = stages.stage_plans(config)
  policies = assembly.load_policies(config, plans)
  assembly.check(plans, policies['policy'].config, mesh)
  data = doors.load_data(config, plans, policies['policy'],
                         parts=sharding.batch_size(mesh), mesh=mesh)
  with run_folder.open_run(config, assembly.out_dir(config), argv=argv) as folder:
    run_folder.check_writable(folder.path, assembly.bytes_needed(policies['policy'], config))
    if jax.process_index() == 0:
      run_folder.write_atomically(folder.path / 'data.json',
                                  json.dumps(data.intake, indent=2) + '\n')
    try:
      with _Run(config, folder, mesh, policies, plans, data) as job:
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
  return completed


def resume_command(config, argv=None):
  """The command that continues the run of `config` which `argv` started."""
  arguments = (sys.argv if argv is None else argv)[1:]
  if config.resume == 'never':
    arguments = [*arguments, '--resume=auto']  # of a repeated flag the last counts
  return shlex.join(['python', '-m', 'ptjax.launch', *arguments])


class _Run:
  """One run's open files and what its stages share."""

  def __init__(self, config, folder, mesh, policies, plans, data):
    self._config, self._folder, self._mesh = config, folder, mesh
    self._policies, self._plans, self._data = policies, plans, data
    self._compilations = compilations.Compilations()
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
    if jax.process_index() == 0:
      self._doctor = doctor.Doctor(
          self._folder.path, metrics_files.read(self._folder.path / metrics_files.METRICS))
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
    policy = self._policies['policy']
    hub.export(os.path.join(self._folder.path, 'model'), policy.config, params, policy.tokenizer,
               stop_ids=policy.stop_ids)
    if jax.process_index() == 0:
      self._finish()
    return True

  def _finish(self):
    lines = [f'model   {self._folder.path / "model"}']
    if self._config.log.report:
      lines.append(f'report  {report.write_report(self._folder.path)}')
    print(progress.final_table(self._folder.path))
    lines += [f'{finding["level"]}   {finding["title"]} (from step {finding["step"]})'
              for finding in self._doctor.findings]
    print('\n'.join(lines))

  def _targets(self, metadata):
    """Shapes and shardings of the state that a checkpoint with this metadata holds."""
    return self._stage_run(self._plans[metadata['stage']]).targets()

  def _stage_run(self, plan):
    plan = remat.settled(plan, self._policies, self._data.doors[plan.stage.index], self._mesh)
    return stage_run.StageRun(plan, self._policies, self._data, self._mesh, self._folder.path)

  def _stage(self, plan, params, restored, interrupt):
    """Trains one stage, from the model's `params` or a restored checkpoint.

    Returns:
      (the model's parameters after it, whether the stage was completed).
    """
    stage, config = plan.stage, plan.config
    made = self._stage_run(plan)
    if restored is None:
      state = made.begin(params)
    else:
      state = restored.arrays
      self._counters = restored.metadata['counters']
      made.resume(state.step)
    if jax.process_index() == 0:
      self._doctor.begin_stage(state.params)
    evaluate = self._evaluation(made)
    if restored is None and stage.index == 0 and evaluate is not None:
      self._record(0, {**evaluate(state.params), 'stage': 'start'}, None)
    source = made.source()
    if restored is not None:
      source.restore(restored.experience, restored.metadata['pending_metrics'])

    def save(step, state, pending, pending_metrics, counters):
      self._checkpointer.save(step, state, {
          'stage': stage.index, 'counters': counters, 'pending_metrics': pending_metrics,
      }, experience=pending)

    state, completed = loop.run(
        stage, state, source, self._compilations.watched(made.train_step()),
        record=self._record, save=save, evaluate=evaluate, eval_every=config.eval.every_steps,
        checkpoint_every=config.checkpoint.every_steps,
        max_bad_steps=config.training.max_bad_steps, interrupt=interrupt,
        counters=self._counters)
    if completed and config.lora.rank and plan is self._plans[-1]:
      self._export_adapters(made, state.params)
    return made.whole(state.params), completed

  def _export_adapters(self, made, params):
    """Writes the last stage's adapters beside the merged model, and their base if it has no home.

    Adapters belong to the model their stage began with; after another stage, or from a preset,
    that model is nowhere else.
    """
    policy, base = self._policies['policy'], self._config.model
    if made.plan.stage.index or base in presets.names():
      base = str(self._folder.path / 'base')
      hub.export(base, policy.config, made.base, policy.tokenizer, stop_ids=policy.stop_ids)
    peft.save(self._folder.path / 'adapter', policy.config, params, made.plan.config.lora,
              base=base)

  def _evaluation(self, made):
    """Returns `evaluate(params) -> metrics` of tasks and held-out loss, or None without either."""
    parts = []
    if self._evaluate is not None:
      parts.append(lambda params: self._evaluate(made.whole(params)))
    held_out = made.evaluation()
    if held_out is not None:
      parts.append(held_out)
    if not parts:
      return None
    return lambda params: {k: v for part in parts for k, v in part(params).items()}

  def _record(self, step, metrics, samples):
    metrics['perf/compilations'] = self._compilations.count
    if jax.process_index() == 0:
      self._writer.write(step, metrics)
      self._doctor.watch({**metrics, 'step': step})
      if samples:
        self._writer.write_samples(step, samples)
    self._progress.update(step, metrics)

  def _make_evaluate(self):
    """Returns `evaluate(params) -> metrics`, or None where there is nothing to evaluate on."""
    if self._data.evaluation is None:
      return None
    config, policy = self._config, self._policies['policy']
    task, options = self._data.evaluation, config.eval
    asks = {'max_tokens': config.data.max_prompt_tokens + config.rollout.max_completion_tokens,
            'batch_size': options.batch_size}
    if policy.config.num_labels:
      functions = {'score': asking.make_score(policy, self._mesh, **asks)}
    else:
      functions = {'generate': assembly.make_generate(config, policy, self._mesh),
                   'log_likelihood': asking.make_log_likelihood(policy, self._mesh, **asks)}

    def evaluate(params):
      return evaluation.evaluate(task, samples=options.samples, ks=options.k, **{
          name: functools.partial(function, params) for name, function in functions.items()})
    return evaluate
