"""From a config to the stages of its run: `sft,dpo`, a warm start, each with its own settings."""

import dataclasses
import inspect
import re

from ptjax import algorithms
from ptjax import config as settings
from ptjax import overrides
from ptjax.training import algorithm as binding
from ptjax.training import loop
from ptjax.training import recipes
from ptjax.training import step as training_step

# What all stages of a run share.
_SHARED = ('algo', 'model', 'model_settings', 'teacher', 'judge', 'reward', 'rewards', 'seed',
           'out_dir', 'resume', 'mesh', 'device', 'stages', 'warm_start', 'checkpoint', 'log',
           'eval', 'plan')


@dataclasses.dataclass(frozen=True)
class StagePlan:
  """A stage with all its settings.

  Attributes:
    stage: loop.Stage.
    row: algorithms.Algorithm.
    config: the run's Config with what differs in this stage.
    hyperparameters: the user's, of this row's loss and advantage.
  """
  stage: loop.Stage
  row: algorithms.Algorithm
  config: settings.Config
  hyperparameters: dict

  @property
  def online(self):
    """Whether the stage samples from its own policy."""
    return self.row.door.startswith('prompts')

  @property
  def updates_per_rollout(self):
    """Optimizer steps per rollout; 1 for offline stages."""
    training = self.config.training
    return training.mini_batches * training.epochs if self.online else 1

  @property
  def extra_rollouts(self):
    """Draws of other prompts, at most, for groups whose rewards are all equal."""
    asked = self.config.rollout.extra_rollouts
    return recipes.RECIPES[self.row.recipe].extra_rollouts if asked is None else asked

  @property
  def overlong_tokens(self):
    """Over how many tokens at the end of the longest completion a penalty grows to 1; 0: none."""
    asked, longest = self.config.rewards.overlong_tokens, self.config.rollout.max_completion_tokens
    fraction = recipes.RECIPES[self.row.recipe].overlong_fraction
    return int(fraction * longest) if asked is None else asked

  @property
  def temperature(self):
    """What the logits are divided by."""
    return self.config.rollout.temperature if self.online else 1.0

  @property
  def packs(self):
    """Whether rows hold several examples: for losses that are means over tokens, whichever row.

    Of a user's own loss nobody knows whether it is one.
    """
    if self.row.door == 'text':
      return True
    if self.row.family == 'custom' or self.row.own_turn is not None:  # sampling needs the prompts
      return False
    names = set(inspect.signature(self.row.loss).parameters)
    per_token = {'log_probs', 'loss_mask', 'divergence', *self.row.hyperparameters()}
    return (self.config.data.packing and self.row.door == 'demonstrations'
            and 'log_probs' in names and names <= per_token)

  @property
  def packs_completions(self):
    """Whether prompts with their completions may share the rows of a forward pass.

    Not where a head reads whole rows, a teacher reads other prompts, or the policy may answer in
    the middle of a data set.
    """
    outputs = set(training_step.model_outputs(self.bind().loss))
    return (self.config.data.packing and not self.packs and self.row.own_turn is None
            and recipes.RECIPES[self.row.recipe].privileged is None
            and 'log_probs' in outputs and not outputs & {'scores', 'step_logits'})

  def bind(self):
    """Returns the row with its hyperparameters set, a training.algorithm.Bound."""
    return binding.bind(self.row, self.hyperparameters,
                        updates_per_rollout=self.updates_per_rollout)


def stage_plans(config):
  """Returns the stages of a run: a supervised warm start where asked for, then the algorithms.

  Raises:
    UserError: an unknown algorithm, or settings for a stage that is not there.
  """
  names = [name.strip() for name in config.algo.split(',') if name.strip()]
  names = [part for name in names for part in algorithms.get(name).stages or (name,)]
  rows = [algorithms.get(name) for name in names]
  if not rows:
    raise settings.UserError('--algo is empty; --algo=list prints the names')
  for name in config.stages:
    if name not in names:
      raise settings.UserError(f'stages.{name}: no stage of that name in --algo={config.algo}'
                               + settings.near_names(name, names))
  configs = [stage_config(config, name) for name in names]
  if config.warm_start.steps and rows[0].door.startswith('prompts'):
    rows.insert(0, algorithms.get('sft'))
    configs.insert(0, _warm_start_config(config))
  known = [row.hyperparameters() for row in rows]
  plans, first = [], 0
  for index, (row, own) in enumerate(zip(rows, configs)):
    shared = {name for name in config.loss
              if name not in known[index] and any(name in other for other in known)}
    hyperparameters = {k: v for k, v in own.loss.items() if k not in shared}
    if 'max_completion_tokens' in known[index]:  # Dr. GRPO's divisor is the sampler's limit
      hyperparameters.setdefault('max_completion_tokens', own.rollout.max_completion_tokens)
    plans.append(StagePlan(loop.Stage(row.name, index, first, own.training.steps), row, own,
                           hyperparameters))
    first += own.training.steps
  return plans


