"""Rewards and verdicts that models give: reward models, process reward models, judges.

Their weights lie on the run's mesh, sharded as the policy's; every process calls them on all rows.
"""

import dataclasses
import functools
import hashlib
import os

import jax
import numpy as np

from ptjax import asking
from ptjax import assembly
from ptjax import config as settings
from ptjax import keys
from ptjax import sharding
from ptjax.data import chat
from ptjax.data import log_prob_cache
from ptjax.models import hub
from ptjax.rewards import combine
from ptjax.rewards import endpoint
from ptjax.rewards import judge as judges
from ptjax.rewards import verdicts
from ptjax.rollout import sampler

AGGREGATES = {'min': min, 'product': np.prod, 'last': lambda steps: steps[-1]}
_SEPARATOR = '\n'  # as data.stepwise puts it behind each step
_REPLY_TOKENS = 256  # of a local judge
_VERDICTS = os.path.join('~', '.cache', 'ptjax', 'verdicts')


def load_reward(kind, place, options, *, config, policy, mesh):
  """Returns the reward function of a spec `kind:place(options)`; see combine.LEARNED.

  Args:
    kind: 'model', 'process' or 'judge'.
    place: a model directory or hub name; for a judge also a URL.
    options: dict, the spec's.
    config: the run's Config.
    policy: assembly.Policy that writes the completions.
    mesh: where weights go; None checks everything but them and loads none.
  Raises:
    UserError: no such model, or one of another kind.
  """
  where = f'--reward={kind}:{place}'
  if kind == 'judge':
    return judges.JudgeReward(_language_judge(where, place, options, config=config, mesh=mesh))
  make = {'model': ModelReward, 'process': ProcessReward}[kind]
  _known_options(where, options, make.OPTIONS)
  model = _load_model(where, place, config, labels=make.LABELS)
  return make(model, mesh, policy=policy, batch_size=_batch_size(config), **options)


def load_judge(spec, *, config, policy, mesh):
  """Returns the judge that `--judge` names: `URL(model='name')`, or `DIR` of a model.

  A language model is asked; a reward model compares its scores; a pair judge (`pairs=True`, from
  --algo=preference_model) reads both answers at once.

  Args:
    spec: the text.
    config, policy, mesh: as for `load_reward`.
  """
  where = f'--judge={spec}'
  place, options_text = combine.split_options(spec)
  options = combine.read_options(spec, options_text)
  if _is_url(place):
    return _language_judge(where, place, options, config=config, mesh=mesh)
  labels = hub.load_config(place).num_labels
  if not labels:
    return _language_judge(where, place, options, config=config, mesh=mesh)
  _known_options(where, options, ('pairs',))
  model = _load_model(where, place, config, labels=1)
  ids = {'policy': policy, 'batch_size': _batch_size(config)}
  if options.get('pairs'):
    return PairJudge(model, mesh, batch_size=_batch_size(config))
  reward = ModelReward(model, mesh, **ids)
  return judges.ScoreJudge(lambda prompts, completions: reward(
      prompts, completions, raw_prompts=prompts))


def scoring_models(config):
  """Returns name -> TransformerConfig of the models on the run's devices that score or judge."""
  places = {f'--reward={spec}': combine.learned_place(spec) for spec in config.reward}
  if config.judge is not None:
    places[f'--judge={config.judge}'] = combine.split_options(config.judge)[0]
  return {name: hub.load_config(place, dtype=config.model_settings.dtype,
                                param_dtype=config.model_settings.param_dtype)
          for name, place in places.items() if place and not _is_url(place)}


class ModelReward:
  """The score of a reward model, trained by --algo=reward_bt or another of its family.

  Args:
    model: assembly.Policy with one label.
    mesh: see `load_reward`.
    policy: whose completions are scored; where its tokenizer and template are the model's, its ids
      go in as they are.
    batch_size: completions computed together.
  """
  OPTIONS, LABELS = (), 1
  collective = True

  def __init__(self, model, mesh, *, policy, batch_size):
    self.__name__ = 'model'
    self._score = None
    self._same_ids = _same_tokenizer(model.tokenizer, policy.tokenizer)
    self._end_ids = model.stop_ids
    if mesh is not None:
      score = asking.make_score(model, mesh, max_tokens=model.config.max_length,
                                batch_size=batch_size)
      self._score = functools.partial(score, _place(model, mesh))

  def __call__(self, prompts, completions, *, raw_prompts=None, prompt_ids=None,
               completion_ids=None):
    """Returns a score per completion; that of a completion cut off is of its text as it stands."""
    ids = None
    if self._same_ids and prompt_ids is not None and completion_ids is not None:
      ids = [(list(before), chat.end(list(own), self._end_ids, cut=False))
             for before, own in zip(prompt_ids, completion_ids)]
    return self._score(prompts if raw_prompts is None else raw_prompts, completions,
                       ids=ids).tolist()


