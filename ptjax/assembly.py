"""Assembles a run from its config: model, data, rewards, stages; then lets the loop run.

Everything that can be wrong with a config or its files is found here, before the first compile.
"""

import contextlib
import ctypes
import dataclasses
import functools
import os
import re
from typing import Any, Callable

from absl import logging
import jax
import numpy as np

from ptjax import algorithms
from ptjax import config as settings
from ptjax import keys
from ptjax import sharding
from ptjax import types
from ptjax.data import arithmetic
from ptjax.data import demonstrations
from ptjax.data import prompts as prompt_door
from ptjax.data import sources
from ptjax.data import tokenizer as tokenizers
from ptjax.evaluation import evaluate as evaluation
from ptjax.evaluation import tasks
from ptjax.models import hub
from ptjax.models import policy as policy_model
from ptjax.models import presets
from ptjax.models import transformer
from ptjax.rewards import combine
from ptjax.rollout import sampler
from ptjax.training import algorithm as binding
from ptjax.training import experience
from ptjax.training import loop
from ptjax.training import step as training_step


@dataclasses.dataclass(frozen=True)
class Policy:
  """A model that can be put on a mesh.

  Attributes:
    config: TransformerConfig.
    tokenizer: a Hugging Face tokenizer.
    stop_ids: token ids that end a completion.
    load: `load(shardings) -> params`, shardings being a function from shapes.
  """
  config: Any
  tokenizer: Any
  stop_ids: tuple[int, ...]
  load: Callable


@dataclasses.dataclass(frozen=True)
class StagePlan:
  """A stage with all its settings."""
  stage: loop.Stage
  row: algorithms.Algorithm
  optimizer: settings.OptimizerSettings
  hyperparameters: dict
  batch_size: int  # of demonstrations


def out_dir(config):
  """Returns where the run leaves its files."""
  if config.out_dir is not None:
    return config.out_dir
  short = lambda name: re.sub(r'[^\w.-]+', '_', os.path.basename(name.rstrip('/')))
  return os.path.join('runs', '-'.join(
      [short(config.algo), short(config.model), short(config.dataset), str(config.seed)]))


def start_processes(coordinator, num_processes, process_id):
  """Joins a run of several processes; does nothing when none of the arguments is given.

  Raises:
    UserError: only some of them are given.
  """
  given = (coordinator, num_processes, process_id)
  if all(value is None for value in given):
    return
  if any(value is None for value in given):
    raise settings.UserError('--coordinator, --num_processes and --process_id go together')
  jax.distributed.initialize(coordinator, num_processes, process_id)


def keep_freed_memory():
  """Tells glibc to keep what is freed instead of giving it back to the system at once.

  XLA on CPU frees its large temporaries after every call; touching them anew each step costs page
  faults (measured on the default job: a fifth of all CPU time, and up to half of the wall time).
  Does nothing where the C library has no `mallopt`.
  """
  mmap_threshold, trim_threshold, top_pad = -3, -1, -2
  with contextlib.suppress(OSError, AttributeError):
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 10**9)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(top_pad, 2**26)


def use_compile_cache(folder):
  """Keeps compiled programs in `folder` ('auto': ~/.cache/ptjax/xla, None: nowhere)."""
  if folder is None:
    return
  if folder == 'auto':
    folder = os.path.join(os.path.expanduser('~'), '.cache', 'ptjax', 'xla')
  jax.config.update('jax_compilation_cache_dir', folder)
  # The many small programs of a start add up to as much as the few large ones.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def load_policy(config):
  """Finds the policy that `config.model` names; loads no weights yet.

  Raises:
    UserError: neither a preset, nor a model directory, nor a hub name.
  """
  dtypes = {'dtype': config.model_settings.dtype, 'param_dtype': config.model_settings.param_dtype}
  if config.model in presets.names():
    task = config.dataset.partition(':')[0].partition('@')[0]
    alphabet = arithmetic.ALPHABET if task == 'arithmetic' else tokenizers.PRINTABLE
    tokenizer = tokenizers.characters(alphabet)
    sizes = {'vocab_size': len(tokenizer)} if config.model == settings.Config.model else {}
    model = presets.get(config.model, **sizes, **dtypes)
    key = keys.stream(config.seed, 'init')

    def init(shardings):
      make = functools.partial(transformer.init, model)
      return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, key)))(key)
    return Policy(model, tokenizer, tokenizers.eos_ids(tokenizer), init)
  model = hub.load_config(config.model, **dtypes)
  tokenizer = hub.load_tokenizer(config.model)
  stop_ids = hub.load_stop_ids(config.model, tokenizer)
  if not stop_ids:
    tokenizers.eos_ids(tokenizer)  # says what is missing
  return Policy(model, tokenizer, stop_ids, lambda shardings: hub.load_params(
      config.model, model, shardings=shardings))


