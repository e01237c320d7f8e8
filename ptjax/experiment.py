"""Where a run's settings start: an experiment file, or the default job."""

import dataclasses
import importlib.util
import os
import traceback

from ptjax import config


def default_for(model, dataset):
  """The settings a run starts from: the default job's for its own tiny model, else Config()."""
  if model != config.Config.model:
    return config.Config()
  job = tiny_job()
  if dataset.partition(':')[0].partition('@')[0] == config.Config.dataset:
    return job
  return dataclasses.replace(job, warm_start=dataclasses.replace(job.warm_start, dataset=None))


def tiny_job():
  """The default job: a tiny model from scratch, a short warm start, then GRPO on arithmetic.

  The warm start imitates a careless teacher, three of five of whose answers are one too high. So
  imitation ends below one half right however long it lasts, and what GRPO adds is its own.
  """
  return config.Config(
      warm_start=config.WarmStartSettings(steps=640, batch_size=64, learning_rate=1e-3,
                                          dataset='arithmetic:careless=0.6'),
      training=config.TrainingSettings(steps=120),
      rollout=config.RolloutSettings(num_prompts=64, group_size=8, max_completion_tokens=2),
      optimizer=config.OptimizerSettings(learning_rate=3e-4, schedule='cosine', warmup_steps=10,
                                         end_fraction=0.1, beta2=0.99),
      eval=config.EvaluationSettings(every_steps=40, limit=512, batch_size=512))


def from_file(path):
  """Loads `get_config()` from an experiment file.

  Raises:
    UserError: no such file, it fails, no get_config in it, or it returns something else than a
      Config.
  """
  if not os.path.isfile(path):
    raise config.UserError(f'--config={path}: no such file')
  spec = importlib.util.spec_from_file_location('ptjax_experiment', path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    if not callable(getattr(module, 'get_config', None)):
      raise config.UserError(f'--config={path}: the file defines no get_config()')
    found = module.get_config()
  except config.UserError:
    raise
  except Exception as error:  # the file is the user's own code
    line = getattr(error, 'lineno', None) or traceback.extract_tb(error.__traceback__)[-1].lineno
    raise config.UserError(
        f'--config={path}: {type(error).__name__}: {error} (line {line})') from error
  if not isinstance(found, config.Config):
    raise config.UserError(f'--config={path}: get_config() returned {type(found).__name__}, '
                           'expected ptjax.config.Config')
  return found
