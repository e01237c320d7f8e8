"""Assembles a run from its config: models, their forward pass, what rollouts are drawn with.

Everything that can be wrong with a config or its files is found here, before the first compile.
"""

import dataclasses
import functools
import os
import re
from typing import Any, Callable

import jax
import numpy as np

from ptjax import config as settings
from ptjax import keys
from ptjax import sharding
from ptjax import stages
from ptjax import types
from ptjax.data import arithmetic
from ptjax.data import chat
from ptjax.data import prompts as prompt_door
from ptjax.data import tokenizer as tokenizers
from ptjax.evaluation import evaluate as evaluation
from ptjax.models import flash
from ptjax.models import hub
from ptjax.models import peft
from ptjax.models import presets
from ptjax.models import transformer
from ptjax.rollout import sampler
from ptjax.training import experience
from ptjax.training import forward as training_forward
from ptjax.training import recipes
from ptjax.training import step as training_step

PLACED_ROLES = ('reference', 'critic', 'teacher')  # models beside the policy that can be placed


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


def out_dir(config):
  """Returns where the run leaves its files."""
  if config.out_dir is not None:
    return config.out_dir
  short = lambda name: re.sub(r'[^\w.-]+', '_', os.path.basename(name.rstrip('/')))
  return os.path.join('runs', '-'.join(
      [short(config.algo), short(config.model), short(config.dataset), str(config.seed)]))


def load_policies(config, plans, *, load=None):
  """Finds the models a run needs, by role: 'policy', which trains, and 'teacher'.

  Args:
    config: config.Config.
    plans: the run's stages.StagePlans.
    load: `load(config, num_labels=0) -> Policy`; None: `load_policy`.
  Raises:
    UserError: a model that is not there, or two that do not go together.
  """
  labels = {_num_labels(plan) for plan in plans}
  if len(labels) > 1:
    raise settings.UserError(f'--algo={config.algo}: a reward model has no next-token head, so it '
                             'trains in a run of its own; start it from out_dir/model')
  load = load or load_policy
  policies = {'policy': load(config, num_labels=labels.pop())}
  if any('teacher' in plan.row.models for plan in plans) and config.teacher is not None:
    policies['teacher'] = _load_teacher(config, policies['policy'], load)
  elif any(recipes.RECIPES[plan.row.recipe].privileged for plan in plans):
    policies['teacher'] = policies['policy']  # shown more than when it is the student
  return policies


def _num_labels(plan):
  """Outputs of the score head a stage trains; 0 for language models."""
  outputs = training_step.model_outputs(plan.bind().loss)
  return 2 if 'step_logits' in outputs else 1 if 'scores' in outputs else 0


def _load_teacher(config, policy, load):
  teacher = load(dataclasses.replace(config, model=config.teacher))
  if teacher.config.vocab_size != policy.config.vocab_size:
    raise settings.UserError(
        f'--teacher={config.teacher}: its vocabulary has {teacher.config.vocab_size} tokens, the '
        f'model\'s {policy.config.vocab_size}; distillation by probabilities needs the same one '
        '(seqkd learns from the teacher\'s text and does not)')
  return teacher