def stage_plans(config):
  """Returns the stages of a run: a supervised warm start where asked for, then the algorithm."""
  row = algorithms.get(config.algo)
  plans, first = [], 0
  if config.warm_start.steps and row.door == 'prompts':
    plans.append(StagePlan(
        stage=loop.Stage('sft', 0, 0, config.warm_start.steps), row=algorithms.get('sft'),
        optimizer=dataclasses.replace(
            config.optimizer, learning_rate=config.warm_start.learning_rate),
        hyperparameters={}, batch_size=config.warm_start.batch_size))
    first = config.warm_start.steps
  hyperparameters = dict(config.loss)
  if 'max_completion_tokens' in row.hyperparameters():  # Dr. GRPO's divisor is the sampler's limit
    hyperparameters.setdefault('max_completion_tokens', config.rollout.max_completion_tokens)
  plans.append(StagePlan(
      stage=loop.Stage(row.name, len(plans), first, config.training.steps), row=row,
      optimizer=config.optimizer, hyperparameters=hyperparameters,
      batch_size=config.training.batch_size))
  return plans


def check(config, plans, model, mesh):
  """Raises UserError for what cannot work, before anything is compiled."""
  parts = sharding.batch_size(mesh)
  for plan in plans:
    if plan.row.door not in ('prompts', 'demonstrations'):
      raise settings.UserError(
          f'--algo={plan.row.name}: its data door, {plan.row.door}, is not open in the launcher '
          'yet; the loss itself is a function in ptjax.losses')
    missing = set(plan.row.models) - {'reference'}
    if missing:
      raise settings.UserError(f'--algo={plan.row.name}: needs a {", ".join(sorted(missing))}, '
                               'which the launcher cannot place yet')
    _check_inputs(plan)
    if plan.row.door == 'prompts':
      at_once = config.rollout.num_prompts // (
          config.training.mini_batches * config.training.micro_batches)
      name = 'rollout.num_prompts / (training.mini_batches x training.micro_batches)'
      if plan.row.advantage is not None and config.rollout.group_size < 2:
        _try_group_of_one(plan)
    else:
      micro = config.training.micro_batches if plan is plans[-1] else 1
      at_once, name = plan.batch_size / micro, 'batch_size / training.micro_batches'
    if at_once % parts:
      raise settings.UserError(
          f'{name} = {at_once:g} does not split over data x fsdp = {parts} devices '
          f'(mesh {dict(mesh.shape)}); make it a multiple of {parts}, or change --mesh')
  tensor = mesh.shape['tensor']
  if model.num_kv_heads % tensor:
    raise settings.UserError(f'--mesh: tensor={tensor} does not divide the model\'s '
                             f'{model.num_kv_heads} key/value heads')
  longest = config.data.max_prompt_tokens + config.rollout.max_completion_tokens
  if model.position == 'learned' and longest > model.max_length:
    raise settings.UserError(
        f'data.max_prompt_tokens + rollout.max_completion_tokens = {longest}, but the model has '
        f'{model.max_length} positions; lower one of them')


