"""AdamW against hand-written NumPy steps and torch; schedules against their closed forms."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ptjax import config
from ptjax.training import optimizer

# In float32, 1 - 0.999 is right to 6e-5 of itself, its square root to 3e-5: that much of each of
# six updates of size 0.1.
ATOL = 2e-5
NAMES = {'layers': {'norm': {'scale': (2, 3)}, 'up': {'kernel': (2, 3, 4), 'bias': (2, 4)}},
         'embed': {'embedding': (5, 3)}, 'head': {'kernel': (3, 5)}}


def _tree(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda shape: (scale * rng.normal(size=shape)).astype(np.float32), NAMES,
                      is_leaf=lambda x: isinstance(x, tuple))


def _settings(**changes):
  return dataclasses.replace(config.OptimizerSettings(learning_rate=0.1), **changes)


def _run(settings, total_steps, gradients):
  params = jax.tree.map(jnp.asarray, _tree(0))
  transform, _ = optimizer.make_optimizer(settings, total_steps, params)
  state = transform.init(params)
  step = jax.jit(transform.update)
  for gradient in gradients:
    updates, state = step(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return params


def _by_hand(settings, total_steps, gradients, decays):
  """AdamW in float64, straight from the paper."""
  leaves, structure = jax.tree.flatten(_tree(0))
  decays = jax.tree.leaves(decays)
  weights = [w.astype(np.float64) for w in leaves]
  first = [np.zeros_like(w) for w in weights]
  second = [np.zeros_like(w) for w in weights]
  for t, gradient in enumerate(gradients):
    parts = [g.astype(np.float64) for g in jax.tree.leaves(gradient)]
    norm = math.sqrt(sum((g ** 2).sum() for g in parts))
    if settings.max_grad_norm is not None and norm > settings.max_grad_norm:
      parts = [g * settings.max_grad_norm / norm for g in parts]
    rate = _rate(settings, total_steps, t)
    for i, g in enumerate(parts):
      first[i] = settings.beta1 * first[i] + (1 - settings.beta1) * g
      second[i] = settings.beta2 * second[i] + (1 - settings.beta2) * g ** 2
      m = first[i] / (1 - settings.beta1 ** (t + 1))
      v = second[i] / (1 - settings.beta2 ** (t + 1))
      decay = settings.weight_decay * weights[i] if decays[i] else 0.0
      weights[i] = weights[i] - rate * (m / (np.sqrt(v) + settings.epsilon) + decay)
  return jax.tree.unflatten(structure, weights)


def _rate(settings, total_steps, t):
  w, e = settings.warmup_steps, settings.end_fraction
  if t < w:
    return settings.learning_rate * (t + 1) / w
  p = min((t - w) / max(total_steps - w, 1), 1.0)
  factor = {'constant': 1.0, 'linear': 1 - p * (1 - e),
            'cosine': e + (1 - e) * (1 + math.cos(math.pi * p)) / 2}[settings.schedule]
  return settings.learning_rate * factor


@pytest.mark.parametrize('changes', [
    dict(),
    dict(weight_decay=0.3),
    dict(weight_decay=0.3, decay_all=True),
    dict(beta1=0.5, beta2=0.7, epsilon=0.1),
    dict(max_grad_norm=None),
    dict(max_grad_norm=0.01, epsilon=1e-3),
    dict(schedule='cosine', warmup_steps=2, end_fraction=0.25, weight_decay=0.1),
])
def test_equals_adamw_by_hand(changes):
  settings = _settings(**changes)
  gradients = [_tree(seed + 1, scale=3.0) for seed in range(5)]
  ours = _run(settings, 5, gradients)
  named = {'layers': {'norm': {'scale': False}, 'up': {'kernel': True, 'bias': False}},
           'embed': {'embedding': False}, 'head': {'kernel': True}}
  decays = jax.tree.map(lambda d: d or settings.decay_all, named)
  expected = _by_hand(settings, 5, gradients, decays)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=ATOL), ours, expected)


@pytest.mark.parametrize('name,value', [
    ('learning_rate', 0.05), ('schedule', 'linear'), ('warmup_steps', 2), ('end_fraction', 0.5),
    ('weight_decay', 0.2), ('decay_all', True), ('beta1', 0.3), ('beta2', 0.5), ('epsilon', 0.5),
    ('max_grad_norm', 1e-2)])
def test_every_setting_changes_the_result(name, value):
  base = _settings(schedule='cosine', weight_decay=0.1, epsilon=1e-2)
  gradients = [_tree(seed + 1) for seed in range(3)]
  before = _run(base, 4, gradients)
  after = _run(dataclasses.replace(base, **{name: value}), 4, gradients)
  changes = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
  assert max(jax.tree.leaves(changes)) > 1e-4
  assert name in {field.name for field in dataclasses.fields(config.OptimizerSettings)}


def test_the_settings_walked_above_are_all_there_are():
  walked = {'learning_rate', 'schedule', 'warmup_steps', 'end_fraction', 'weight_decay',
            'decay_all', 'beta1', 'beta2', 'epsilon', 'max_grad_norm'}
  assert walked == {field.name for field in dataclasses.fields(config.OptimizerSettings)}


def test_equals_torch_adamw():
  torch = pytest.importorskip('torch')
  settings = _settings(weight_decay=0.3, decay_all=True, max_grad_norm=None, beta2=0.95)
  gradients = [_tree(seed + 1) for seed in range(6)]
  ours = jax.tree.leaves(_run(settings, 6, gradients))
  weights = [torch.nn.Parameter(torch.tensor(w)) for w in jax.tree.leaves(_tree(0))]
  adamw = torch.optim.AdamW(weights, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
  for gradient in gradients:
    for weight, g in zip(weights, jax.tree.leaves(gradient)):
      weight.grad = torch.tensor(g)
    adamw.step()
  for a, b in zip(ours, weights):
    np.testing.assert_allclose(a, b.detach().numpy(), rtol=0, atol=ATOL)


@pytest.mark.parametrize('kind', ['constant', 'linear', 'cosine'])
@pytest.mark.parametrize('warmup', [0, 1, 2, 5, 30])
@pytest.mark.parametrize('end', [0.0, 0.1])
def test_schedule_closed_form(kind, warmup, end):
  settings = _settings(schedule=kind, warmup_steps=warmup, end_fraction=end)
  schedule = optimizer.make_schedule(settings, 20)
  rates = [float(schedule(jnp.int32(t))) for t in range(25)]
  expected = [_rate(settings, 20, t) for t in range(25)]
  np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-8)


def test_first_and_last_update_move():
  schedule = optimizer.make_schedule(_settings(schedule='linear', warmup_steps=4), 10)
  assert float(schedule(0)) == pytest.approx(0.1 / 4)
  assert float(schedule(3)) == pytest.approx(0.1)
  assert float(schedule(9)) == pytest.approx(0.1 / 6)


def test_schedule_is_the_one_the_optimizer_follows():
  settings = _settings(schedule='linear', warmup_steps=3, epsilon=1e-12, max_grad_norm=None)
  params = {'kernel': jnp.zeros((1,))}
  transform, schedule = optimizer.make_optimizer(settings, 8, params)
  state = transform.init(params)
  for t in range(8):
    updates, state = transform.update({'kernel': jnp.ones((1,))}, state, params)
    # A constant gradient has m_hat = g and v_hat = g**2: each step is exactly the learning rate.
    np.testing.assert_allclose(-updates['kernel'][0], schedule(t), rtol=1e-4)


def test_decay_mask_goes_by_name_not_by_shape():
  mask = optimizer.decay_mask(_tree(0))
  assert mask == {'layers': {'norm': {'scale': False}, 'up': {'kernel': True, 'bias': False}},
                  'embed': {'embedding': False}, 'head': {'kernel': True}}
  adapter = dict.fromkeys(('lora_a', 'lora_b', 'magnitude'), 0)
  assert optimizer.decay_mask(adapter) == {'lora_a': True, 'lora_b': True, 'magnitude': False}


def test_moments_take_the_parameters_dtype():
  params = {'kernel': jnp.ones((2, 2), jnp.bfloat16)}
  transform, _ = optimizer.make_optimizer(_settings(), 5, params)
  moments = [x for x in jax.tree.leaves(transform.init(params)) if x.ndim]
  assert moments and all(x.dtype == jnp.bfloat16 for x in moments)


@pytest.mark.parametrize('changes,words', [
    (dict(schedule='cosin'), 'cosine'),
    (dict(learning_rate=-1.0), 'learning_rate'),
    (dict(warmup_steps=-1), 'warmup_steps'),
    (dict(max_grad_norm=0.0), 'max_grad_norm'),
])
def test_bad_settings_are_named(changes, words):
  with pytest.raises(config.UserError, match=words):
    _settings(**changes)
