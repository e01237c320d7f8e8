"""The train step: exact for any split, exact ratio on-policy, and unharmed by a bad batch."""

import functools
import pathlib
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ptjax import process
from ptjax import sharding
from ptjax import types
from ptjax.pieces import following
from ptjax.training import layout
from ptjax.training import state as training_state
from ptjax.training import step as training_step

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import bigram

VOCAB, PROMPTS, GROUP, LENGTH = 7, 8, 2, 5
forward = bigram.forward


def make_batch(seed=0, **inputs):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, LENGTH + 1, PROMPTS * GROUP)
  return types.TokenBatch(
      prompt_tokens=rng.integers(0, VOCAB, (PROMPTS, 3)).astype(np.int32),
      prompt_lengths=rng.integers(1, 4, PROMPTS).astype(np.int32),
      tokens=rng.integers(0, VOCAB, (PROMPTS * GROUP, LENGTH)).astype(np.int32),
      loss_mask=np.arange(LENGTH) < lengths[:, None], on_policy=np.asarray(True),
      inputs={'advantages': rng.normal(size=PROMPTS * GROUP).astype(np.float32), **inputs})


def make_params(seed=1):
  return {'embed': {'embedding': jax.random.normal(jax.random.key(seed), (VOCAB, VOCAB))}}


def ratio_loss(log_probs, *, old_log_probs, advantages, loss_mask, power=1.0):
  ratio = jnp.exp(log_probs - old_log_probs) ** power
  value = jnp.where(loss_mask, ratio * advantages[:, None], 0.0).sum() / loss_mask.sum()
  return -value, {'ratio_min': jnp.where(loss_mask, ratio, 1.0).min(),
                  'ratio_max': jnp.where(loss_mask, ratio, 1.0).max()}


def whole_batch_loss(log_probs, *, entropy, loss_mask):
  """Looks at the whole batch at once: no sum over rows gives it."""
  sequence = jnp.where(loss_mask, log_probs, 0.0).sum(-1)
  spread = jax.nn.logsumexp(jnp.sort(sequence) * jnp.linspace(0.1, 1.0, sequence.size))
  return spread - 0.1 * jnp.where(loss_mask, entropy, 0.0).mean(), {}


def take_step(loss, batch, *, micro_batches=1, mesh=None, params=None):
  optimizer = optax.sgd(1.0)
  params = make_params() if params is None else params
  shardings = None
  if mesh is not None:
    shardings = training_state.shardings(mesh, params, optimizer)
    params = jax.device_put(params, shardings.params)
  state = training_state.init(params, optimizer)
  if mesh is not None:
    state = jax.device_put(state, shardings)
  step = training_step.make_train_step(
      forward, loss, optimizer, micro_batches=micro_batches, mesh=mesh, state_sharding=shardings)
  return step(state, training_step.place(batch, mesh))


