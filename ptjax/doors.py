"""Opens what a run reads: the door of each stage, rewards, rows to evaluate on."""

import dataclasses
import functools
import inspect
from typing import Any

from absl import logging

from ptjax import config as settings
from ptjax import learned
from ptjax import stages
from ptjax.data import decontaminate
from ptjax.data import demonstrations
from ptjax.data import examples
from ptjax.data import formats
from ptjax.data import intake as intake_lib
from ptjax.data import offline as offline_door
from ptjax.data import packing
from ptjax.data import plain_text
from ptjax.data import preferences
from ptjax.data import prompts as prompt_door
from ptjax.data import ranked
from ptjax.data import sources
from ptjax.data import stepwise
from ptjax.data import streaming
from ptjax.data import tokenizer as tokenizers
from ptjax.data import unpaired
from ptjax.evaluation import tasks
from ptjax.rewards import combine
from ptjax.training import recipes
from ptjax.training import scoring


@dataclasses.dataclass(frozen=True)
class Data:
  """What a run reads.

  Attributes:
    doors: stage index -> PromptDoor, OfflineDoor or PackedDoor.
    held_out: stage index -> OfflineDoor of held-out rows, for offline stages that have some.
    rewards: RewardSet (of the online stages), or None.
    evaluation: evaluation.tasks.EvalTask, or None.
    judge: training.scoring.Compare, or None.
    intake: per stage, what became of its rows, as JSON has it: counts of data.intake.Intake (of
      streamed data those of the first window) and, where it was looked for, what they share with
      the rows to evaluate on (data.decontaminate.Report).
  """
  doors: dict
  held_out: dict
  rewards: Any
  evaluation: Any
  judge: Any = None
  intake: tuple = ()


def load_data(config, plans, policy, *, parts=1, mesh=None):
  """Opens the doors that the stages need, the rewards, the judge and the evaluation rows.

  Args:
    config: config.Config.
    plans: the run's stages.StagePlans.
    policy: assembly.Policy.
    parts: see `load_door`.
    mesh: where models that give rewards are placed; None: their weights are not loaded.

  Raises:
    UserError: what is wrong with a file, a column, a reward or a tokenizer.
  """
  doors, held_out, rewards, judge, task, counts = {}, {}, None, None, None, []
  placed = {'policy': policy, 'mesh': mesh}
  for plan in plans:
    rows, shared, left_out = training_rows(plan, config)
    door = load_door(plan, policy, rows, parts=parts)
    doors[plan.stage.index] = door
    intake = door.intake + left_out
    say = logging.warning if intake.dropped or intake.truncated else logging.info
    first = f'first window, of {len(door)} rows: ' if plan.config.data.streaming else ''
    say('%s: %s%s%s', plan.stage.name, first, intake, _remedy(intake))
    counts.append({'stage': plan.stage.name, **dataclasses.asdict(intake),
                   'shared': None if shared is None else dataclasses.asdict(shared)})
    task = task_of(plan.config.dataset, rows)
    if plan.online and rewards is None and judge is None and stages.reads_rewards(plan):
      if config.judge is not None:
        judge = scoring.Compare(learned.load_judge(config.judge, config=plan.config, **placed))
      if config.judge is None or config.reward:
        rewards = _load_rewards(plan, task, rows, **placed)
    if plan.online:
      _check_steps(plan, rewards)
      _check_judge(plan, rewards)
    else:
      held_out[plan.stage.index] = _load_held_out(plan, policy)
  if config.judge is not None and judge is None:
    raise settings.UserError(f'--judge={config.judge}: no stage of --algo={config.algo} compares '
                             'completions')
  return Data(doors, {k: v for k, v in held_out.items() if v is not None}, rewards,
              _evaluation_task(config, policy, task, rewards, measured=any(held_out.values())),
              judge, tuple(counts))


