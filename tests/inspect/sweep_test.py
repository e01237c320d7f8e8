"""Curves of the weights against closed forms."""

import jax
import numpy as np
import pytest

from ptjax import inspect
from ptjax.inspect import example
from ptjax.pieces import score


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def test_grpo_over_the_ratio():
  found = inspect.inspect_loss('grpo', example.batch())
  curve = inspect.curve(found, points=400)
  r = curve.x
  off = (np.abs(r - 0.8) > 1e-9) & (np.abs(r - 1.2) > 1e-9)
  np.testing.assert_allclose(curve.lines['encouraged'][off], np.where(r <= 1.2, r, 0)[off])
  np.testing.assert_allclose(curve.lines['discouraged'][off], np.where(r >= 0.8, -r, 0)[off])
  x, y = curve.dots['discouraged']
  np.testing.assert_allclose(y, np.where(x >= 0.8, -x, 0), rtol=1e-9)
  pushed = found.loss_mask & (found.parts['policy'].advantages != 0)
  assert sum(len(x) for x, _ in curve.dots.values()) == pushed.sum()


def test_imitation_over_the_probability():
  for name, want in (('sft', lambda p: np.ones_like(p)), ('dft', lambda p: p)):
    curve = inspect.curve(inspect.inspect_loss(name, example.batch()), points=20)
    mean = np.exp(example.batch()['log_probs'])[example.batch()['loss_mask']]
    np.testing.assert_allclose(curve.lines['encouraged'], want(curve.x) / want(mean).mean())
    assert 'discouraged' not in curve.lines and curve.label.startswith('probability')


def test_dpo_over_the_margin():
  curve = inspect.curve(inspect.inspect_loss('dpo', example.batch(), beta=0.5), points=30)
  A = lambda margin: 0.5 / (1 + np.exp(0.5 * margin))
  np.testing.assert_allclose(curve.lines['chosen'], A(curve.x), rtol=1e-9)
  np.testing.assert_allclose(curve.lines['rejected'], -A(curve.x), rtol=1e-9)
  margins, y = curve.dots['chosen']
  np.testing.assert_allclose(y, A(margins), rtol=1e-9)
  assert len(margins) == len(example.CHOSEN)


def test_labels_over_the_score():
  curve = inspect.curve(inspect.inspect_loss(
      'apo_zero_unpaired', example.batch(), beta=0.5), points=30)
  slope = lambda s: 0.5 / (np.exp(0.25 * s) + np.exp(-0.25 * s)) ** 2
  np.testing.assert_allclose(curve.lines['desirable'], slope(curve.x), rtol=1e-9)
  scores = np.asarray(score.log_ratio(example.batch()['side']))
  labels = example.batch()['labels']
  x, y = curve.dots['undesirable']
  np.testing.assert_allclose(x, scores[~labels])
  np.testing.assert_allclose(y, -slope(x), rtol=1e-9)


def test_hybrids_are_followed_over_the_rollouts_alone():
  found = inspect.inspect_loss('luffy', example.batch())
  curve = inspect.curve(found, points=10)
  np.testing.assert_allclose(curve.lines['encouraged'], curve.x)
  pushed = found.parts['rollouts'].weights != 0
  assert sum(len(x) for x, _ in curve.dots.values()) == pushed.sum()


def test_nothing_to_draw():
  arrays = example.batch()
  assert inspect.curve(inspect.inspect_loss('gkd', arrays)) is None
  assert inspect.curve(inspect.inspect_loss('reward_bt', arrays)) is None
  tied = inspect.inspect_loss('grpo', {**arrays, 'rewards': np.zeros(example.B)})
  assert inspect.curve(tied) is None
