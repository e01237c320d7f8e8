"""Batches from samples.jsonl, as a run writes it."""

import jax
import numpy as np
import pytest

from ptjax import config
from ptjax import inspect
from ptjax.inspect import samples
from ptjax.training import metrics

LENGTHS = (2, 3, 1, 2, 3, 2)
REWARDS = (1.0, 0.0, 0.5, 0.25, 0.25, 0.25)


def records(**more):
  rng = np.random.default_rng(0)
  return [{
      'prompt': 'p', 'completion': 'c', 'reward': reward, 'completion_tokens': n,
      'truncated': n == 3, 'group': i // 3, 'tokens': list('abc'[:n]),
      'log_probs': (-rng.uniform(0.1, 2.0, n)).round(5).tolist(),
      **{name: make(rng, n) for name, make in more.items()}}
          for i, (n, reward) in enumerate(zip(LENGTHS, REWARDS))]


def write(folder, *batches):
  with metrics.MetricsWriter(folder, tensorboard=False) as writer:
    for step, batch in enumerate(batches, start=1):
      writer.write_samples(step, batch)
  return folder / metrics.SAMPLES


def test_groups_give_advantages_and_pairs(tmp_path):
  path = write(tmp_path, records()[:3], records())
  arrays, tokens, title = samples.load(path)
  assert 'step 2' in title and 'groups of 3' in title and 'pairs of unequal reward: 1' in title
  np.testing.assert_array_equal(arrays['loss_mask'].sum(1), LENGTHS)
  assert tokens['log_probs'][1] == ['a', 'b', 'c'] and tokens['chosen'] == [['a', 'b']]
  found = inspect.inspect_loss('dr_grpo', arrays, tokens=tokens)
  part = found.parts['policy']
  want = np.array([0.5, -0.5, 0, 0, 0, 0])[:, None] * arrays['loss_mask']
  np.testing.assert_allclose(part.advantages, want, atol=1e-6)
  assert (part.ratio == 1).all() and (part.stable == 1).all()
  assert samples.load(tmp_path, step=1)[0]['loss_mask'].shape == (3, 3)

  pair = arrays['pair']
  log_probs = [record['log_probs'] for record in records()]
  np.testing.assert_allclose(pair.chosen.log_probs[0, :2], log_probs[0])
  np.testing.assert_allclose(pair.rejected.log_probs[0], log_probs[1])
  assert 'rejected 0' in inspect.inspect_loss('simpo', arrays, tokens=tokens).table()


def test_recorded_log_probs_of_other_models(tmp_path):
  noise = lambda rng, n: (-rng.uniform(0.1, 2.0, n)).round(5).tolist()
  path = write(tmp_path, records(old_log_probs=noise, reference_log_probs=noise))
  arrays, _, _ = samples.load(path)
  with jax.enable_x64(True):
    found = inspect.inspect_loss('dpo', arrays, beta=0.5)
    tis = inspect.inspect_loss('reinforce+tis', arrays)
  assert found.weights.any()
  ratio = np.exp(arrays['log_probs'] - arrays['rollout_log_probs'])
  mask = arrays['loss_mask'] & (tis.parts['policy'].advantages != 0)
  centred = np.array([0.5, -0.5, 0, 0, 0, 0])[:, None]
  np.testing.assert_allclose(tis.parts['policy'].advantages[mask],
                             (centred * np.minimum(ratio, 2.0))[mask], rtol=1e-9)


def test_incomplete_groups_and_unscored_completions_are_left_out(tmp_path):
  batch = records()[:5]
  assert len(samples.load(write(tmp_path, batch))[0]['rewards']) == 3
  batch = records()
  batch[4]['reward'] = None
  assert len(samples.load(write(tmp_path, batch))[0]['rewards']) == 3


def test_user_errors_are_named(tmp_path):
  with pytest.raises(config.UserError, match='--samples=.*none.jsonl: no such file'):
    samples.load(tmp_path / 'none.jsonl')
  with pytest.raises(config.UserError, match='no such file'):
    samples.load(tmp_path)
  path = write(tmp_path, records())
  with pytest.raises(config.UserError, match='--step=7: .* has steps 1'):
    samples.load(path, step=7)
  path.write_text('')
  with pytest.raises(config.UserError, match='no completion with a reward'):
    samples.load(path)
  old = records()
  del old[2]['log_probs']
  with pytest.raises(config.UserError, match='have no log_probs'):
    samples.load(write(tmp_path, old))