class ProcessReward:
  """The steps' probabilities of being good, as one reward per completion and as one per step.

  Args:
    model: assembly.Policy with two labels, from --algo=prm.
    mesh, policy, batch_size: as for `ModelReward`.
    steps: which of AGGREGATES makes one reward of a completion's steps.
  """
  OPTIONS, LABELS = ('steps',), 2
  collective = True

  def __init__(self, model, mesh, *, policy, batch_size, steps='min'):
    if steps not in AGGREGATES:
      raise settings.UserError(f'--reward=process:...: steps={steps!r}: expected one of '
                               f'{", ".join(AGGREGATES)}')
    self.__name__ = 'process'
    self._aggregate = AGGREGATES[steps]
    self._breaks = _Breaks(policy.tokenizer)
    self._steps = []
    self._step_scores = None
    if mesh is not None:
      score = asking.make_step_scores(model, mesh, max_tokens=model.config.max_length,
                                      batch_size=batch_size)
      self._step_scores = functools.partial(score, _place(model, mesh))

  def __call__(self, prompts, completions, *, raw_prompts=None, completion_ids=None):
    """Returns a reward per completion, 0 where there is no step."""
    lines = [text.split(_SEPARATOR) for text in completions]
    kept = [[i for i, line in enumerate(own) if line.strip()] for own in lines]
    found = self._step_scores(prompts if raw_prompts is None else raw_prompts,
                              [[own[i] for i in places] for own, places in zip(lines, kept)])
    if completion_ids is not None:
      self._steps = [
          _placed(places, rewards, self._breaks(ids), len(ids))
          for places, rewards, ids in zip(kept, found, completion_ids)]
    return [float(self._aggregate(rewards)) if rewards else 0.0 for rewards in found]

  def take_steps(self):
    """Returns, of the last call, per completion [(its token that ends a step, the reward)]."""
    steps, self._steps = self._steps, []
    return steps


class PairJudge:
  """A pair judge of --algo=preference_model, asked in both orders."""
  collective = True

  def __init__(self, model, mesh, *, batch_size):
    self._model = model
    self._score = None
    if mesh is not None:
      score = asking.make_score(model, mesh, max_tokens=model.config.max_length,
                                batch_size=batch_size)
      self._score = functools.partial(score, _place(model, mesh))

  def compare(self, prompts, first, second):
    """P(first wins) [N]: ½ (σ(logit) + 1 - σ(logit of the other order))."""
    _, before, pairs = chat.groups(
        self._model.tokenizer, prompts, list(zip(first, second)), end_ids=self._model.stop_ids,
        where=lambda place: f'judge, pair {place + 1}')
    orders = [(ids, a + b) for ids, (a, b) in zip(before, pairs)]
    orders += [(ids, b + a) for ids, (a, b) in zip(before, pairs)]
    wins = 1.0 / (1.0 + np.exp(-np.clip(self._score(None, None, ids=orders), -500.0, 500.0)))
    return 0.5 * (wins[:len(first)] + 1.0 - wins[len(first):])

  def take_report(self):
    """Nothing is counted."""
    return {}


class LocalModel:
  """A language model asked through our own sampler: `conversations -> replies` for a Judge."""

  def __init__(self, model, mesh, *, max_tokens, batch_size, seed):
    self._model, self._mesh, self._batch_size = model, mesh, batch_size
    self._options = sampler.SamplingOptions(
        max_tokens=max_tokens, temperature=0.0, stop_ids=model.stop_ids)
    self._draw = sampler.make_sampler(model.config, self._options, mesh=mesh)
    self._key = keys.stream(seed, 'judge')
    self._params = _place(model, mesh)

  def __call__(self, conversations):
    templated = bool(self._model.tokenizer.chat_template)
    rows = [{'prompt': messages if templated else messages[-1]['content']}
            for messages in conversations]
    replies = [None] * len(rows)  # what is too long for the model gets none
    if not rows:
      return replies
    room = self._model.config.max_length - self._options.max_tokens
    for batch in asking.sample(
        self._model, self._params, self._mesh, rows, self._options, max_prompt_tokens=room,
        key=self._key, batch_size=self._batch_size, draw=self._draw):
      for row, (text,), _ in batch:
        replies[row] = text
    return replies