def load_policy(config, *, num_labels=0):
  """Finds the model that `config.model` names; loads no weights yet.

  Args:
    config: config.Config.
    num_labels: outputs of a score head; 0 for a language model.
  Raises:
    UserError: neither a preset, nor a model directory, nor a hub name.
  """
  dtypes = {'dtype': config.model_settings.dtype, 'param_dtype': config.model_settings.param_dtype,
            'num_labels': num_labels}
  key = keys.stream(config.seed, 'init')
  if config.model in presets.names():
    task = config.dataset.partition(':')[0].partition('@')[0]
    alphabet = arithmetic.ALPHABET if task == 'arithmetic' else tokenizers.PRINTABLE
    tokenizer = chat.with_template(tokenizers.characters(alphabet), config.data.chat_template)
    sizes = {'vocab_size': len(tokenizer)} if config.model == settings.Config.model else {}
    model = _with_attention(presets.get(config.model, **sizes, **dtypes), config)

    def init(shardings):
      make = functools.partial(transformer.init, model)
      # Runs once, so the compiler's best is not worth its time: the tiny preset's took a sixth of
      # all CPU seconds before a job's first step.
      return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, key)),
                     compiler_options={'xla_backend_optimization_level': 1})(key)
    return Policy(model, tokenizer, tokenizers.eos_ids(tokenizer), init)
  model = _with_attention(hub.load_config(config.model, **dtypes), config)
  tokenizer = chat.with_template(hub.load_tokenizer(config.model), config.data.chat_template)
  stop_ids = hub.load_stop_ids(config.model, tokenizer)
  if not stop_ids:
    tokenizers.eos_ids(tokenizer)  # says what is missing
  return Policy(model, tokenizer, stop_ids, lambda shardings: hub.load_params(
      config.model, model, shardings=shardings, key=key))


def _with_attention(model, config):
  capability = getattr(jax.devices()[0], 'compute_capability', None)  # GPUs have one
  return dataclasses.replace(model, attention=flash.choose(
      model, config.model_settings.attention, jax.default_backend(), capability))


def check(plans, model, mesh):
  """Raises UserError for what cannot work, before anything is compiled."""
  parts = sharding.batch_size(mesh)
  _check_overlap(plans)
  for plan in plans:
    config = plan.config
    # Judges and reward models score completions as rewards do; offline they left columns.
    missing = set(plan.row.models) - {*PLACED_ROLES, 'judge', 'reward_model'}
    if missing:
      raise settings.UserError(f'--algo={plan.row.name}: needs a {", ".join(sorted(missing))}, '
                               'which the launcher cannot place yet')
    recipe = recipes.RECIPES[plan.row.recipe]
    if 'teacher' in plan.row.models and config.teacher is None and recipe.privileged is None:
      raise settings.UserError(f'--algo={plan.row.name}: needs a teacher; name one with '
                               '--teacher=DIR')
    stages.check_inputs(plan)
    values = {**plan.row.hyperparameters(), **plan.hyperparameters}
    if plan.row.follow is not None and config.lora.rank and values.get('reference_mixup', 1) != 1:
      raise settings.UserError(
          f'--algo={plan.row.name}: its reference is an average of weights, which no average of '
          'adapters gives; set loss.reference_mixup=1 (the reference is then replaced) or '
          'lora.rank=0')
    if config.lora.rank:
      peft.check(model, config.lora)
    if plan.online:
      pieces = config.training.mini_batches * config.training.micro_batches
      if config.rollout.num_prompts % pieces:
        raise settings.UserError(
            f'rollout.num_prompts={config.rollout.num_prompts} does not split into '
            f'training.mini_batches={config.training.mini_batches} x training.micro_batches='
            f'{config.training.micro_batches}; make it a multiple of {pieces}')
      at_once = config.rollout.num_prompts // pieces
      name = 'rollout.num_prompts / (training.mini_batches x training.micro_batches)'
      _check_rollouts(plan, recipe)
      if plan.row.advantage is not None and config.rollout.group_size < 2:
        _try_group_of_one(plan)
    else:
      by_tokens = config.training.tokens_per_batch is not None  # in rows that split
      at_once = parts if by_tokens else config.training.batch_size / config.training.micro_batches
      name = 'training.batch_size / training.micro_batches'
    if at_once % parts:
      raise settings.UserError(
          f'{name} = {at_once:g} does not split over data x fsdp = {parts} devices '
          f'(mesh {dict(mesh.shape)}); make it a multiple of {parts}, or change --mesh')
    longest = config.data.max_prompt_tokens + config.rollout.max_completion_tokens
    if model.position == 'learned' and longest > model.max_length:
      raise settings.UserError(
          f'data.max_prompt_tokens + rollout.max_completion_tokens = {longest}, but the model has '
          f'{model.max_length} positions; lower one of them')
  tensor = mesh.shape['tensor']
  if model.num_kv_heads % tensor:
    raise settings.UserError(f'--mesh: tensor={tensor} does not divide the model\'s '
                             f'{model.num_kv_heads} key/value heads')


