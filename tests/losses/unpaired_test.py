"""Losses on single labelled responses against float64 closed forms."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax import types
from ptjax.losses import unpaired
from ptjax.pieces import running

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import preference_cases as cases
import preference_reference as reference

sigmoid, log_sigmoid = reference.sigmoid, reference.log_sigmoid
B, T = 4, 6
LABELS = np.array([True, False, False, True])
PROBABILITIES = np.array([0.2, 0.7, 0.99, 0.5])
STATE = {'mean': 0.2, 'std': 0.0, 'count': 3.0}
MISMATCHED = ('mismatched_log_probs', 'mismatched_reference_log_probs', 'mismatched_loss_mask')
WEIGHTS = {'desirable_weight': 1.2, 'undesirable_weight': 0.8}


def random_arrays(drift=0.5):
  """The chosen side of the random pairs; mismatched log-ratios move up with `drift`."""
  pairs = cases.random_arrays(B, T)
  arrays = {name: pairs['chosen' + part] for name, part in (
      ('log_probs', ''), ('loss_mask', '_mask'), ('reference', '_reference'))}
  return {**arrays, 'labels': LABELS, 'mismatched_log_probs': pairs['rejected'],
          'mismatched_reference_log_probs': pairs['rejected'] - drift,
          'mismatched_loss_mask': pairs['rejected_mask'], 'desirable_probabilities': PROBABILITIES}


def extreme_arrays():
  pairs = cases.extreme_arrays(T)
  return {**random_arrays(), 'log_probs': pairs['chosen'], 'loss_mask': pairs['chosen_mask'],
          'reference': pairs['chosen_reference']}


def ratio(arrays, prefix=''):
  name = {'': 'reference', 'mismatched_': 'mismatched_reference_log_probs'}[prefix]
  return reference.side(arrays[prefix + 'log_probs'], arrays[prefix + 'loss_mask'], arrays[name]).s


# Each reference gives (loss, A): A_i is minus the derivative of the loss in S_i.

def kto(arrays, beta, desirable_weight, undesirable_weight):
  z = max(0.0, ratio(arrays, 'mismatched_').mean())
  y = np.where(arrays['labels'], 1.0, -1.0)
  weight = np.where(arrays['labels'], desirable_weight, undesirable_weight)
  q = beta * y * (ratio(arrays) - z)
  return (weight * (1 - sigmoid(q))).mean(), weight * y * beta * sigmoid(q) * sigmoid(-q) / B


def apo_zero_unpaired(arrays, beta):
  r, labels = beta * ratio(arrays), arrays['labels']
  return (np.where(labels, 1 - sigmoid(r), sigmoid(r)).mean(),
          np.where(labels, 1.0, -1.0) * beta * sigmoid(r) * sigmoid(-r) / B)


def bco(arrays, beta, weighted, at=None):
  """`at`: the arrays that the shift is of, where those are not the same."""
  r, labels = beta * ratio(arrays), arrays['labels']
  seen = r if at is None else beta * ratio(at)
  shift = (STATE['mean'] * STATE['count'] + seen.sum()) / (STATE['count'] + B)
  c = arrays['desirable_probabilities']
  weight = np.clip(c / (1 - c), 0.5, 10.0) if weighted else np.ones(B)
  loss = (-log_sigmoid(r - shift)[labels].mean()
          - (weight * log_sigmoid(shift - r))[~labels].mean())
  return loss, np.where(labels, beta * sigmoid(shift - r) / labels.sum(),
                        -weight * beta * sigmoid(r - shift) / (~labels).sum())


# name, loss, hyperparameters, further inputs, whether it has state, reference
TABLE = [
    ('kto', unpaired.kto_loss, {'beta': 0.3, **WEIGHTS}, MISMATCHED, False,
     functools.partial(kto, beta=0.3, **WEIGHTS)),
    ('apo_zero_unpaired', unpaired.apo_zero_unpaired_loss, {'beta': 0.3}, (), False,
     functools.partial(apo_zero_unpaired, beta=0.3)),
    ('bco', unpaired.bco_loss, {'beta': 0.3}, (), True,
     functools.partial(bco, beta=0.3, weighted=False)),
    ('bco weighted', unpaired.bco_loss, {'beta': 0.3}, ('desirable_probabilities',), True,
     functools.partial(bco, beta=0.3, weighted=True)),
]
IDS = [row[0] for row in TABLE]


def to_jax(arrays, extras, dtype):
  names = ('log_probs', 'loss_mask', 'reference', 'labels', *extras)
  return {n: jnp.asarray(arrays[n], bool if arrays[n].dtype == bool else dtype) for n in names}


@functools.lru_cache(None)
def compiled(index):
  _, loss, hyper, extras, has_state, _ = TABLE[index]
  def objective(log_probs, arrays):
    side = types.SideLogProbs(log_probs, arrays['loss_mask'], arrays['reference'])
    state = {'loss_state': running.Moments(*(jnp.asarray(STATE[k], log_probs.dtype) for k in (
        'mean', 'std', 'count')))} if has_state else {}
    value, metrics, *_ = loss(side, labels=arrays['labels'], **state, **hyper,
                              **{name: arrays[name] for name in extras})
    return value, metrics
  def call(arrays):
    return jax.value_and_grad(objective, has_aux=True)(arrays['log_probs'], arrays)
  return call, jax.jit(call)


@pytest.mark.parametrize('index', range(len(TABLE)), ids=IDS)
@pytest.mark.parametrize('drift', [0.5, -0.5], ids=['kl above 0', 'kl clamped'])
def test_value_and_gradient_match_the_closed_form(index, drift):
  *_, extras, _, closed_form = TABLE[index]
  arrays = random_arrays(drift)
  want, A = closed_form(arrays)
  with jax.enable_x64(True):
    (value, _), grad = compiled(index)[1](to_jax(arrays, extras, np.float64))
  np.testing.assert_allclose(value, want, rtol=1e-11)
  np.testing.assert_allclose(-grad, np.where(arrays['loss_mask'], A[:, None], 0.0), atol=1e-13)


@pytest.mark.parametrize('index', range(len(TABLE)), ids=IDS)
def test_closed_form_is_the_central_difference(index):
  arrays, closed_form = random_arrays(), TABLE[index][-1]
  held = {'at': arrays} if TABLE[index][1] is unpaired.bco_loss else {}
  A = closed_form(arrays)[1]
  for i, t in zip(*np.nonzero(arrays['loss_mask'])):
    values = []
    for step in (1e-5, -1e-5):
      moved = {**arrays, 'log_probs': arrays['log_probs'].copy()}
      moved['log_probs'][i, t] += step
      values.append(closed_form(moved, **held)[0])
    np.testing.assert_allclose((values[1] - values[0]) / 2e-5, A[i], rtol=1e-6)


@pytest.mark.parametrize('index', range(len(TABLE)), ids=IDS)
def test_jit_padding_and_order(index):
  extras = TABLE[index][3]
  eager, jitted = compiled(index)
  arrays = to_jax(random_arrays(), extras, np.float32)
  (value, metrics), grad = jitted(arrays)
  np.testing.assert_allclose(value, eager(arrays)[0][0], rtol=2e-6)
  np.testing.assert_allclose(grad, eager(arrays)[1], rtol=1e-5, atol=1e-7)

  def poisoned(name, x):
    mask = arrays['mismatched_loss_mask' if name.startswith('mismatched') else 'loss_mask']
    return jnp.where(mask, x, jnp.nan) if x.ndim == 2 and x.dtype != bool else x
  padded = jitted({name: poisoned(name, x) for name, x in arrays.items()})
  jax.tree.map(np.testing.assert_array_equal, ((value, metrics), grad), padded)

  order = np.array([2, 0, 3, 1])
  (moved, _), moved_grad = jitted({name: x[order] for name, x in arrays.items()})
  np.testing.assert_allclose(moved, value, rtol=2e-6)
  np.testing.assert_allclose(moved_grad, grad[order], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize('index', range(len(TABLE)), ids=IDS)
def test_extreme_log_ratios_are_finite_and_right(index):
  *_, extras, _, closed_form = TABLE[index]
  arrays = extreme_arrays()
  want, A = closed_form(arrays)
  (value, _), grad = compiled(index)[1](to_jax(arrays, extras, np.float32))
  np.testing.assert_allclose(value, want, rtol=1e-4)
  np.testing.assert_allclose(-grad, np.where(arrays['loss_mask'], A[:, None], 0.0), rtol=1e-3,
                             atol=1e-5 * np.abs(A).max())


@pytest.mark.parametrize('index', range(len(TABLE)), ids=IDS)
@pytest.mark.parametrize('label', [True, False])
def test_one_class_alone_is_finite(index, label):
  arrays = to_jax(random_arrays(), TABLE[index][3], np.float32)
  (value, metrics), grad = compiled(index)[1]({**arrays, 'labels': jnp.full((B,), label)})
  assert np.isfinite(value) and np.isfinite(grad).all()
  assert all(np.isfinite(m) for m in metrics.values())
  assert metrics['rewards/rejected' if label else 'rewards/chosen'] == 0.0


def side_of(arrays, dtype=jnp.float32):
  return types.SideLogProbs(*(jnp.asarray(arrays[n], bool if n == 'loss_mask' else dtype)
                              for n in ('log_probs', 'loss_mask', 'reference')))


def test_bco_shift_is_the_mean_of_all_rewards_seen():
  side = side_of(random_arrays())
  rewards = 0.3 * ratio(random_arrays())
  _, metrics, state = unpaired.bco_loss(side, labels=LABELS, beta=0.3)
  np.testing.assert_allclose(metrics['shift'], rewards.mean(), rtol=1e-5)
  other = side.replace(log_probs=side.log_probs - 0.3)
  _, metrics, state = unpaired.bco_loss(other, labels=LABELS, beta=0.3, loss_state=state)
  moved = rewards - 0.09 * np.asarray(side.loss_mask).sum(axis=1)
  np.testing.assert_allclose(metrics['shift'], np.concatenate([rewards, moved]).mean(), rtol=1e-5)
  assert state.count == 2 * B and state.mean == metrics['shift']


def test_kto_without_kl_is_apo_zero_unpaired():
  arrays = random_arrays(drift=-0.5)
  kto_value = unpaired.kto_loss(side_of(arrays), labels=LABELS, beta=0.3, **{
      name: jnp.asarray(arrays[name]) for name in MISMATCHED})
  assert kto_value[1]['kl'] == 0.0
  np.testing.assert_allclose(
      kto_value[0], unpaired.apo_zero_unpaired_loss(side_of(arrays), labels=LABELS, beta=0.3)[0])


def test_kl_of_kto_is_a_constant():
  arrays = random_arrays()
  further = {name: jnp.asarray(arrays[name]) for name in MISMATCHED[1:]}
  def loss(log_probs):
    return unpaired.kto_loss(
        side_of(arrays), labels=LABELS, mismatched_log_probs=log_probs, **further)[0]
  log_probs = jnp.asarray(arrays['mismatched_log_probs'])
  assert not jax.grad(loss)(log_probs).any()
  assert loss(log_probs) != loss(log_probs + 1.0), 'though the value depends on it'


def test_metrics_are_class_means():
  metrics = unpaired.apo_zero_unpaired_loss(side_of(random_arrays()), labels=LABELS, beta=0.3)[1]
  rewards = 0.3 * ratio(random_arrays())
  np.testing.assert_allclose(metrics['rewards/chosen'], rewards[LABELS].mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics['rewards/rejected'], rewards[~LABELS].mean(), rtol=1e-5)
  np.testing.assert_allclose(
      metrics['rewards/margins'], rewards[LABELS].mean() - rewards[~LABELS].mean(), rtol=1e-5)


NONE = dict.fromkeys(MISMATCHED)
BAD = [
    (unpaired.apo_zero_unpaired_loss, {'labels': np.array([1, 0, 1, 0])}, 'labels is int.*bool'),
    (unpaired.bco_loss, {'labels': np.array([True])}, r'labels is bool\[1\].*bool\[4\]'),
    (unpaired.bco_loss, {'labels': LABELS, 'beta': -1.0}, 'beta=-1.0'),
    (unpaired.bco_loss, {'labels': LABELS, 'desirable_probabilities': np.ones(3)},
     r'desirable_probabilities.*\[3\]'),
    (unpaired.kto_loss, {'labels': LABELS, 'desirable_weight': -1.0, **NONE}, 'desirable_weight'),
    (unpaired.kto_loss, {'labels': LABELS, **NONE}, 'kto needs mismatched_log_probs'),
]


@pytest.mark.parametrize('loss,hyper,message', BAD, ids=[b[2] for b in BAD])
def test_bad_input_is_named(loss, hyper, message):
  with pytest.raises(ValueError, match=message):
    loss(side_of(random_arrays()), **hyper)


def test_a_batch_of_one_or_a_missing_reference_is_named():
  one = jax.tree.map(lambda x: x[:1], side_of(random_arrays()))
  with pytest.raises(ValueError, match='a batch of 1.*at least 2'):
    unpaired.kto_loss(one, labels=LABELS[:1], **NONE)
  with pytest.raises(ValueError, match='reference_log_probs'):
    unpaired.apo_zero_unpaired_loss(
        side_of(random_arrays()).replace(reference_log_probs=None), labels=LABELS)
