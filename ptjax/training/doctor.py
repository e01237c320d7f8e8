"""When nothing trains, says why: looks at the metrics of the last steps for known faults.

Each check is a pure function of the last records of a stage. A fault is named once, in the log
and in findings.json, from which report.html shows it.
"""

import collections
import dataclasses
import json
import pathlib
from typing import Callable

import jax
from absl import logging

from ptjax.training import run_folder

FINDINGS = 'findings.json'
PATIENCE = 5  # records in a row that must show a fault
GAP_LIMIT = 1.0  # nats between sampler and trainer of the same weights, on one token
SAMPLE_SIZE_LIMIT = 0.5  # effective, as a fraction of the completions


@dataclasses.dataclass(frozen=True)
class Fault:
  """A reason for which nothing trains, or not what should.

  Attributes:
    title: what is wrong, in a few words; its identity.
    shows: `shows(records, past) -> bool`, on the last PATIENCE records of a stage, oldest first,
      and on what has been seen in the run so far (see `Doctor`).
    message: what was seen; `{name}` is the newest record's metric `name`.
    remedy: what to try.
    explains: titles of faults that are no news beside this one.
    level: 'error' where nothing can be learned, else 'warning'.
  """
  title: str
  shows: Callable
  message: str
  remedy: str
  explains: tuple[str, ...] = ()
  level: str = 'error'


def _all(name, holds):
  """Whether each record has the metric and `holds(value)` there."""
  return lambda records, past: all(r.get(name) is not None and holds(r[name]) for r in records)


def _one_reward(records, past):
  del past
  return (all(r.get('frac_reward_zero_std') == 1.0 for r in records)
          and len({r['reward'] for r in records}) == 1)


def _never_stops(records, past):
  return not past['stopped'] and all(r.get('completions/clipped_ratio') == 1.0 for r in records)


def _no_longer_stops(records, past):
  return past['stopped'] and all(r.get('completions/clipped_ratio') == 1.0 for r in records)


_NO_SPREAD, _NO_ADVANTAGE, _NO_GRADIENT = (
    'no group has two different rewards', 'all advantages are zero', 'the gradient is zero')

FAULTS = (
    Fault('nothing is trainable', lambda records, past: past['trained_parameters'] == 0,
          'The trained tree holds no parameter.',
          'Name what trains: lora.targets, or lora.rank=0 for all weights.',
          explains=(_NO_GRADIENT,)),
    Fault('the learning rate is zero', _all('learning_rate', lambda rate: rate == 0.0),
          'optimizer.learning_rate was 0 in every one of the last steps.',
          'Set optimizer.learning_rate, or a shorter schedule: linear and cosine end at '
          'optimizer.end_fraction.'),
    Fault('no completion has a reward',
          lambda records, past: not past['rewarded'] and all(
              'completions/mean_length' in r and 'reward' not in r for r in records),
          'Every reward function gave None for every completion.',
          'Look at samples.jsonl, and at the columns that the reward function reads.',
          explains=(_NO_ADVANTAGE, _NO_GRADIENT)),
    Fault('the reward is constant', _one_reward,
          'Every completion of the last rollouts had the same reward, {reward:.4g}.',
          'Look at samples.jsonl: the task may be too hard or too easy for this model, or the '
          'reward cannot find the answer (compare acc_strict and acc_flexible). Try easier '
          'prompts, a warm start (warm_start.steps) or a reward for the format.',
          explains=(_NO_SPREAD, _NO_ADVANTAGE, _NO_GRADIENT)),
    Fault(_NO_SPREAD, _all('frac_reward_zero_std', lambda fraction: fraction == 1.0),
          'In each prompt\'s group all completions had the same reward, though prompts differ '
          '(mean {reward:.4g}).',
          'Raise rollout.group_size or rollout.temperature, or use an estimator that compares with '
          'more than the group (--algo=reinforce_pp).',
          explains=(_NO_ADVANTAGE, _NO_GRADIENT)),
    Fault('no completion ends by itself', _never_stops,
          'Every completion so far was cut off at rollout.max_completion_tokens '
          '({completions/max_length} tokens): the model never emitted an end token.',
          'A base model may not know its end token: warm it up by SFT, name a stop string '
          '(rollout.stop_strings), or raise rollout.max_completion_tokens. Check '
          'generation_config.json for eos_token_id.', level='warning'),
    Fault('all completions are truncated', _no_longer_stops,
          'Every completion of the last rollouts was cut off at rollout.max_completion_tokens '
          '({completions/max_length} tokens), though earlier ones ended by themselves.',
          'Completions are growing: raise rollout.max_completion_tokens, or make length cost '
          'something (--algo=dapo, --reward=length(target=...)).', level='warning'),
    Fault('no token trains', _all('perf/train_tokens_per_second', lambda rate: rate == 0.0),
          'Every token of the last batches was masked.',
          'training.mask_truncated leaves truncated completions out, and prompts never train: look '
          'at completions/clipped_ratio and at the rows dropped at the start.',
          explains=(_NO_ADVANTAGE, _NO_GRADIENT)),
    Fault(_NO_ADVANTAGE, _all('pieces/advantage_abs_mean', lambda mean: mean == 0.0),
          'Every trained token had advantage 0, though rewards differ.',
          'The advantage estimator takes everything away: look at its settings (--algo=list).',
          explains=(_NO_GRADIENT,)),
    Fault('everything is clipped', _all('pieces/mask_fraction', lambda masked: masked > 0.95),
          'The stabilization mask takes the gradient of {pieces/mask_fraction:.1%} of the tokens.',
          'The policy is far from the one that sampled: lower optimizer.learning_rate, '
          'training.epochs or training.mini_batches, or widen the clip.', explains=(_NO_GRADIENT,)),
    Fault(_NO_GRADIENT, _all('grad_norm', lambda norm: norm == 0.0),
          'The gradient was exactly 0 in every one of the last steps.',
          'Look at the loss with `python -m ptjax.inspect`.'),
    Fault('updates are skipped', _all('bad_steps', lambda count: count > 0),
          'Loss or gradient was not finite in each of the last steps, so nothing was updated.',
          'Lower optimizer.learning_rate, or set optimizer.max_grad_norm; look at the rewards.'),
    Fault('sampler and trainer disagree',
          lambda records, past: any(
              all(r.get(name) is not None and far(r[name]) for r in records) for name, far in (
                  ('sampling/log_prob_gap_max', lambda gap: gap > GAP_LIMIT),
                  ('sampling/effective_sample_size', lambda size: size < SAMPLE_SIZE_LIMIT))),
          'Log-probs of the same tokens differ by up to {sampling/log_prob_gap_max:.3g} nats '
          'between sampler and trainer; the weights of the samples are worth '
          '{sampling/effective_sample_size:.0%} of their number.',
          'Set model_settings.dtype=float32, correct for it (--algo=grpo+tis), or, with '
          'rollout.reuse_log_probs, make fewer updates per rollout.', level='warning'),
)


