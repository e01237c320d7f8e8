"""The gate that mixes demonstrations and rollouts, and the hybrids' limits."""

import inspect
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.losses import hybrid
from ptjax.losses import imitation
from ptjax.losses import policy_gradient

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import policy_gradient_cases as cases

G = 5  # four rollouts and one demonstration
DEMONSTRATION = np.tile([False] * 4 + [True], 3)
REWARDS = np.array([0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 1], np.float32)  # P = 0, 1/4, 3/4
gate = lambda **hyper: {k: np.asarray(v) for k, v in hybrid.gate(
    jnp.asarray(REWARDS), demonstration=jnp.asarray(DEMONSTRATION), group_size=G, **hyper).items()}


def by_prompt(rows):
  return [bool(x.any()) for x in np.asarray(rows).reshape(3, G)]


@pytest.mark.parametrize('hyper, imitated, off_policy, from_rollouts', [
    (dict(threshold=0.0), [1, 0, 0], [0, 0, 0], [0, 1, 1]),
    (dict(threshold=0.25), [1, 1, 0], [0, 0, 0], [0, 0, 1]),
    (dict(threshold=-1.0), [0, 0, 0], [0, 0, 0], [1, 1, 1]),
    (dict(threshold=1.0), [1, 1, 1], [0, 0, 0], [0, 0, 0]),
    (dict(threshold=-1.0, off_policy_threshold=0.0), [0, 0, 0], [1, 0, 0], [0, 1, 1]),
    (dict(threshold=0.0, off_policy_threshold=0.25), [1, 0, 0], [0, 1, 0], [0, 0, 1])])
def test_gate(hyper, imitated, off_policy, from_rollouts):
  got = gate(**hyper)
  assert by_prompt(got['imitated']) == [bool(x) for x in imitated]
  assert by_prompt(got['off_policy']) == [bool(x) for x in off_policy]
  assert by_prompt(got['from_rollouts']) == [bool(x) for x in from_rollouts]
  assert not (got['from_rollouts'] & DEMONSTRATION).any()
  assert not ((got['imitated'] | got['off_policy']) & ~DEMONSTRATION).any()


def test_gate_advantages():
  """Rollouts among themselves, a demonstration over rollouts and itself."""
  got = gate()['advantages'].reshape(3, G)
  np.testing.assert_allclose(got[1], [0.75, -0.25, -0.25, -0.25, 1 - 2 / 5], rtol=1e-5)
  np.testing.assert_allclose(got[0], [0, 0, 0, 0, 1 - 1 / 5], rtol=1e-5)


def test_gate_ignores_rollouts_without_a_reward_as_successes():
  rewards = jnp.asarray(REWARDS).at[5].set(jnp.nan)
  got = hybrid.gate(rewards, demonstration=jnp.asarray(DEMONSTRATION), group_size=G)
  assert by_prompt(got['imitated']) == [True, True, False]
  assert np.isfinite(got['advantages']).all()


def test_gate_rejects_thresholds_in_the_wrong_order():
  with pytest.raises(ValueError, match='off_policy_threshold=0.1 is below threshold=0.5'):
    gate(threshold=0.5, off_policy_threshold=0.1)