class _Breaks:
  """How many separators each token of the policy's tokenizer holds."""

  def __init__(self, tokenizer):
    self._tokenizer = tokenizer
    self._counts = {}

  def __call__(self, ids):
    """Returns the places of tokens that end a line, one per separator, in order."""
    new = [i for i in dict.fromkeys(ids) if i not in self._counts]
    if new:
      texts = self._tokenizer.batch_decode([[i] for i in new], skip_special_tokens=True)
      self._counts.update((i, text.count(_SEPARATOR)) for i, text in zip(new, texts))
    return [place for place, i in enumerate(ids) for _ in range(self._counts[i])]


def _placed(lines, rewards, breaks, length):
  """Puts rewards at the tokens that end their lines; without a separator that is the last token."""
  found = [(breaks[line] if line < len(breaks) else length - 1, reward)
           for line, reward in zip(lines, rewards)]
  return found or ([(length - 1, 0.0)] if length else [])


def _language_judge(where, place, options, *, config, mesh):
  """A judges.Judge by an endpoint or a local language model."""
  options = dict(options)
  rubric = options.pop('rubric', '')
  cache = options.pop('cache', _VERDICTS)
  if _is_url(place):
    known = [field.name for field in dataclasses.fields(endpoint.Endpoint)
             if field.name not in ('url', 'sleep')]
    _known_options(where, options, (*known, 'rubric', 'cache'))
    if 'model' not in options:
      raise settings.UserError(f"{where}: say which model the server is asked for: "
                               f"{place}(model='name')")
    ask = endpoint.Endpoint(url=place, **options)
    identity, collective = ask.identity, False
  else:
    _known_options(where, options, ('max_tokens', 'rubric', 'cache'))
    model = _load_model(where, place, config, labels=0)
    max_tokens = options.get('max_tokens', _REPLY_TOKENS)
    if not 0 < max_tokens < model.config.max_length:
      raise settings.UserError(f'{where}: max_tokens={max_tokens}: expected 1 to '
                               f'{model.config.max_length - 1}, as the model has '
                               f'{model.config.max_length} positions')
    ask = None if mesh is None else LocalModel(
        model, mesh, max_tokens=max_tokens, batch_size=_batch_size(config), seed=config.seed)
    identity, collective = f'{_fingerprint(place)} {max_tokens}', True
  if collective and jax.process_count() > 1:
    cache = None  # what is on disk may differ between machines, and then so would what they ask
  file = None if cache is None else verdicts.Verdicts(os.path.join(
      os.path.expanduser(cache), hashlib.sha256(identity.encode()).hexdigest()[:16] + '.jsonl'))
  return judges.Judge(ask, identity=identity, cache=file, rubric=rubric, collective=collective)


def _load_model(where, place, config, *, labels):
  """An assembly.Policy with exactly `labels` outputs of a score head; its weights not yet read."""
  if os.path.isdir(os.path.join(place, 'model')) and not os.path.exists(
      os.path.join(place, 'config.json')):
    raise settings.UserError(f'{where}: a run\'s folder; its model is {place.rstrip("/")}/model')
  try:
    found = hub.load_config(place).num_labels
  except settings.UserError as error:
    raise settings.UserError(f'{where}: {error}') from None
  if found != labels:
    kinds = {0: 'a language model', 1: 'a reward model (one label)',
             2: 'a process reward model (two labels)'}
    remedy = {0: 'give the judge a language model',
              1: 'train one with --algo=reward_bt; two labels are for process:DIR',
              2: 'train one with --algo=prm; one label is for model:DIR'}
    raise settings.UserError(f'{where}: expected {kinds[labels]}, found '
                             f'{kinds.get(found, f"{found} labels")}; {remedy[labels]}')
  return assembly.load_policy(dataclasses.replace(config, model=place), num_labels=labels)


def _place(model, mesh):
  return model.load(lambda shapes: sharding.tree_sharding(mesh, shapes))


def _batch_size(config):
  """Completions computed together: as many as an update's forward pass has, or fewer."""
  return min(64, config.rollout.num_prompts * config.rollout.group_size)


def _same_tokenizer(one, other):
  """Whether two tokenizers give the same ids for the same texts and messages."""
  return (log_prob_cache.digest_tokenizer(one) == log_prob_cache.digest_tokenizer(other)
          and log_prob_cache.digest_template(one) == log_prob_cache.digest_template(other))


def _known_options(where, options, known):
  for name in options:
    if name not in known:
      raise settings.UserError(f'{where}: no option {name!r}' + (
          settings.near_names(name, known) if known else '; it has none'))


def _is_url(place):
  return place.startswith(('http://', 'https://'))


def _fingerprint(place):
  """What tells a local model's weights from others': its files' names, sizes and dates."""
  folder = hub.resolve(place)
  files = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
  stats = [(name, os.stat(os.path.join(folder, name))) for name in files]
  return str([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
