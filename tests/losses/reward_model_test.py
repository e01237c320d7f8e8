"""Reward-model losses against NumPy float64 closed forms, and TRL's RewardTrainer."""

import collections
import functools
import pathlib
import sys
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.losses import reward_model

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import preference_reference as reference

B, T = 4, 5
sigmoid, log_sigmoid = reference.sigmoid, reference.log_sigmoid


def rewards(seed=0, scale=1.5):
  rng = np.random.default_rng(seed)
  return scale * rng.normal(size=B), scale * rng.normal(size=B)


MARGINS = np.array([0.0, 1.0, 0.5, 2.0])


def pair_reference(chosen, rejected, margins=0.0, centre=0.0):
  """(loss, gradient in the chosen, gradient in the rejected rewards)."""
  gap, total = chosen - rejected - margins, chosen + rejected
  return (np.mean(-log_sigmoid(gap) + centre * total ** 2),
          (-sigmoid(-gap) + 2 * centre * total) / B, (sigmoid(-gap) + 2 * centre * total) / B)


PAIRS = [
    ('bt', reward_model.reward_bt_loss, {}, {}),
    ('margin', reward_model.reward_margin_loss, {'margins': MARGINS}, {'margins': MARGINS}),
    ('centred', reward_model.reward_centred_loss, {'centre_coefficient': 0.3}, {'centre': 0.3}),
]


@pytest.mark.parametrize('name,loss,hyper,reference', PAIRS, ids=[p[0] for p in PAIRS])
@pytest.mark.parametrize('scale', [1.5, 50.0])
def test_pair_losses_match_the_closed_form(name, loss, hyper, reference, scale):
  arrays = rewards(scale=scale)
  want = pair_reference(*arrays, **reference)
  with jax.enable_x64(True):
    function = jax.value_and_grad(lambda *r: loss(*r, **hyper)[0], (0, 1))
    value, grads = function(*map(jnp.asarray, arrays))
    jitted, _ = jax.jit(function)(*map(jnp.asarray, arrays))
  np.testing.assert_allclose([value, jitted], [want[0]] * 2, rtol=1e-12)
  np.testing.assert_allclose(grads, want[1:], rtol=1e-9, atol=1e-14)
  assert loss(*(jnp.asarray(r, jnp.bfloat16) for r in arrays), **hyper)[0].dtype == jnp.float32


@pytest.mark.parametrize('name,loss,hyper,_', PAIRS, ids=[p[0] for p in PAIRS])
def test_pair_metrics(name, loss, hyper, _):
  chosen, rejected = rewards()
  metrics = loss(jnp.asarray(chosen), jnp.asarray(rejected), **hyper)[1]
  want = {'rewards/chosen': chosen.mean(), 'rewards/rejected': rejected.mean(),
          'rewards/margins': (chosen - rejected).mean(),
          'rewards/accuracies': (chosen > rejected).mean()}
  assert set(metrics) == set(want)
  for metric in want:
    np.testing.assert_allclose(metrics[metric], want[metric], rtol=1e-5)


@pytest.mark.slow  # importing TRL takes longer than the test
@pytest.mark.parametrize('margin,coefficient', [(False, None), (True, None), (False, 0.3)])
def test_pair_losses_equal_trls(margin, coefficient):
  torch = pytest.importorskip('torch', reason='install the parity extra')
  trl = pytest.importorskip('trl.trainer.reward_trainer', reason='install the parity extra')
  trainer = object.__new__(trl.RewardTrainer)
  identity = staticmethod(lambda x: x)
  trainer.__dict__.update(
      model=python_types.SimpleNamespace(training=False), _total_train_tokens=0,
      accelerator=type('OneProcess', (), {'gather': identity, 'gather_for_metrics': identity}),
      args=python_types.SimpleNamespace(center_rewards_coefficient=coefficient),
      _metrics={'eval': collections.defaultdict(list)})
  parts = [torch.tensor(r, requires_grad=True) for r in rewards()]
  inputs = {'margin': torch.tensor(MARGINS)} if margin else {}
  model = lambda **_: python_types.SimpleNamespace(logits=torch.cat(parts)[:, None])
  want = trainer.compute_loss(model, inputs)
  want.backward()
  if margin:
    loss = functools.partial(reward_model.reward_margin_loss, margins=MARGINS)
  elif coefficient:
    loss = functools.partial(reward_model.reward_centred_loss, centre_coefficient=coefficient)
  else:
    loss = reward_model.reward_bt_loss
  with jax.enable_x64(True):
    (value, metrics), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        *map(jnp.asarray, rewards()))
  np.testing.assert_allclose(value, want.detach().numpy(), rtol=1e-12)
  np.testing.assert_allclose(grads, [p.grad.numpy() for p in parts], rtol=1e-10)
  trls = trainer._metrics['eval']
  np.testing.assert_allclose(metrics['rewards/margins'], trls['margin'][0], rtol=1e-10)
  np.testing.assert_allclose(metrics['rewards/accuracies'], trls['accuracy'][0])