def diagnose(records, past):
  """Returns the Faults that the records show, without those another one explains.

  Args:
    records: the last metrics of one stage, oldest first; fewer than PATIENCE show nothing.
    past: of the whole run so far: `stopped`, whether any completion ended by itself; `rewarded`,
      whether any had a reward; `trained_parameters`, how many numbers train, or None.
  """
  if len(records) < PATIENCE:
    return []
  found = [fault for fault in FAULTS if fault.shows(records[-PATIENCE:], past)]
  explained = {title for fault in found for title in fault.explains}
  return [fault for fault in found if fault.title not in explained]


class Doctor:
  """Watches a run's records, and names each fault once per stage.

  Args:
    folder: the run's folder.
    records: those of the run's earlier part, whose findings are found again but not logged again.
  """

  def __init__(self, folder, records=()):
    self._path = pathlib.Path(folder) / FINDINGS
    self._recent = collections.deque(maxlen=PATIENCE)
    self._past = {'stopped': False, 'rewarded': False, 'trained_parameters': None}
    self.findings = []
    for record in records:
      self._look(record)
    self._write()

  def begin_stage(self, params):
    """Counts what a stage trains: a tree of arrays or shapes."""
    self._past['trained_parameters'] = sum(leaf.size for leaf in jax.tree.leaves(params))

  def watch(self, record):
    """Looks at the record of a step, with its `step` and `stage`, and says what it finds."""
    found = self._look(record)
    for finding in found:
      logging.warning('step %d: %s. %s %s', *(
          finding[name] for name in ('step', 'title', 'message', 'remedy')))
    if found:
      self._write()

  def _look(self, record):
    if self._recent and record.get('stage') != self._recent[-1].get('stage'):
      self._recent.clear()
    self._recent.append(record)
    self._past['stopped'] |= record.get('completions/clipped_ratio', 1.0) < 1.0
    self._past['rewarded'] |= 'reward' in record
    known = {(finding['title'], finding['stage']) for finding in self.findings}
    found = [{
        'level': fault.level, 'title': fault.title, 'stage': record.get('stage'),
        'step': record['step'], 'message': fault.message.format_map(_Known(record)),
        'remedy': fault.remedy,
    } for fault in diagnose(list(self._recent), self._past)
        if (fault.title, record.get('stage')) not in known]
    self.findings += found
    return found

  def _write(self):
    if self.findings:
      run_folder.write_atomically(self._path, json.dumps(self.findings, indent=2))
    else:
      self._path.unlink(missing_ok=True)


class _Known(dict):
  """A record for str.format: a metric it has not got reads as NaN."""

  def __missing__(self, name):
    return float('nan')
