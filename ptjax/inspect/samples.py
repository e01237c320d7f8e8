"""A batch from a run's samples.jsonl."""

import itertools
import pathlib

import jax.numpy as jnp
import numpy as np

from ptjax import config
from ptjax import types
from ptjax.losses import online_preference
from ptjax.training import metrics


def load(path, step=None):
  """Reads the completions that one step of a run left.

  The policy is the one that drew them, as at the first update of their rollout: the ratio to the
  old policy is 1, or, where the trainer recomputed old log-probs, the trainer's over the sampler's.
  Pairs for preference losses are the best and the worst completion of each group.

  Args:
    path: samples.jsonl, or the run's folder.
    step: the optimizer step; None is the last one there.
  Returns:
    The arrays by argument name, the text of the tokens as `inspect_loss` takes both, and a line
    that says what the batch is.
  Raises:
    UserError: no such file or step, or samples without log-probs.
  """
  path = pathlib.Path(path)
  path = path / metrics.SAMPLES if path.is_dir() else path
  if not path.is_file():
    raise config.UserError(f'--samples={path}: no such file; expected the samples.jsonl of a run')
  records = [record for record in metrics.read(path) if record.get('reward') is not None]
  steps = sorted({record['step'] for record in records})
  if not steps:
    raise config.UserError(f'--samples={path}: no completion with a reward in it')
  step = steps[-1] if step is None else step
  if step not in steps:
    raise config.UserError(f'--step={step}: {path} has steps {", ".join(map(str, steps))}')
  records = [record for record in records if record['step'] == step]
  if any('log_probs' not in record or 'group' not in record for record in records):
    raise config.UserError(
        f'--samples={path}: the samples of step {step} have no log_probs; runs write them since '
        'they record groups and tokens, so run it again')
  records, group_size = _whole_groups(records)
  arrays, tokens = _arrays(records)
  arrays['group_size'] = group_size
  for name, rows in _pairs(arrays, group_size).items():
    arrays[name], tokens[name] = rows, [tokens['log_probs'][i] for i in rows]
  chosen, rejected = (_side(arrays, arrays.pop(name)) for name in ('chosen', 'rejected'))
  pairs = len(chosen.loss_mask)
  if pairs:
    arrays['pair'] = types.PairLogProbs(chosen=chosen, rejected=rejected)
  return arrays, tokens, (
      f'{len(records)} completions of step {step} of {path}, in groups of {group_size}, at the '
      f'first update: the policy is the one that drew them; pairs of unequal reward: {pairs}')


def _whole_groups(records):
  """The records of the groups that are complete, and how many each has."""
  groups = [list(group) for _, group in itertools.groupby(records, lambda r: r['group'])]
  size = max(map(len, groups))
  return [record for group in groups if len(group) == size for record in group], size


def _arrays(records):
  """The arrays of the completions, and their tokens' text."""
  lengths = np.array([len(record['log_probs']) for record in records])
  mask = np.arange(lengths.max()) < lengths[:, None]
  def padded(name):
    array = np.zeros(mask.shape)
    array[mask] = [float('nan') if x is None else x for r in records for x in r[name]]
    return array
  drawn = padded('log_probs')
  trainer = padded('old_log_probs') if 'old_log_probs' in records[0] else drawn
  arrays = {'log_probs': trainer, 'old_log_probs': trainer, 'rollout_log_probs': drawn,
            'loss_mask': mask, 'rewards': np.array([float(r['reward']) for r in records]),
            'truncated': np.array([bool(r.get('truncated')) for r in records])}
  if 'reference_log_probs' in records[0]:
    arrays['reference_log_probs'] = padded('reference_log_probs')
  if len(records[0].get('rewards', {})) > 1:
    names = list(records[0]['rewards'])
    arrays['reward_components'] = np.array(
        [[r['rewards'].get(name, float('nan')) for name in names] for r in records], float)
  return arrays, {'log_probs': [record['tokens'] for record in records]}


def _pairs(arrays, group_size):
  """Rows of the best and the worst of each group whose rewards differ."""
  if group_size < 2:
    return {'chosen': np.zeros(0, int), 'rejected': np.zeros(0, int)}
  best, worst, differ = online_preference.best_and_worst(
      jnp.asarray(arrays['rewards']), group_size=group_size)
  return {'chosen': np.asarray(best)[differ], 'rejected': np.asarray(worst)[differ]}


def _side(arrays, rows):
  reference = arrays.get('reference_log_probs')
  return types.SideLogProbs(
      log_probs=arrays['log_probs'][rows], loss_mask=arrays['loss_mask'][rows],
      reference_log_probs=None if reference is None else reference[rows])