def test_kwise_averages_the_ordered_pairs_of_each_prompt():
  values = np.array([[0.3, -1.0, 2.0], [1.0, 0.5, np.nan]])
  ranks = np.array([[1, 3, 2], [1, 2, -1]])
  better = [[(0, 2), (0, 1), (2, 1)], [(0, 1)]]  # the first is not how the model has it
  want, grad = 0.0, np.zeros_like(values)
  for prompt, pairs in enumerate(better):
    for i, j in pairs:
      gap = values[prompt, i] - values[prompt, j]
      want -= log_sigmoid(gap) / len(pairs) / 2
      grad[prompt, i] -= sigmoid(-gap) / len(pairs) / 2
      grad[prompt, j] += sigmoid(-gap) / len(pairs) / 2
  with jax.enable_x64(True):
    loss = functools.partial(reward_model.reward_kwise_loss, ranks=jnp.asarray(ranks))
    (value, metrics), got = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(values))
  np.testing.assert_allclose(value, want, rtol=1e-12)
  np.testing.assert_allclose(got, grad, rtol=1e-10)
  np.testing.assert_allclose(metrics['rewards/accuracies'], (2 / 3 + 1) / 2)
  np.testing.assert_allclose(metrics['rewards/margins'], ((-1.7 + 1.3 + 3.0) / 3 + 0.5) / 2)


def test_kwise_of_two_is_bradley_terry_and_ties_say_nothing():
  chosen, rejected = (jnp.asarray(r) for r in rewards())
  both = jnp.stack([rejected, chosen], axis=1)
  ranks = jnp.tile(jnp.array([[5, 2]]), (B, 1))
  np.testing.assert_allclose(reward_model.reward_kwise_loss(both, ranks=ranks)[0],
                             reward_model.reward_bt_loss(chosen, rejected)[0], rtol=1e-6)
  tied = jnp.zeros_like(ranks)
  assert reward_model.reward_kwise_loss(both, ranks=tied)[0] == 0.0


LABELS = np.array([True, False, True, False])


@pytest.mark.parametrize('loss', [reward_model.orm_loss, reward_model.preference_model_loss])
@pytest.mark.parametrize('scale', [1.5, 50.0])
def test_binary_losses_match_the_closed_form(loss, scale):
  logits = rewards(scale=scale)[0]
  sign = np.where(LABELS, 1.0, -1.0)
  with jax.enable_x64(True):
    (value, metrics), grad = jax.value_and_grad(
        lambda x: loss(x, labels=LABELS), has_aux=True)(jnp.asarray(logits))
  np.testing.assert_allclose(value, -log_sigmoid(sign * logits).mean(), rtol=1e-12)
  np.testing.assert_allclose(grad, -sign * sigmoid(-sign * logits) / B, rtol=1e-9, atol=1e-18)
  np.testing.assert_allclose(metrics['accuracy'], ((logits > 0) == LABELS).mean())


def step_arrays():
  rng = np.random.default_rng(7)
  mask = np.zeros((2, T), bool)
  mask[0, [1, 3]] = mask[1, 4] = True
  logits = np.where(mask[..., None], rng.normal(size=(2, T, 2)), np.nan)
  return logits, mask


@pytest.mark.parametrize('soft', [False, True])
def test_prm_is_cross_entropy_at_the_separators(soft):
  logits, mask = step_arrays()
  labels = np.where(mask, np.linspace(0.1, 0.9, 2 * T).reshape(2, T), np.nan)
  labels = labels if soft else np.where(mask, labels, 0.0) > 0.5
  want, grad = 0.0, np.zeros_like(logits)
  for i, t in zip(*np.nonzero(mask)):
    probabilities = np.exp(logits[i, t]) / np.exp(logits[i, t]).sum()
    target = np.array([1.0 - labels[i, t], labels[i, t]])
    want -= target @ np.log(probabilities) / mask.sum()
    grad[i, t] = (probabilities - target) / mask.sum()
  with jax.enable_x64(True):
    loss = functools.partial(reward_model.prm_loss, step_labels=jnp.asarray(labels),
                             step_mask=jnp.asarray(mask))
    (value, metrics), got = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(logits))
  np.testing.assert_allclose(value, want, rtol=1e-12)
  np.testing.assert_allclose(got, grad, atol=1e-12)
  right = (logits[..., 1] > logits[..., 0]) == (labels > 0.5)
  assert 0 < right[mask].mean() < 1
  np.testing.assert_allclose(metrics['accuracy'], right[mask].mean())


def test_prm_of_a_single_step_and_of_none():
  logits, mask = step_arrays()
  one = np.zeros_like(mask)
  one[0, 1] = True
  for steps in (one, np.zeros_like(mask)):
    loss, metrics = reward_model.prm_loss(
        jnp.asarray(logits), step_labels=jnp.ones(mask.shape), step_mask=jnp.asarray(steps))
    good = logits[0, 1, 1] - logits[0, 1, 0]
    want = np.log1p(np.exp(-good)) if steps.any() else 0.0
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert float(metrics['accuracy']) == float(steps.any() and good > 0)


BAD = [
    (reward_model.reward_bt_loss, (np.ones(2), np.ones(3)), {}, r'rejected_rewards.*\[3\]'),
    (reward_model.reward_margin_loss, (np.ones(2), np.ones(2)), {'margins': None}, 'margins'),
    (reward_model.reward_centred_loss, (np.ones(2), np.ones(2)), {'centre_coefficient': -1.0},
     'centre_coefficient=-1.0'),
    (reward_model.orm_loss, (np.ones(2),), {'labels': np.ones(2)}, 'labels is float'),
    (reward_model.reward_kwise_loss, (np.ones((2, 3)),), {'ranks': np.ones((2, 2), int)},
     'rewards and ranks'),
    (reward_model.prm_loss, (np.ones((2, 3)),),
     {'step_labels': np.ones((2, 3)), 'step_mask': np.ones((2, 3), bool)}, 'step_logits'),
]


@pytest.mark.parametrize('loss,arrays,hyper,message', BAD, ids=[b[3] for b in BAD])
def test_bad_input_is_named(loss, arrays, hyper, message):
  with pytest.raises(ValueError, match=message):
    loss(*map(jnp.asarray, arrays), **hyper)