def _check_rollouts(plan, recipe):
  """Raises UserError for groups and draws that the method's recipe cannot use."""
  size, name = plan.config.rollout.group_size, plan.row.name
  if size < recipe.least_group or size % recipe.group_multiple:
    expected = (f'a multiple of {recipe.group_multiple}' if recipe.group_multiple > 1 else
                f'at least {recipe.least_group}')
    raise settings.UserError(f'rollout.group_size={size}: {name} compares completions of a prompt '
                             f'with each other; make it {expected}')
  if plan.extra_rollouts and recipe.draw is not recipes.own_samples:
    raise settings.UserError(f'rollout.extra_rollouts={plan.extra_rollouts}: {name} does not train '
                             'on its own samples alone, so no group of them can be replaced')
  longest = plan.config.rollout.max_completion_tokens
  if not 0 <= plan.overlong_tokens <= longest:
    raise settings.UserError(
        f'rewards.overlong_tokens={plan.overlong_tokens}: expected 0 to '
        f'rollout.max_completion_tokens={longest}')


def _check_overlap(plans):
  """Raises UserError for a rollout in several parts that none of the stages can draw."""
  online = [plan for plan in plans if plan.online]
  whole = [plan.row.name for plan in online
           if recipes.RECIPES[plan.row.recipe].draw is not recipes.own_samples]
  overlap = plans[0].config.rewards.overlap
  if overlap > 1 and whole and len(whole) == len(online):
    names, do = ', '.join(whole), 'does' if len(whole) == 1 else 'do'
    raise settings.UserError(f'rewards.overlap={overlap}: {names} {do} not train on own samples '
                             'alone, so rollouts are drawn in one part; set it to 1')


def _try_group_of_one(plan):
  """Raises UserError if the advantage needs other completions to compare with."""
  try:
    experience.estimate_advantages(
        plan.bind().estimator, np.zeros(2), np.ones(2, bool),
        group_size=1, loss_mask=np.ones((2, 1), bool), old_log_probs=np.zeros((2, 1)),
        reference_log_probs=np.zeros((2, 1)))
  except ValueError as error:
    raise settings.UserError(f'rollout.group_size=1: {error}') from None


def sampling_options(config, policy):
  """What the rollouts are drawn with."""
  rollout = config.rollout
  return sampler.SamplingOptions(
      max_tokens=rollout.max_completion_tokens, temperature=rollout.temperature,
      top_k=rollout.top_k, top_p=rollout.top_p, min_p=rollout.min_p, stop_ids=policy.stop_ids,
      stop_strings=rollout.stop_strings, group_size=rollout.group_size, slots=rollout.slots)


def make_forward(plan, policies, *, role='policy'):
  """Returns `forward(params, frozen, batch) -> outputs` of a stage.

  Args:
    plan: stages.StagePlan; where remat is left open (see remat.settled) it is `dots`.
    policies: role -> Policy.
    role: 'policy' for what trains, with all outputs its loss reads; 'reference' or 'teacher' for
      the log-probs of a whole, frozen model.
  """
  config, bound = plan.config, plan.bind()
  remat = config.model_settings.remat
  if role != 'policy':
    model = policies['policy' if role == 'reference' else role].config
    return training_forward.make_forward(model, temperature=plan.temperature)
  teacher = policies.get('teacher')
  return training_forward.make_forward(
      policies['policy'].config, outputs=training_step.model_outputs(bound.loss),
      temperature=plan.temperature, remat='dots' if remat == 'auto' else remat,
      lora_scale=config.lora.scale if config.lora.rank else None,
      teacher=None if teacher is None else teacher.config, divergence=bound.divergence)


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
    samplers[samples, greedy].memory = {}  # so that no evaluation depends on those before it
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
