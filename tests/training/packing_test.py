"""Packed rows: every trained token once, few shapes; outputs, losses and gradients as unpacked."""

import dataclasses
import functools
import pathlib
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ptjax import algorithms
from ptjax import sharding
from ptjax import types
from ptjax.training import algorithm as binding
from ptjax.training import forward as training_forward
from ptjax.training import layout
from ptjax.training import packing
from ptjax.training import state as training_state
from ptjax.training import step as training_step

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'models'))
import tiny_models

P, S, G, T, V = 4, 5, 4, 12, 19
LLAMA = tiny_models.LLAMA
CONFIGS = {'llama': LLAMA, 'gpt2': tiny_models.GPT2,
           'gemma': dataclasses.replace(tiny_models.GEMMA, logit_softcap=4.0),
           'sliding': dataclasses.replace(LLAMA, layer_windows=(3, 3))}


def make_batch(seed=0, **inputs):
  """Completions of 1 to T tokens; a group of the longest, which fits no row, and empty rows."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, T + 1, P * G)
  lengths[:G] = T, 1, T, T - 1
  mask = np.arange(T) < lengths[:, None]
  mask[G + 1] = False
  mask[2 * G:3 * G] = False  # nothing of this prompt trains
  mask[-1, 1:3] = False  # tokens that are only read
  floats = lambda *shape: rng.normal(size=shape).astype(np.float32)
  batch = types.TokenBatch(
      prompt_tokens=rng.integers(0, V, (P, S)).astype(np.int32),
      prompt_lengths=rng.integers(1, S + 1, P).astype(np.int32),
      tokens=rng.integers(0, V, (P * G, T)).astype(np.int32), loss_mask=mask,
      on_policy=np.asarray(False),
      inputs={'advantages': floats(P * G), 'rollout_log_probs': -3 + 0.3 * floats(P * G, T),
              'reference_log_probs': -3 + 0.3 * floats(P * G, T), **inputs})
  batch.prompt_lengths[0] = S
  return batch


def pack(batch, multiple=1):
  return packing.Packer(width=16, multiple=multiple, always=True)(batch)


# --- the layout


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('multiple', [1, 4])
def test_every_trained_token_stands_once_behind_its_prompt(seed, multiple):
  batch = make_batch(seed)
  packed = pack(batch, multiple).packed
  rows, laid = packed.rows, packed.rows.packing
  assert len(rows.tokens) % multiple == 0
  found = packed.places[rows.loss_mask]
  np.testing.assert_array_equal(np.sort(found), np.flatnonzero(batch.loss_mask))
  np.testing.assert_array_equal(rows.tokens[rows.loss_mask], batch.tokens.reshape(-1)[found])
  assert (packed.places[~rows.loss_mask] == batch.tokens.size).all()
  for r, m in zip(*np.nonzero(rows.loss_mask)):
    i, t = divmod(int(packed.places[r, m]), T)
    at = laid.predictors[r, m]
    segment = laid.segments[r] == laid.segments[r, at]
    branch = laid.branches[r, at + 1] if t else None
    # What the predicting token sees, read from the left, is the prompt and the tokens before.
    seen = segment & (np.arange(len(segment)) <= at) & (
        (laid.branches[r] == 0) | (t > 0) & (laid.branches[r] == laid.branches[r, at]))
    prompt = batch.prompt_tokens[i // G, :batch.prompt_lengths[i // G]]
    expected = np.concatenate([prompt, batch.tokens[i, :t]])
    np.testing.assert_array_equal(rows.prompt_tokens[r, seen], expected)
    np.testing.assert_array_equal(laid.positions[r, seen], np.arange(len(expected)))
    assert branch != 0


def test_a_group_too_long_for_a_row_stands_in_two():
  narrow = packing.Packer(width=1, always=True)  # to which attention over long rows is dear
  laid = narrow(make_batch()).packed
  rows_of_first = {r for r, m in zip(*np.nonzero(laid.rows.loss_mask))
                   if laid.places[r, m] < G * T}
  assert len(rows_of_first) > 1


def geometric(rng, *, prompts=8, group=8, prompt=32, longest=512, mean=64):
  """A batch as a sampler draws it that stops at any token with the same probability."""
  lengths = np.minimum(rng.geometric(1 / mean, prompts * group), longest)
  return types.TokenBatch(
      prompt_tokens=np.ones((prompts, prompt), np.int32),
      prompt_lengths=np.full(prompts, prompt, np.int32),
      tokens=np.ones((prompts * group, longest), np.int32),
      loss_mask=np.arange(longest) < lengths[:, None], on_policy=np.asarray(True), inputs={})


@pytest.mark.parametrize('prompt', [32, 256])
def test_fifty_batches_of_any_lengths_take_few_shapes_and_little_room(prompt):
  rng, packer, used, longest, new = np.random.default_rng(0), None, 0, 0, []
  packer = packing.Packer(width=256)
  for step in range(50):
    batch, known = geometric(rng, prompt=prompt), len(packer.shapes)
    rows = packer(batch).packed.rows.prompt_tokens
    new += [step] * (len(packer.shapes) - known)
    used += rows.size
    longest += 8 * prompt + 64 * batch.loss_mask.sum(1).max()
  # Of some 20 shapes that would each be the cheapest of some batch.
  assert len(packer.shapes) <= 3 and len([step for step in new if step > 10]) <= 1
  assert longest > (3.2 if prompt == 32 else 2.2) * used  # padded to each batch's own longest


def test_what_is_packed_follows_from_the_batch_and_the_shapes_alone():
  rng = np.random.default_rng(1)
  batches = [geometric(rng) for _ in range(6)]
  straight, first, resumed = (packing.Packer(width=256) for _ in range(3))
  expected = [straight(batch) for batch in batches]
  for batch in batches[:3]:
    first(batch)
  resumed.shapes = [tuple(shape) for shape in first.shapes]
  for batch, other in zip(batches[3:], expected[3:]):
    jax.tree.map(np.testing.assert_array_equal, resumed(batch), other)


def test_a_data_sets_batches_take_two_shapes_and_strangers_a_third():
  rng = np.random.default_rng(0)
  make = lambda: geometric(rng, group=2)
  batches, later, full = [make() for _ in range(40)], [make() for _ in range(200)], make()
  widest = full.replace(loss_mask=np.ones_like(full.loss_mask))
  packer = packing.Packer(width=256, always=True)
  packer.settle(batches, widest)
  shapes = list(packer.shapes)
  shape_of = lambda batch: packer(batch).packed.rows.prompt_tokens.shape
  usual, every, most = (shape[:2] for shape in shapes)
  found = [shape_of(batch) for batch in batches]
  assert set(found) <= {usual, every} and found.count(usual) >= 36
  assert shape_of(widest) == most and np.prod(most) > 3 * np.prod(every)
  found = [shape_of(batch) for batch in later]
  assert set(found) <= {usual, every, most} and found.count(most) <= 4
  assert packer.shapes == shapes  # nothing was learnt from them
  tokens = np.mean([int(batch.loss_mask.sum()) for batch in batches]) + 8 * 32
  assert np.prod(usual) < 1.7 * tokens  # room for nine batches in ten


def test_rows_without_padding_are_left_as_they_are():
  rng = np.random.default_rng(0)
  full = geometric(rng, longest=64, mean=10**6)
  assert packing.Packer(width=256)(full).packed is None
  assert packing.Packer(width=256, always=True)(full).packed is not None
  assert packing.Packer(width=256)(geometric(rng)).packed is not None


def test_a_batch_that_trains_nothing_is_packed_too():
  batch = make_batch()
  batch = batch.replace(loss_mask=np.zeros_like(batch.loss_mask))
  packed = pack(batch, 2).packed
  assert len(packed.rows.tokens) == 2 and (packed.places == P * G * T).all()


# --- outputs and gradients


@functools.partial(jax.jit, static_argnums=0)
def _outputs(config, params, batch):
  """(outputs at [B, T], gradient of a function of every trained log-prob and entropy)."""
  forward = training_forward.make_forward(
      config, outputs=('log_probs', 'entropy', 'sum_squares'), temperature=0.8)
  weights = jnp.cos(jnp.arange(P * G * T)).reshape(P * G, T) + 1.5

  def loss(params):
    out = layout.put_back(forward(params, {}, layout.rows_of(batch)), batch)
    return jnp.sum(weights * out['log_probs'] + weights**2 * out['entropy'],
                   where=batch.loss_mask), out
  gradient, out = jax.grad(loss, has_aux=True)(params)
  return out, gradient


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_packed_outputs_and_gradients_equal_those_of_plain_rows(config):
  batch = make_batch()
  out, gradient = _outputs(config, tiny_models.params(config), pack(batch))
  expected, expected_gradient = _outputs(config, tiny_models.params(config), batch)
  for name in ('log_probs', 'entropy', 'sum_squares'):
    np.testing.assert_allclose(np.asarray(out[name])[batch.loss_mask],
                               np.asarray(expected[name])[batch.loss_mask], rtol=1e-6, atol=1e-5)
    assert (np.asarray(out[name])[~batch.loss_mask] == 0.0).all()
  np.testing.assert_array_equal(np.asarray(out['likeliest'])[batch.loss_mask],
                                np.asarray(expected['likeliest'])[batch.loss_mask])
  tiny_models.assert_same_gradient(gradient, expected_gradient)
  assert np.asarray(out['log_probs'])[batch.loss_mask].std() > 0.3  # there is something to see


# --- whole steps


def take_step(batch, *, algo, critic=None, micro_batches=1, mesh=None, by_autodiff=False,
              part_tokens=None, **hyperparameters):
  """(metrics, parameters after a step of plain descent).

  With `by_autodiff` the head is not told the loss's derivative beforehand.
  """
  bound = binding.bind(algorithms.get(algo), hyperparameters)
  params = jax.tree.map(jnp.asarray, tiny_models.params(LLAMA, critic=critic))
  optimizer, shardings = optax.sgd(1.0), None
  state = training_state.init(params, optimizer)
  if mesh is not None:
    shardings = training_state.shardings(mesh, params, optimizer)
    state = jax.device_put(state, shardings)
  forward = training_forward.make_forward(
      LLAMA, outputs=training_step.model_outputs(bound.loss))
  step = training_step.make_train_step(
      (lambda params, frozen, rows: forward(params, frozen, rows)) if by_autodiff else forward,
      bound.loss, optimizer, micro_batches=micro_batches, mesh=mesh, state_sharding=shardings,
      part_tokens=part_tokens)
  state, metrics = step(state, training_step.place(batch, mesh))
  return sharding.fetch((metrics, state.params))


def _of_ppo():
  floats = np.random.default_rng(7).normal(size=(3, P * G, T)).astype(np.float32)
  return dict(zip(('advantages', 'returns', 'old_values'), floats))


def _of_demonstrations():
  last = np.arange(P * G) % G == G - 1
  return {'demonstration': last, 'imitated': last & (np.arange(P * G) < 2 * G),
          'from_rollouts': ~last}


def _of_pairs():
  return {'reference_log_probs': np.random.default_rng(7).normal(
      -2.0, 1.0, size=(P * G, T)).astype(np.float32)}


CASES = {
    'dpo': {'inputs': _of_pairs}, 'simpo': {},
    'grpo': {}, 'gspo': {},
    'grpo to its reference': {'inputs': _of_pairs, 'hyperparameters': {'kl_coefficient': 0.04}},
    'ppo head': {'critic': 'head', 'inputs': _of_ppo},
    'ppo model': {'critic': 'model', 'inputs': _of_ppo},
    'luffy': {'inputs': _of_demonstrations}, 'hpt': {'inputs': _of_demonstrations}}


@functools.cache
def _plain_step(name):
  case = CASES[name]
  batch = make_batch(**case.get('inputs', dict)())
  return batch, _step_of(name, batch, by_autodiff=True)


def _step_of(name, batch, **options):
  case = CASES[name]
  return take_step(batch, algo=name.partition(' ')[0], critic=case.get('critic'),
                   **case.get('hyperparameters', {}), **options)


def _assert_same_step(found, expected):
  tiny_models.assert_same_gradient(found[1], expected[1])
  chex.assert_trees_all_close(found[0], expected[0], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('name', CASES)
def test_a_packed_step_is_the_same_step(name):
  batch, expected = _plain_step(name)
  found = _step_of(name, pack(batch))
  _assert_same_step(found, expected)
  before = tiny_models.params(LLAMA, critic=CASES[name].get('critic'))
  assert any(np.abs(a - b).max() > 1e-2 for a, b in zip(
      jax.tree.leaves(found[1]), jax.tree.leaves(before)))


@pytest.mark.parametrize('mesh', [None, '', 'data=2,fsdp=2,tensor=2'])
@pytest.mark.parametrize('name, known', [
    ('grpo to its reference', True), ('ppo head', True), ('gspo', False)])
def test_what_the_head_is_told_on_any_mesh(name, known, mesh, monkeypatch):
  told, of = [], training_step.head_slope
  monkeypatch.setattr(training_step, 'head_slope',
                      lambda *args, **rest: told.append(of(*args, **rest)) or told[-1])
  mesh = mesh if mesh is None else sharding.make_mesh(mesh, jax.devices()[:1 if not mesh else 8])
  batch, _ = _plain_step(name)
  _step_of(name, pack(batch, 4), mesh=mesh)
  assert [slope is not None for slope in told] == [known]


@pytest.mark.parametrize('name', ['grpo to its reference', 'ppo head', 'gspo'])
@pytest.mark.parametrize('mesh', [None, 'data=2,fsdp=2,tensor=2'])
@pytest.mark.parametrize('micro_batches', [1, 2])
def test_micro_batches_and_devices_split_packed_rows(name, mesh, micro_batches):
  """Whichever way the gradient takes: of each token alone, that and a critic's, of sequences."""
  batch, expected = _plain_step(name)
  mesh = None if mesh is None else sharding.make_mesh(mesh)
  packed = pack(batch, micro_batches * (1 if mesh is None else sharding.batch_size(mesh)))
  _assert_same_step(_step_of(name, packed, micro_batches=micro_batches, mesh=mesh), expected)