def training_rows(plan, config):
  """Loads the rows of a stage and looks among them for text of the evaluation rows.

  Args:
    plan: stages.StagePlan.
    config: config.Config of the run, which says what is evaluated on.
  Returns:
    (the rows to train on, a decontaminate.Report or None, the Intake of what was left out).
  Raises:
    UserError: what is wrong with a file or a column, or nothing is left.
  """
  asked, name, rows = plan.config.data, config.eval.dataset, load_rows(plan.config)
  if name is None or asked.decontaminate == 'none' or (
      asked.decontaminate == 'auto' and asked.streaming):
    return rows, None, intake_lib.Intake(0, 0, 0, {})
  evaluated = sources.load(tasks.split(name)[1], columns=config.data.columns,
                           limit=config.eval.limit, seed=config.seed)
  report = decontaminate.overlap(decontaminate.texts(rows), decontaminate.texts(evaluated))
  dropped = len(report.hits) if asked.decontaminate == 'drop' else 0
  say = logging.warning if report.hits else logging.info
  say('%s: %s%s', plan.stage.name, report,
      '; --set=data.decontaminate=drop leaves them out' if report.hits and not dropped else '')
  reason = f'sharing {report.n} words in a row with --eval_dataset={name}'
  if dropped == report.rows:
    raise settings.UserError(f'{rows.name}: nothing left to train on: all {dropped} rows dropped, '
                             f'{reason}; name other rows, or set data.decontaminate=report')
  if dropped:
    rows = decontaminate.drop(rows, report)
  return rows, report, intake_lib.Intake(dropped, 0, 0, {reason: dropped} if dropped else {})


def _remedy(intake):
  """What to do where a tenth of all rows or more are too long."""
  reasons = {name: count for name, count in intake.dropped.items()
             if name.startswith('longer than ')}
  if sum(reasons.values()) < 0.1 * intake.rows:
    return ''
  limits = ' and '.join(name.removeprefix('longer than ').partition('=')[0] for name in reasons)
  return f'; raise {limits}, or --set=data.overlong=truncate'


def load_rows(config):
  """Loads the rows of a config's data set; a `solution` stands for a missing `completion`."""
  columns = config.data.columns
  load = functools.partial(sources.load, config.dataset, limit=config.data.limit, seed=config.seed,
                           lazy=config.data.streaming)
  rows = load(columns=columns)
  if 'solution' in rows.columns and 'completion' not in rows.columns:
    rows = load(columns={**columns, 'completion': 'solution'})
  return rows


def load_door(plan, policy, rows, *, parts=1):
  """Opens the door of a stage on `rows`; `parts` is into how many a batch is split over devices."""
  config, shown = plan.config, None
  _check_batches(plan)
  if plan.row.door == 'prompts+demonstrations':
    found = _read_examples(plan, policy, rows)
    shown = [group[0] for group in found.completions]
    rows = sources.Rows([rows[i] for i in found.row_ids], name=rows.name)
  if plan.online:
    return prompt_door.PromptDoor(
        rows, policy.tokenizer, num_prompts=config.rollout.num_prompts,
        group_size=config.rollout.group_size, max_prompt_tokens=config.data.max_prompt_tokens,
        overlong=config.data.overlong, seed=config.seed, demonstrations=shown)
  read = functools.partial(_read_examples, plan, policy)
  open_door = _packed(plan, parts) if plan.packs else functools.partial(
      offline_door.OfflineDoor, batch_size=config.training.batch_size, **_sizes(plan))
  batch = {'seed': config.seed, 'fill': tokenizers.pad_id(policy.tokenizer)}
  if config.data.streaming:
    return streaming.StreamingDoor(rows, read, functools.partial(open_door, **batch),
                                   window=config.data.window_rows, seed=config.seed)
  return open_door(read(rows), **batch)