@pytest.mark.parametrize('f, g', [(1.0, 1.0), (0.5, 2.0), (0.0, 0.0)])
def test_soft_gate_by_hand(f, g):
  rate = np.repeat([0.0, 0.25, 0.75], G)
  got = {k: np.asarray(v) for k, v in hybrid.soft_gate(
      jnp.asarray(REWARDS), demonstration=jnp.asarray(DEMONSTRATION), group_size=G,
      rollout_exponent=f, imitation_exponent=g).items()}
  rows = REWARDS.reshape(3, G)
  centred = np.where(DEMONSTRATION, 0, (rows - rows[:, :4].mean(1, keepdims=True)).reshape(-1))
  np.testing.assert_allclose(got['advantages'], rate**f * centred, rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(got['imitation_weights'], DEMONSTRATION * (1 - rate)**g, rtol=1e-6)
  np.testing.assert_array_equal(got['imitated'], DEMONSTRATION)
  np.testing.assert_array_equal(got['from_rollouts'], ~DEMONSTRATION)


def test_soft_weights_scale_each_prompts_part():
  """The gradient is f times that of the rollouts alone plus g times that of imitation alone."""
  arrays = {n: x if x.dtype == bool else x.astype(np.float32)
            for n, x in cases.random_arrays().items()}
  demonstration, nothing = arrays['demonstration'], np.zeros(cases.B, bool)
  hyper = dict(entropy_coefficient=0.0, max_completion_tokens=9)
  f = np.linspace(0.1, 0.9, cases.B, dtype=np.float32)
  g = np.linspace(2, 1, cases.B, dtype=np.float32)
  part = lambda **rows: gradient(hybrid.hpt_loss, {
      **arrays, 'from_rollouts': nothing, 'imitated': nothing, 'off_policy': nothing, **rows},
      **hyper)
  rollouts, imitation = part(from_rollouts=~demonstration), part(imitated=demonstration)
  got = part(from_rollouts=~demonstration, imitated=demonstration,
             advantages=f * arrays['advantages'], imitation_weights=g)
  np.testing.assert_allclose(got, f[:, None] * rollouts + g[:, None] * imitation, rtol=1e-5,
                             atol=1e-8)


def gradient(loss, arrays, **hyper):
  names = inspect.signature(loss).parameters
  inputs = {n: x for n, x in arrays.items() if n in names}
  log_probs = jnp.asarray(inputs.pop('log_probs'))
  return jax.jit(jax.grad(lambda l: loss(l, **inputs, **hyper)[0]))(log_probs)


def test_hpt_limits():
  """Always imitating is SFT on the demonstrations; never, Dr. GRPO without a clip."""
  arrays = {n: x if x.dtype == bool else x.astype(np.float32)
            for n, x in cases.random_arrays().items()}
  demonstration = arrays['demonstration']
  nothing = np.zeros(cases.B, bool)
  hyper = dict(entropy_coefficient=0.0, max_completion_tokens=9)

  sft = {**arrays, 'from_rollouts': nothing, 'imitated': demonstration, 'off_policy': nothing}
  only = {**arrays, 'loss_mask': arrays['loss_mask'] & demonstration[:, None]}
  np.testing.assert_allclose(gradient(hybrid.hpt_loss, sft, **hyper),
                             gradient(imitation.sft_loss, only), rtol=1e-5)

  rl = {**arrays, 'from_rollouts': ~demonstration, 'imitated': nothing, 'off_policy': nothing}
  rollouts = {n: x[~demonstration] for n, x in arrays.items()}
  want = gradient(policy_gradient.dr_grpo_loss, rollouts, clip_low=1e9, clip_high=1e9,
                  max_completion_tokens=9)
  got = gradient(hybrid.hpt_loss, rl, **hyper)
  np.testing.assert_allclose(got[~demonstration], want, rtol=1e-5, atol=1e-8)
  assert not np.asarray(got)[demonstration].any()


def test_shaped_demonstrations_push_most_where_the_policy_is_at_gamma():
  probability = np.array([[0.001, 0.01, 0.1, 0.5, 0.99]], np.float32)
  arrays = {'log_probs': np.log(probability), 'old_log_probs': np.log(probability),
            'advantages': np.ones(1, np.float32), 'demonstration': np.ones(1, bool),
            'loss_mask': np.ones((1, 5), bool)}
  weights = -gradient(hybrid.luffy_loss, arrays, entropy_coefficient=0.0, shaping=0.1)
  assert int(np.argmax(weights)) == 2


def test_parts_are_reported():
  arrays = cases.random_arrays()
  inputs = {n: jnp.asarray(x) for n, x in arrays.items()
            if n in inspect.signature(hybrid.luffy_loss).parameters}
  loss, metrics = hybrid.luffy_loss(**inputs)
  assert set(metrics) == {'hybrid/rollouts', 'hybrid/off_policy', 'hybrid/entropy'}
  np.testing.assert_allclose(sum(metrics.values()), loss, rtol=1e-6)