def stage_config(config, name):
  """The config of one algorithm of the run, with `config.stages[name]` applied."""
  result = dataclasses.replace(config, algo=name, stages={})
  for path, value in config.stages.get(name, {}).items():
    if path.partition('.')[0] in _SHARED:
      raise settings.UserError(f'stages.{name}.{path}: the same for all stages of a run')
    result = overrides.assign(result, path, value)
  return result


def _warm_start_config(config):
  warm = config.warm_start
  return dataclasses.replace(
      config, algo='sft', loss={}, stages={},
      dataset=config.dataset if warm.dataset is None else warm.dataset,
      data=dataclasses.replace(config.data, limit=None) if warm.dataset else config.data,
      optimizer=dataclasses.replace(config.optimizer, learning_rate=warm.learning_rate),
      training=dataclasses.replace(config.training, steps=warm.steps, batch_size=warm.batch_size,
                                   tokens_per_batch=None, mini_batches=1, micro_batches=1))


def wanted_columns(plan):
  """Names that an offline stage's loss takes from the data: neither model's nor the door's own."""
  if plan.online:
    return ()
  loss = plan.bind().loss
  given = {'loss_mask', 'loss_state', 'key', 'pair', 'side', 'labels', 'step_labels', 'step_mask',
           'old_log_probs', 'reference_log_probs', 'rewards', 'ranks'}
  for arguments in training_step.MODEL_OUTPUTS.values():
    given |= set(arguments)
  pattern = re.compile(r'(mismatched|demonstration)_')
  return tuple(name for name in training_step.required_inputs(loss)
               if name not in given and not pattern.match(name))


def reads_rewards(plan):
  """Whether anything in an online stage looks at rewards."""
  bound = plan.bind()
  recipe = recipes.RECIPES[plan.row.recipe]
  return (bound.estimator is not None or recipe.reads_rewards or plan.extra_rollouts
          or 'rewards' in inspect.signature(bound.loss).parameters)


def check_inputs(plan):
  """Raises UserError for an array that an online stage's loss or advantage cannot have."""
  if not plan.online:
    return
  bound = plan.bind()
  recorded = {'loss_mask', 'rollout_log_probs', 'old_log_probs', 'reference_log_probs', 'truncated'}
  if plan.row.door != 'prompts':
    recorded.add('demonstration')
  recorded |= set(recipes.RECIPES[plan.row.recipe].gives)
  baselines = {'old_values', 'rewards', 'reward_components', 'group_size', 'greedy_rewards',
               'optimal_values', 'step_rewards', 'outcome_rewards'}
  to_loss = recorded | {
      'old_values', 'returns', 'loss_state', 'key', 'advantages', 'rewards', 'teacher_log_probs',
      'from_rollouts', 'imitated', 'off_policy', 'imitation_weights'}  # a gate's, the last four
  for arguments in training_step.MODEL_OUTPUTS.values():
    to_loss |= set(arguments)
  for function, offered in ((bound.loss, to_loss),
                            (bound.estimator, recorded | baselines)):
    required = training_step.required_inputs(function) if function else ()
    missing = [name for name in required if name not in offered]
    if missing:
      raise settings.UserError(
          f'--algo={plan.row.name}: {_name(function)} needs {", ".join(missing)}, but from '
          f'{plan.row.door} it gets only {", ".join(sorted(offered))}; a hyperparameter needs a '
          'default')


def _name(function):
  return getattr(function, 'func', function).__name__