def _packed(plan, parts):
  """Returns a PackedDoor that lacks its examples."""
  config = plan.config
  width, size = config.data.packed_tokens, {'batch_size': config.training.batch_size}
  if config.training.tokens_per_batch is not None:
    size = {'tokens_per_batch': config.training.tokens_per_batch}
  if config.data.streaming:  # nobody knows the longest example yet
    longest = config.data.max_prompt_tokens + config.rollout.max_completion_tokens
    if width is not None and width < longest:
      raise settings.UserError(
          f'data.packed_tokens={width}: a streamed row may have up to data.max_prompt_tokens + '
          f'rollout.max_completion_tokens = {longest} tokens; raise it, or lower one of these')
    width = width or longest
  return functools.partial(packing.PackedDoor, tokens=width,
                           multiple=parts * config.training.micro_batches, **size)


def _check_batches(plan):
  """Raises UserError for batches that a stage's door cannot give."""
  tokens, name = plan.config.training.tokens_per_batch, plan.row.name
  if plan.config.data.streaming:
    bound = plan.bind()
    why = ('draws completions of its prompts, which are held in memory' if plan.online else
           'reads reference log-probs, which are computed of all rows before the first step'
           if bound.needs_reference and bound.follow is None else None)
    if why is not None:
      raise settings.UserError(f'data.streaming=true: {name} {why}; of several stages, set it for '
                               'another, as in stages.sft.data.streaming')
  if tokens is not None and not plan.packs:
    raise settings.UserError(
        f'training.tokens_per_batch={tokens}: {name} does not train on packed rows, so its batches '
        'are counted in examples; of several stages, set it for one, as in '
        'stages.sft.training.tokens_per_batch')


def _sizes(plan):
  """How batches are made of examples: where rows are packed, lengths may mix, at one size."""
  return {'bucket': False, 'sizes': 1} if plan.packs_completions else {}


def _read_examples(plan, policy, rows):
  """Reads the examples of an offline stage."""
  config, loss = plan.config, plan.bind().loss
  names = set(inspect.signature(loss).parameters)
  arguments = {
      'limits': examples.Limits(max_prompt_tokens=config.data.max_prompt_tokens,
                                max_completion_tokens=config.rollout.max_completion_tokens,
                                overlong=config.data.overlong),
      'want': stages.wanted_columns(plan), 'end_ids': policy.stop_ids}
  door = plan.row.door
  if door == 'text':
    return plain_text.read(rows, policy.tokenizer, **arguments)
  if door == 'preferences':
    return preferences.read(rows, policy.tokenizer,
                            demonstrations='demonstration_log_probs' in names,
                            both_orders='preference_logits' in names, **arguments)
  if door == 'ranked':
    return ranked.read(rows, policy.tokenizer, **arguments)
  if door == 'unpaired':
    return unpaired.read(rows, policy.tokenizer, mismatched='mismatched_log_probs' in names,
                         **arguments)
  if door == 'stepwise':
    return stepwise.read(rows, policy.tokenizer, **arguments)
  columns = set(rows.columns)
  if 'chosen' in columns and not columns & {'completion', 'messages'}:
    # What was chosen is worth imitating.
    pairs = preferences.read(rows, policy.tokenizer, **arguments)
    return dataclasses.replace(pairs, completions=[group[:1] for group in pairs.completions])
  return demonstrations.read(rows, policy.tokenizer, turns=config.data.turns, **arguments)


def _load_held_out(plan, policy):
  """The door of the evaluation rows, if there are any and they have the stage's columns."""
  config = plan.config
  name = config.eval.dataset
  if name is None and config.dataset.partition(':')[0].partition('@')[0] in sources.TASKS:
    name = config.dataset.partition('@')[0] + '@test'
  if name is None:
    return None
  rows = sources.load(tasks.split(name)[1], columns=config.data.columns, limit=config.eval.limit,
                      seed=config.seed)
  try:
    formats.require(rows, plan.row.door)
  except settings.UserError:
    return None  # rows for a task, not for this loss
  found = _read_examples(plan, policy, rows)
  return offline_door.OfflineDoor(
      found, batch_size=config.training.batch_size, seed=None,
      fill=tokenizers.pad_id(policy.tokenizer), name='held_out', **_sizes(plan))