def _check_inputs(plan):
  """Raises UserError for a hyperparameter or an array that loss or advantage cannot have."""
  bound = binding.bind(plan.row, plan.hyperparameters)
  to_loss = {*training_step.MODEL_OUTPUTS, 'loss_mask', 'old_log_probs', 'loss_state', 'key'}
  recorded = {'loss_mask', 'rollout_log_probs', 'old_log_probs', 'reference_log_probs'}
  if plan.row.door == 'prompts':
    to_loss |= recorded | {'advantages'}
  for function, offered in ((bound.loss, to_loss),
                            (bound.estimator, recorded | {'rewards', 'group_size'})):
    required = training_step.required_inputs(function) if function else ()
    missing = [name for name in required if name not in offered]
    if missing:
      raise settings.UserError(
          f'--algo={plan.row.name}: {_name(function)} needs {", ".join(missing)}, but from '
          f'{plan.row.door} it gets only {", ".join(sorted(offered))}; a hyperparameter needs a '
          'default')


def _name(function):
  return getattr(function, 'func', function).__name__


def _try_group_of_one(plan):
  """Raises UserError if the advantage needs other completions to compare with."""
  try:
    experience.estimate_advantages(
        binding.bind(plan.row, plan.hyperparameters).estimator, np.zeros(2), np.ones(2, bool),
        group_size=1, loss_mask=np.ones((2, 1), bool), old_log_probs=np.zeros((2, 1)),
        reference_log_probs=np.zeros((2, 1)))
  except ValueError as error:
    raise settings.UserError(f'rollout.group_size=1: {error}') from None


@dataclasses.dataclass(frozen=True)
class Data:
  """What a run reads.

  Attributes:
    prompts: PromptDoor of the online stage, or None.
    demonstrations: stage index -> DemonstrationDoor.
    rewards: RewardSet (of the online stage), or None.
    evaluation: evaluation.tasks.EvalTask, or None.
  """
  prompts: Any
  demonstrations: dict
  rewards: Any
  evaluation: Any


def load_data(config, plans, policy):
  """Opens the doors that the stages need, the rewards and the evaluation rows.

  Raises:
    UserError: what is wrong with a file, a column, a reward or a tokenizer.
  """
  rows = sources.load(config.dataset, columns=config.data.columns, limit=config.data.limit,
                      seed=config.seed)
  prompts, rewards, doors = None, None, {}
  limits = {'max_prompt_tokens': config.data.max_prompt_tokens, 'overlong': config.data.overlong,
            'seed': config.seed}
  for plan in plans:
    if plan.row.door == 'prompts':
      prompts = prompt_door.PromptDoor(
          rows, policy.tokenizer, num_prompts=config.rollout.num_prompts,
          group_size=config.rollout.group_size, **limits)
      intake = prompts.intake
    else:
      shown = rows
      if plan is not plans[-1] and config.warm_start.dataset is not None:
        shown = sources.load(config.warm_start.dataset, seed=config.seed)
      door = demonstrations.DemonstrationDoor(
          shown, policy.tokenizer, batch_size=plan.batch_size, end_ids=policy.stop_ids,
          max_completion_tokens=config.rollout.max_completion_tokens, **limits)
      doors[plan.stage.index], intake = door, door.intake
    say = logging.warning if intake.dropped or intake.truncated else logging.info
    say('%s: %s', plan.stage.name, intake)
  task = task_of(config.dataset, rows)
  if prompts is not None:
    specs = config.reward or combine.default_specs(task)
    if not specs:
      raise settings.UserError(
          f'--dataset={config.dataset} is no task with a reward of its own; name one, e.g. '
          '--reward=path/to/file.py:function')
    rewards = combine.load(specs, config.rewards.on_error,
                           timeout_seconds=config.rewards.timeout_seconds,
                           workers=config.rewards.workers,
                           function_timeout_seconds=config.rewards.function_timeout_seconds)
    rewards.check_columns([*(name for name in rows.columns if name != 'prompt'),
                           'completion_ids'])
  return Data(prompts, doors, rewards, _evaluation_task(config, task, rewards))