@pytest.mark.parametrize('name', ['grpo to its reference', 'ppo head'])
@pytest.mark.parametrize('micro_batches', [1, 2])
def test_a_plain_step_whose_head_knows_the_slope_is_the_same_step(name, micro_batches):
  batch, expected = _plain_step(name)
  _assert_same_step(_step_of(name, batch, micro_batches=micro_batches), expected)


@pytest.mark.parametrize('parts', [1, 2])
def test_a_scoring_pass_gives_one_row_per_completion(parts):
  batch = make_batch()
  score = training_step.make_log_prob_step(training_forward.make_forward(LLAMA), parts=parts)
  plain, packed = (score(tiny_models.params(LLAMA), some) for some in (batch, pack(batch, parts)))
  np.testing.assert_allclose(np.asarray(packed)[batch.loss_mask],
                             np.asarray(plain)[batch.loss_mask], rtol=1e-6, atol=1e-5)
  assert packed.shape == batch.tokens.shape and (packed[~batch.loss_mask] == 0.0).all()


@pytest.mark.parametrize('name', ['grpo to its reference', 'gspo'])
@pytest.mark.parametrize('packed', [False, True])
def test_parts_of_few_tokens_change_nothing(name, packed):
  batch, expected = _plain_step(name)
  batch = pack(batch, 2) if packed else batch
  assert layout.even_parts(layout.rows_of(batch), 1, 16) > 1
  _assert_same_step(_step_of(name, batch, part_tokens=16), expected)


def test_parts_are_even_and_no_smaller_than_asked_for():
  batch = make_batch()  # four prompts of 5 + 4 * 12 tokens
  assert layout.even_parts(batch, 1, 53) == 4 and layout.even_parts(batch, 1, 54) == 2
  assert layout.even_parts(batch, 1, 1000) == 1 and layout.even_parts(batch, 2, 1000) == 2
  assert layout.even_parts(pack(batch).packed.rows, 1, 1) == len(pack(batch).packed.rows.tokens)
