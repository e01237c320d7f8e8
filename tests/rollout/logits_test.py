"""Drawing tokens: exact distributions, exact supports, and rows that do not see each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ptjax.rollout import logits as sampling

DRAWS = 20_000
ROW = np.array([2.0, -1.0, 0.5, 1.2, -np.inf, 0.1, 1.9, -3.0, 0.7, -0.2, 1.0], np.float32)


def keys_for(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def reference(row, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
  """Probabilities after the filters, by sorting, in float64. Distinct logits only."""
  scaled = row.astype(np.float64) / temperature
  probs = np.exp(scaled - scaled.max())
  if top_k:
    probs[np.argsort(-probs)[top_k:]] = 0
  probs /= probs.sum()
  order = np.argsort(-probs)
  above = np.cumsum(probs[order]) - probs[order]
  probs[order[above >= top_p]] = 0
  probs /= probs.sum()
  probs[probs < min_p * probs.max()] = 0
  return probs / probs.sum()


FILTERS = [
    {}, {'temperature': 0.6}, {'temperature': 2.0}, {'top_k': 4}, {'top_k': 1}, {'top_k': 50},
    {'top_p': 0.8}, {'top_p': 0.4}, {'top_p': 1e-6}, {'min_p': 0.2}, {'min_p': 1.0},
    {'temperature': 1.5, 'top_k': 6, 'top_p': 0.7},
    {'temperature': 0.8, 'top_k': 7, 'top_p': 0.95, 'min_p': 0.1},
]


@pytest.mark.parametrize('filters', FILTERS, ids=str)
def test_distribution_is_exact(filters):
  tokens, _ = jax.jit(lambda x, k: sampling.sample(x, k, **filters))(
      jnp.broadcast_to(ROW, (DRAWS, ROW.size)), keys_for(DRAWS))
  probs = reference(ROW, **filters)
  counts = np.bincount(tokens, minlength=ROW.size)
  assert counts[probs == 0].sum() == 0
  if (probs > 0).sum() > 1:
    # The seed is fixed: this either always passes or always fails.
    assert stats.chisquare(counts[probs > 0], DRAWS * probs[probs > 0]).pvalue > 1e-3


@pytest.mark.parametrize('filters', FILTERS, ids=str)
def test_support_equals_transformers(filters):
  torch = pytest.importorskip('torch')
  from transformers.generation import logits_process as hf
  warpers = [hf.TemperatureLogitsWarper(float(filters.get('temperature', 1.0)))]
  if 'top_k' in filters:
    warpers.append(hf.TopKLogitsWarper(filters['top_k']))
  if 'top_p' in filters:
    warpers.append(hf.TopPLogitsWarper(filters['top_p']))
  if 'min_p' in filters:
    warpers.append(hf.MinPLogitsWarper(filters['min_p']))
  scores = torch.from_numpy(ROW.copy())[None]
  for warper in warpers:
    scores = warper(None, scores)
  np.testing.assert_allclose(reference(ROW, **filters), torch.softmax(scores[0].double(), 0),
                             atol=1e-6)


@pytest.mark.parametrize('filters', [{}, {'temperature': 0.5}, {'top_k': 3}, {'top_p': 0.5},
                                     {'min_p': 0.3}, {'temperature': 0}], ids=str)
def test_log_probs_are_of_the_full_softmax(filters):
  logits = 3 * jax.random.normal(jax.random.key(1), (64, 300))
  tokens, log_probs = sampling.sample(logits, keys_for(64), **filters)
  full = jax.nn.log_softmax(logits / (filters.get('temperature') or 1.0))
  np.testing.assert_allclose(log_probs, full[np.arange(64), tokens], atol=2e-6, rtol=1e-6)


def test_greedy_takes_the_first_maximum_and_no_randomness():
  logits = jnp.array([[0.0, 5.0, 5.0, -jnp.inf], [1.0, 0.0, 0.0, 0.0]])
  for seed in (0, 1):
    tokens, _ = sampling.sample(logits, keys_for(2, seed), temperature=0, top_p=0.1)
    np.testing.assert_array_equal(tokens, [1, 0])


def test_tiny_temperature_is_the_argmax():
  logits = 50 * jax.random.normal(jax.random.key(2), (32, 40))
  tokens, log_probs = sampling.sample(logits, keys_for(32), temperature=1e-30)
  np.testing.assert_array_equal(tokens, logits.argmax(-1))
  np.testing.assert_array_equal(log_probs, 0.0)


@pytest.mark.parametrize('filters', [{'top_k': 2}, {'top_p': 0.5}, {'min_p': 0.9}], ids=str)
def test_ties_at_the_boundary_stay_together(filters):
  row = jnp.array([1.0, 3.0, 3.0, -jnp.inf, 3.0])
  tokens, _ = sampling.sample(jnp.broadcast_to(row, (500, 5)), keys_for(500), **filters)
  assert set(np.unique(tokens)) == {1, 2, 4}


@pytest.mark.parametrize('filters', FILTERS[-1:], ids=str)
def test_a_row_does_not_see_its_batch(filters):
  logits = jax.random.normal(jax.random.key(3), (16, 50))
  keys = keys_for(16)
  jitted = jax.jit(lambda logits, keys: sampling.sample(logits, keys, **filters)[0])
  draw = lambda rows: jitted(logits[rows], keys[rows])
  together = draw(np.arange(16))
  order = np.random.default_rng(0).permutation(16)
  np.testing.assert_array_equal(draw(order), together[order])
  np.testing.assert_array_equal([draw(np.array([i]))[0] for i in range(16)], together)


def test_top_p_rejects_with_fresh_numbers():
  # With the same number in each round, rejection would skew the draw; the distribution test sees
  # that too, but only this names it.
  keys = keys_for(1000)
  first, second = sampling._uniform(keys, 0), sampling._uniform(keys, 1)
  assert np.abs(np.corrcoef(np.hstack([first, second]).T) - np.eye(4)).max() < 0.15


def test_nan_logits_end_and_show():
  logits = jnp.full((2, 9), jnp.nan)
  _, log_probs = jax.jit(lambda x, k: sampling.sample(x, k, top_k=2, top_p=0.5, min_p=0.1))(
      logits, keys_for(2))
  assert np.isnan(log_probs).all()


@pytest.mark.parametrize('size', [1, 7, 128, 129, 1000])
def test_pick_is_the_inverse_cdf_of_blocks_and_within_one(size):
  weights = np.random.default_rng(size).exponential(size=(64, size)).astype(np.float32)
  weights[:, ::3] *= np.random.default_rng(1).random(weights[:, ::3].shape) < 0.5
  weights[:, -1] += 0.5  # every row has some mass
  uniform = np.random.default_rng(2).random((64, 2), dtype=np.float32)
  index, total = sampling.pick(jnp.asarray(weights), jnp.asarray(uniform))
  np.testing.assert_allclose(total, weights.sum(-1), rtol=1e-5)
  index, compared = np.asarray(index), 0
  for row, (first, second), drawn in zip(weights.astype(np.float64), uniform, index):
    blocks = np.pad(row, (0, -size % 128)).reshape(-1, 128)
    for ends, number, got in ((np.cumsum(blocks.sum(1)), first, drawn // 128),
                              (np.cumsum(blocks[drawn // 128]), second, drawn % 128)):
      target = number * ends[-1]
      # Where rounding could decide, both neighbours are right; the rest must agree exactly.
      if np.abs(ends - target).min() > 1e-5 * ends[-1]:
        assert got == (ends <= target).sum()
        compared += 1
  assert compared > 64


@pytest.mark.parametrize('uniform', [0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))])
def test_pick_never_leaves_the_support(uniform):
  rng = np.random.default_rng(3)
  weights = rng.exponential(size=(200, 700)).astype(np.float32)
  weights *= rng.random((200, 700)) < 0.02  # mostly zeros, whole blocks of them
  weights[:, 300:] *= rng.random((200, 1)) < 0.5
  weights[:, 17] = 1e-20  # some mass, lost to rounding next to the rest
  index, _ = sampling.pick(jnp.asarray(weights), jnp.full((200, 2), uniform, jnp.float32))
  assert (weights[np.arange(200), index] > 0).all()