@pytest.mark.parametrize('loss', [ratio_loss, whole_batch_loss])
@pytest.mark.parametrize('micro_batches', [2, 4, 8])
def test_any_split_gives_the_same_update(loss, micro_batches):
  one, one_metrics = take_step(loss, make_batch())
  many, many_metrics = take_step(loss, make_batch(), micro_batches=micro_batches)
  chex.assert_trees_all_close(many.params, one.params, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_close(many_metrics, one_metrics, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('loss', [ratio_loss, whole_batch_loss])
@pytest.mark.parametrize('micro_batches', [1, 2])
def test_eight_devices_give_the_same_update(loss, micro_batches):
  mesh = sharding.make_mesh('data=2,fsdp=2,tensor=2')
  one, _ = take_step(loss, make_batch())
  eight, _ = take_step(loss, make_batch(), micro_batches=micro_batches, mesh=mesh)
  chex.assert_trees_all_close(
      sharding.fetch(eight.params), sharding.fetch(one.params), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('micro_batches', [1, 4])
def test_ratio_is_exactly_one_on_policy(micro_batches):
  # The recorded old log-probs are wrong on purpose: on-policy they must not be read.
  recorded = np.full((PROMPTS * GROUP, LENGTH), -3.0, np.float32)
  _, metrics = take_step(ratio_loss, make_batch(old_log_probs=recorded),
                         micro_batches=micro_batches)
  assert metrics['ratio_min'] == 1.0 and metrics['ratio_max'] == 1.0
  off_policy = make_batch(old_log_probs=recorded).replace(on_policy=np.asarray(False))
  _, metrics = take_step(ratio_loss, off_policy, micro_batches=micro_batches)
  assert metrics['ratio_min'] < 1.0


@pytest.mark.parametrize('devices', [None, 2])
def test_an_update_is_compiled_frugally(monkeypatch, devices):
  """With the options of the process: one that XLA does not know ends the compilation."""
  monkeypatch.setattr(process, 'frugal_compilation', lambda: {'xla_cpu_no_such_thing': True})
  mesh = devices and sharding.make_mesh(f'data={devices}', jax.devices()[:devices])
  with pytest.raises(jax.errors.JaxRuntimeError, match='xla_cpu_no_such_thing'):
    take_step(whole_batch_loss, make_batch(), mesh=mesh)


def test_gradient_flows_through_log_probs_only_once():
  # On-policy, d/dθ of ratio * A is A * d/dθ log π; a dropped stop_gradient would give zero.
  new, _ = take_step(ratio_loss, make_batch())
  batch = make_batch()
  def expected(params):
    log_probs = forward(params, {}, batch)['log_probs']
    weights = jnp.where(batch.loss_mask, batch.inputs['advantages'][:, None], 0.0)
    return -(weights * log_probs).sum() / batch.loss_mask.sum()
  grads = jax.grad(expected)(make_params())
  chex.assert_trees_all_close(
      new.params, jax.tree.map(lambda p, g: p - g, make_params(), grads), rtol=1e-5, atol=1e-6)


def test_a_bad_batch_changes_nothing_and_is_counted():
  batch = make_batch()
  bad = batch.replace(inputs={'advantages': np.full(PROMPTS * GROUP, np.inf, np.float32)})
  optimizer = optax.adam(0.1)
  step = training_step.make_train_step(forward, ratio_loss, optimizer)
  state = training_state.init(make_params(), optimizer)
  before = sharding.fetch(state)
  state, metrics = step(state, training_step.place(bad, None))
  assert metrics['bad_steps'] == 1 and state.step == 1
  chex.assert_trees_all_equal(sharding.fetch(state.params), before.params)
  chex.assert_trees_all_equal(sharding.fetch(state.opt_state), before.opt_state)
  state, metrics = step(state, training_step.place(batch, None))
  assert metrics['bad_steps'] == 0
  assert np.abs(state.params['embed']['embedding'] - before.params['embed']['embedding']).max() > 0


def test_gap_between_sampler_and_trainer_is_measured():
  batch = make_batch()
  exact = forward(make_params(), {}, batch)['log_probs']
  shifted = np.asarray(exact).copy()
  shifted[3, 0] += 0.25
  _, metrics = take_step(ratio_loss, make_batch(rollout_log_probs=shifted))
  np.testing.assert_allclose(metrics['sampling/log_prob_gap_max'], 0.25, rtol=1e-5)
  assert metrics['sampling/effective_sample_size'] < 1.0
  # The sampler's log-probs are the denominator, and still the trainer's own are compared.
  reused = make_batch(rollout_log_probs=shifted).replace(on_policy=np.asarray(False))
  _, metrics = take_step(ratio_loss, reused)
  np.testing.assert_allclose(metrics['sampling/log_prob_gap_max'], 0.25, rtol=1e-5)
  np.testing.assert_allclose(metrics['ratio_min'], np.exp(-0.25), rtol=1e-5)
  _, metrics = take_step(ratio_loss, make_batch(rollout_log_probs=np.asarray(exact)))
  assert metrics['sampling/log_prob_gap_max'] == 0.0
  np.testing.assert_allclose(metrics['sampling/effective_sample_size'], 1.0, rtol=1e-6)


def test_split_and_join_are_inverse():
  batch = make_batch()
  parts = layout.split(batch, 4)
  chex.assert_shape(parts.tokens, (4, PROMPTS * GROUP // 4, LENGTH))
  np.testing.assert_array_equal(layout.join(parts.tokens, batch), batch.tokens)
  # A part's completions belong to its prompts.
  np.testing.assert_array_equal(parts.prompt_tokens[1], batch.prompt_tokens[1::4])
  np.testing.assert_array_equal(
      parts.tokens[1], batch.tokens.reshape(PROMPTS, GROUP, LENGTH)[1::4].reshape(-1, LENGTH))


@pytest.mark.parametrize('parts, taken', [(1, 8), (4, 2), (3, 8)])  # 8 prompts are no 3 parts
@pytest.mark.parametrize('devices', [1, 2])
def test_log_probs_in_parts_are_those_of_the_whole(parts, taken, devices):
  mesh = None if devices == 1 else sharding.make_mesh('fsdp=2', jax.devices()[:2])
  batch, params, seen = make_batch(), make_params(), []

  def noting(params, frozen, part):
    seen.append(part.prompt_lengths.shape[0])
    return forward(params, frozen, part)
  step = training_step.make_log_prob_step(noting, parts=parts, mesh=mesh)
  found = step(params, training_step.place(batch, mesh))
  assert set(seen) == {taken}
  chex.assert_trees_all_close(
      found, forward(params, {}, jax.tree.map(jnp.asarray, batch))['log_probs'], rtol=1e-6)


def test_missing_input_is_named():
  def needs_values(log_probs, *, values, loss_mask):
    del values, loss_mask
    return log_probs.sum(), {}
  with pytest.raises(ValueError, match='the loss needs values'):
    take_step(needs_values, make_batch())


def test_bound_loss_trains():
  loss = functools.partial(ratio_loss, power=2.0)
  twice, _ = take_step(loss, make_batch())
  once, _ = take_step(ratio_loss, make_batch())
  moved = lambda s: s.params['embed']['embedding'] - make_params()['embed']['embedding']
  np.testing.assert_allclose(moved(twice), 2 * moved(once), rtol=1e-4, atol=1e-6)


def test_pairs_running_statistics_and_keys_reach_the_loss():
  def running_loss(pair, *, loss_state=np.float32(0.0), key, rate=0.5):
    gap = (jnp.where(pair.chosen.loss_mask, pair.chosen.log_probs, 0.0).sum(-1)
           - jnp.where(pair.rejected.loss_mask, pair.rejected.log_probs, 0.0).sum(-1))
    new = rate * loss_state + (1 - rate) * jax.lax.stop_gradient(gap.mean())
    noise = jax.random.normal(key, gap.shape)
    return -jax.nn.log_sigmoid(gap - new + 0.1 * noise).mean(), {'noise': noise[0]}, new
  batch = make_batch()
  optimizer = optax.sgd(0.1)
  results = []
  for micro_batches in (1, 4):
    step = training_step.make_train_step(
        forward, running_loss, optimizer, micro_batches=micro_batches, seed=5)
    state = training_state.init(
        make_params(), optimizer, training_step.initial_loss_state(running_loss))
    seen = []
    for _ in range(2):
      state, metrics = step(state, training_step.place(batch, None))
      seen.append((float(state.loss_state), float(metrics['noise'])))
    results.append(seen)
  assert results[0][0][0] != results[0][1][0] and results[0][0][1] != results[0][1][1]
  np.testing.assert_allclose(results[0], results[1], rtol=1e-5)
  log_probs = forward(make_params(), {}, batch)['log_probs']
  sums = jnp.where(batch.loss_mask, log_probs, 0.0).sum(-1)
  np.testing.assert_allclose(results[0][0][0], 0.5 * (sums[0::2] - sums[1::2]).mean(), rtol=1e-5)


def test_ranked_completions_reach_the_loss_prompt_by_prompt():
  batch = make_batch()
  p, b = len(batch.prompt_lengths), len(batch.tokens)
  batch = batch.replace(inputs={'ranks': np.arange(b, dtype=np.int32)})
  scores = np.arange(b, dtype=np.float32)
  def loss(rewards, *, ranks):
    assert rewards.shape == ranks.shape == (p, b // p)
    return jnp.abs(rewards - ranks).max(), {}
  assert training_step.call(loss, {'scores': scores}, batch)[0] == 0.0


@pytest.mark.parametrize('micro_batches', [1, 4])
def test_a_reference_that_follows_is_scored_in_the_step(micro_batches):
  """Held against a reference kept by hand: the last policy but one, every second step."""
  def loss(log_probs, *, reference_log_probs, loss_mask):
    gap = jnp.where(loss_mask, log_probs - reference_log_probs, 0.0).sum(-1)
    return jnp.square(gap - 1.0).mean(), {'gap': gap.mean()}

  optimizer = optax.sgd(0.1)
  step = training_step.make_train_step(
      forward, loss, optimizer, micro_batches=micro_batches,
      follow=functools.partial(following.synchronised, reference_mixup=0.5,
                               reference_sync_steps=2))
  fixed = training_step.make_train_step(forward, loss, optimizer)
  batch = make_batch()
  state = training_state.init(make_params(), optimizer, follows=True)
  by_hand, reference = training_state.init(make_params(), optimizer), make_params()
  gaps = []
  for number in range(5):
    state, metrics = step(state, training_step.place(batch, None))
    seen = np.asarray(forward(reference, {}, batch)['log_probs'])
    by_hand, wanted = fixed(by_hand, training_step.place(
        batch.replace(inputs={**batch.inputs, 'reference_log_probs': seen}), None))
    if number % 2:
      reference = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, reference, by_hand.params)
    for name in ('loss', 'grad_norm', 'gap'):
      np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-4, atol=1e-6)
    gaps.append(float(metrics['gap']))
  jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5),
               state.reference, reference)
  assert gaps[0] == 0.0 and gaps[1] > gaps[2] > 0.0  # the move halves what was won