def _evaluation_task(config, task, rewards):
  """The rows to evaluate on: those asked for, or a built-in task's own held-out ones."""
  name = config.eval.dataset
  if name is None:
    if config.dataset.partition(':')[0].partition('@')[0] not in sources.TASKS:
      return None
    name = config.dataset.partition('@')[0] + '@test'
  rows = sources.load(name, columns=config.data.columns, limit=config.eval.limit, seed=config.seed)
  kind = task_of(name, rows) or task
  if kind is not None:
    return tasks.make(kind, rows)
  if rewards is None:
    raise settings.UserError(f'--eval_dataset={name}: no answers to compare with; expected rows '
                             'with an `answer` column, as arithmetic, GSM8K or MATH have')
  return tasks.rewarded('held_out', rows, rewards)


def task_of(name, rows):
  """Returns which built-in task `rows` look like: arithmetic, gsm8k, math or None."""
  if name.partition(':')[0].partition('@')[0] in sources.TASKS:
    return 'arithmetic'
  if 'prompt' not in rows.columns or 'answer' not in rows.columns:
    return None
  return 'gsm8k' if '####' in str(rows[0]['answer']) else 'math'


def sampling_options(config, policy):
  """What the rollouts are drawn with."""
  rollout = config.rollout
  return sampler.SamplingOptions(
      max_tokens=rollout.max_completion_tokens, temperature=rollout.temperature,
      top_k=rollout.top_k, top_p=rollout.top_p, min_p=rollout.min_p, stop_ids=policy.stop_ids,
      stop_strings=rollout.stop_strings, group_size=rollout.group_size)


def make_forward(model, temperature, remat):
  """Returns `forward(params, prompt_tokens, prompt_lengths, tokens) -> outputs` of the policy."""
  def forward(params, prompt_tokens, prompt_lengths, tokens):
    return policy_model.log_probs(model, params, prompt_tokens, prompt_lengths, tokens,
                                  temperature=temperature, remat=remat)
  return forward


def make_generate(config, policy, mesh):
  """Returns `generate(params, rows, samples, greedy) -> evaluation.evaluate.Generations`.

  Rows are decoded `eval.batch_size` at a time, all in one shape; the last batch is filled up with
  rows whose completions are thrown away.
  """
  samplers, doors = {}, {}

  def generate(params, rows, samples, greedy):
    if samples not in doors:
      doors[samples] = prompt_door.PromptDoor(
          rows, policy.tokenizer, num_prompts=1, group_size=samples, overlong='truncate',
          max_prompt_tokens=config.data.max_prompt_tokens, seed=None)
      if len(doors[samples]) != len(rows):
        raise settings.UserError(f'evaluation: {doors[samples].intake}; every row needs a prompt')
    if (samples, greedy) not in samplers:
      options = dataclasses.replace(
          sampling_options(config, policy), group_size=samples, top_k=0, top_p=1.0, min_p=0.0,
          temperature=0.0 if greedy else config.eval.temperature)
      samplers[samples, greedy] = sampler.make_sampler(
          policy.config, options, mesh=mesh, decode_text=policy.tokenizer.decode)
    parts = sharding.batch_size(mesh)
    size = -(-min(config.eval.batch_size, len(rows)) // parts) * parts
    everything = doors[samples].take(range(len(rows)))
    completions, lengths, truncated = [], [], []
    for start in range(0, len(rows), size):
      chosen = np.minimum(np.arange(start, start + size), len(rows) - 1)
      prompts = types.Prompts(
          tokens=everything.tokens[chosen], lengths=everything.lengths[chosen],
          ids=everything.ids[chosen], sample_ids=everything.sample_ids[chosen])
      rollouts = sharding.fetch(samplers[samples, greedy](
          params, prompts, keys.stream(config.seed, 'evaluation')))
      real = min(size, len(rows) - start)
      grouped = lambda values: [list(values[i * samples:(i + 1) * samples]) for i in range(real)]
      completions += grouped(experience.texts(rollouts, policy.tokenizer))
      lengths += grouped(rollouts.loss_mask.sum(1).tolist())
      truncated += grouped(rollouts.truncated.tolist())
    return evaluation.Generations(completions, lengths, truncated)
  return generate


def bytes_needed(policy, config):
  """Disk space a run needs: its checkpoints (parameters and two moments) and the model."""
  shapes = jax.tree.leaves(hub.param_shapes(policy.config))
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes)
  return size * (3 * (config.checkpoint.keep + 1) + 2)