def _check_steps(plan, rewards):
  """Raises UserError if a method reads rewards of steps and no reward gives any."""
  estimator = plan.bind().estimator
  if estimator is None or 'step_rewards' not in inspect.signature(estimator).parameters:
    return
  if rewards is None or not any(hasattr(c.function, 'take_steps') for c in rewards.components):
    raise settings.UserError(f'--algo={plan.row.name}: needs rewards of steps; name a process '
                             'reward model with --reward=process:DIR (--algo=prm trains one)')


def _check_judge(plan, rewards):
  """Raises UserError for a judge of pairs whose verdicts a method cannot use."""
  config, recipe = plan.config, recipes.RECIPES[plan.row.recipe]
  if config.judge is None or recipe.compares:
    return
  estimator = plan.bind().estimator
  names = () if estimator is None else inspect.signature(estimator).parameters
  alone = {'greedy_rewards', 'optimal_values'} & set(names)
  if rewards is not None or alone or config.rollout.group_size < 2:
    why = ('it goes by the rewards' if rewards is not None else
           'its baseline needs rewards of single completions' if alone else
           f'rollout.group_size={config.rollout.group_size} leaves it nothing to compare')
    raise settings.UserError(f'--judge={config.judge}: {plan.row.name} would not ask it, '
                             f'for {why}; '
                             '--reward=judge:... rates completions one by one')


def _load_rewards(plan, task, rows, *, policy, mesh):
  config = plan.config
  specs = config.reward or combine.default_specs(task)
  if not specs:
    raise settings.UserError(
        f'--dataset={config.dataset} is no task with a reward of its own; name one, e.g. '
        '--reward=path/to/file.py:function')
  rewards = combine.load(specs, config.rewards.on_error,
                         timeout_seconds=config.rewards.timeout_seconds,
                         workers=config.rewards.workers,
                         function_timeout_seconds=config.rewards.function_timeout_seconds,
                         learned=functools.partial(learned.load_reward, config=config,
                                                   policy=policy, mesh=mesh))
  rewards.check_columns([*(name for name in rows.columns if name != 'prompt'),
                         'raw_prompts', 'prompt_ids', 'completion_ids'])
  return rewards


def _evaluation_task(config, policy, task, rewards, *, measured):
  """The rows to evaluate on: those asked for, or a built-in task's own held-out ones.

  Args:
    config: config.Config.
    policy: assembly.Policy.
    task: which built-in task the training rows are, or None.
    rewards: RewardSet, or None.
    measured: whether some stage measures its own loss on the rows asked for.
  """
  name, scores = config.eval.dataset, bool(policy.config.num_labels)
  if name is None:
    if scores or config.dataset.partition(':')[0].partition('@')[0] not in sources.TASKS:
      return None
    name = config.dataset.partition('@')[0] + '@test'
  asked, path = tasks.split(name)
  rows = sources.load(path, columns=config.data.columns, limit=config.eval.limit, seed=config.seed)
  kind = tasks.recognise(name, rows) or task
  if asked is None and measured and kind in (None, 'perplexity', 'pairs') and not (
      scores and kind == 'pairs'):
    return None  # the method's own metrics say the same
  if kind is not None:
    made = tasks.make(kind, rows)
    if scores and ('score',) not in made.needs:
      raise settings.UserError(f'--eval_dataset={name}: a reward model writes nothing; give it '
                               'rows with `chosen` and `rejected`')
    return made
  if rewards is None:
    raise settings.UserError(
        f'--eval_dataset={name}: no task has these columns ({", ".join(rows.columns)}); name one '
        f'before the path, as in {tasks.names()[0]}:{path} ({", ".join(tasks.names())})')
  return tasks.rewarded('held_out', rows, rewards)


def task_of(name, rows):
  """Returns which built-in task `rows` look like: arithmetic, gsm8k, math or None."""
  if name.partition(':')[0].partition('@')[0] in sources.TASKS:
    return 'arithmetic'
  if 'prompt' not in rows.columns or 'answer' not in rows.columns:
    return None
  return 'gsm8k' if '####' in str(rows[0]['answer']) else 'math'
