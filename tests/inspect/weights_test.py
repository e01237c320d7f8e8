"""The split of every row's weights, and of losses that are a user's own."""

import dataclasses
import functools
import inspect as stdlib_inspect

import jax
from jax import flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax import algorithms
from ptjax import config
from ptjax import inspect
from ptjax import types
from ptjax.inspect import example
from ptjax.inspect import weights
from ptjax.losses import policy_gradient
from ptjax.pieces import likelihood
from ptjax.pieces import reduction

QUICK = ('kd', 'gkd', 'grpo', 'rlhf', 'ppo', 'kl_cov', 'luffy', 'dpo', 'sampo', 'ld_dpo', 'bpo',
         'tpo', 'kto', 'reward_bt')
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
         for name in algorithms.TABLE]


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def shipped_weights(found):
  """-∂loss/∂log_probs [R, T] of the function in the table, called as a trainer would."""
  row, arguments = found.bound.row, found.bound.arguments
  taken = stdlib_inspect.signature(row.loss).parameters
  defaults = {name: value for name, value in row.hyperparameters().items() if name in taken}
  def gradient(name):
    if name not in arguments:
      return None
    return jax.grad(lambda x: row.loss(**{**arguments, **defaults, name: x})[0],
                    allow_int=True)(arguments[name])
  sides = []
  if (pair := gradient('pair')) is not None:
    sides += [(pair.chosen.log_probs, arguments['pair'].chosen.loss_mask),
              (pair.rejected.log_probs, arguments['pair'].rejected.loss_mask)]
  if (side := gradient('side')) is not None:
    sides.append((side.log_probs, arguments['side'].loss_mask))
  for name, mask in (('log_probs', arguments.get('loss_mask')),
                     ('demonstration_log_probs', arguments.get('demonstration_loss_mask')),
                     ('corrupted_log_probs', sides[0][1] if sides else None)):
    if name in arguments:
      sides.append((gradient(name), mask))
  return np.concatenate([-np.where(mask, gradient, 0) for gradient, mask in sides])


def assert_split(found):
  """The parts multiply and add up to the weights, or the row is declared no policy gradient."""
  undeclared = [name for name in found.others if name not in weights.NO_POLICY_GRADIENT]
  assert not undeclared, f'{found.name}: say in weights.NO_POLICY_GRADIENT what {undeclared} are'
  assert found.parts or found.others, f'{found.name}: neither pieces nor a declared term'
  if found.split == weights.NONE:
    assert not found.parts and not found.weights.any()
  else:
    assert found.split in (weights.COMPOSED, weights.PER_RESPONSE), f'{found.name}: {found.split}'
    assert 'rest' not in found.parts, f'{found.name}: the pieces leave something unexplained'
    total = sum(part.weights for part in found.parts.values())
    want = shipped_weights(found)
    assert want.any()
    np.testing.assert_allclose(total, want, rtol=1e-12, atol=1e-15 * np.abs(want).max())


@pytest.mark.parametrize('name', EVERY)
def test_pieces_multiply_to_the_gradient_or_the_row_is_declared(name, taken_apart):
  assert_split(taken_apart(name))


def test_a_row_with_neither_fails():
  def uncomposed(log_probs, *, loss_mask):
    return -reduction.token_mean(jnp.square(log_probs), loss_mask), {}
  def unheard_of(q_logits, *, loss_mask):
    return jnp.where(loss_mask, jnp.square(q_logits), 0.0).sum(), {}
  def idle(log_probs, *, loss_mask):
    return reduction.token_mean(jnp.zeros_like(log_probs), loss_mask), {}
  arrays = {**example.batch(), 'q_logits': example.batch()['log_probs']}
  for loss, message in ((uncomposed, 'no pieces explain'), (unheard_of, 'q_logits'),
                        (idle, 'neither pieces nor')):
    with pytest.raises(AssertionError, match=message):
      assert_split(inspect.inspect_loss(loss, arrays))


# Gates of preference losses: how much of a response's advantage a token gets.
GATES = {'sampo': {0.0, 1.0}, 'ld_dpo': {0.5, 1.0}}
MUTED = {'bpo', 'minor_dpo', 'slic_hf', 'betadpo'}  # may leave a whole response without weight


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name, row in algorithms.TABLE.items() if row.family == 'preference'])
def test_preference_losses_have_one_coefficient_per_response(name, taken_apart):
  found = taken_apart(name)
  part, = found.parts.values()
  assert found.split == weights.PER_RESPONSE and (part.ratio == 1).all()
  for row, mask in zip(part.stable, found.loss_mask):
    gates = set(row[mask].round(12))
    allowed = GATES.get(name, {1.0})
    assert gates <= allowed or (name in MUTED and gates == {0.0}), f'{name}: {gates}'
  responses = {'chosen', 'rejected', 'responses'} & set(found.sides)
  rows = len(example.CHOSEN) if 'chosen' in responses else example.B
  np.testing.assert_allclose(part.reduction[found.loss_mask], 1 / rows)


def test_dpo_advantages_are_the_closed_form(taken_apart):
  found = taken_apart('dpo')
  pair, part = found.bound.arguments['pair'], found.parts['policy']
  s = [np.where(side.loss_mask, side.log_probs - side.reference_log_probs, 0).sum(1)
       for side in (pair.chosen, pair.rejected)]
  A = 0.1 / (1 + np.exp(0.1 * (s[0] - s[1])))
  want = np.concatenate([A, -A])[:, None]
  np.testing.assert_allclose(part.advantages, np.where(found.loss_mask, want, 0), rtol=1e-12)


def test_grpo_pieces_are_the_textbook_ones(taken_apart):
  found, arrays = taken_apart('grpo'), example.batch()
  part, mask = found.parts['policy'], example.batch()['loss_mask']
  groups = arrays['rewards'].reshape(-1, example.G)
  A = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
  A = np.broadcast_to(A.reshape(-1, 1), mask.shape)
  ratio = np.exp(arrays['log_probs'] - arrays['old_log_probs'])
  stopped = ((A > 0) & (ratio > 1.2)) | ((A < 0) & (ratio < 0.8))
  lengths = np.broadcast_to(mask.sum(1, keepdims=True), mask.shape)
  for got, want in ((part.ratio, ratio), (part.advantages, A), (part.stable, ~stopped),
                    (part.reduction, 1 / (example.B * lengths))):
    np.testing.assert_allclose(got[mask], want[mask], rtol=1e-9, atol=1e-12)
  assert found.summary['policy/masked_fraction'] == pytest.approx(stopped[mask].mean())
  on = found.weights[mask]
  assert found.summary['weights/effective_sample_size'] == pytest.approx(
      np.abs(on).sum() ** 2 / (on.size * (on ** 2).sum()))
  assert found.summary['policy/ratio_effective_sample_size'] == pytest.approx(
      ratio[mask].sum() ** 2 / (mask.sum() * (ratio[mask] ** 2).sum()))


def test_coefficients_are_part_of_the_reduction(taken_apart):
  """kd's NLL weighs a; rlhf's KL term comes beside the clipped surrogate."""
  part, = taken_apart('kd').parts.values()
  tokens = part.tokens.sum()
  np.testing.assert_allclose(part.reduction[part.tokens], 0.5 / tokens)
  assert list(taken_apart('rlhf').parts) == ['policy', 'kl']


def test_parts_of_a_hybrid(taken_apart):
  found = taken_apart('luffy')
  demonstrations = example.DEMONSTRATION[:, None] & found.loss_mask
  assert list(found.parts) == ['rollouts', 'off_policy']
  assert not (found.parts['rollouts'].tokens & demonstrations).any()
  assert (found.parts['off_policy'].tokens == demonstrations).all()
  assert found.others == {'entropy': weights.NO_POLICY_GRADIENT['entropy']}
  # Off the parameters the parts lie on different rows; in them they oppose each other.
  assert 0.05 < abs(found.summary['cosine/rollouts,off_policy']) < 1
  alone = inspect.inspect_loss('luffy', example.batch())
  assert alone.summary['cosine/rollouts,off_policy'] == 0


def test_pull_back_is_the_gradient_by_the_parameters():
  arrays = example.batch()
  loss = lambda outputs: policy_gradient.reinforce_loss(
      outputs['log_probs'], advantages=arrays['rewards'], loss_mask=arrays['loss_mask'])[0]
  params = example.parameters()
  want = jax.grad(lambda p: loss(example.outputs(p)))(params)
  want = np.asarray(flatten_util.ravel_pytree(want)[0])
  gradient = jax.grad(loss)({'log_probs': jnp.asarray(arrays['log_probs'])})
  np.testing.assert_allclose(example.pull_back(gradient), want, atol=1e-15)


# Losses of a user's own.

def textbook(log_probs, *, old_log_probs, advantages, loss_mask, clip=0.2):
  """PPO's objective written down, a mean per sequence."""
  ratio = jnp.exp(jnp.where(loss_mask, log_probs - old_log_probs, 0.0))
  A = advantages[:, None]
  value = jnp.minimum(ratio * A, jnp.clip(ratio, 1 - clip, 1 + clip) * A)
  return -(jnp.where(loss_mask, value, 0.0).sum(1) / loss_mask.sum(1)).mean()


def test_textbook_loss_is_split_by_inference(taken_apart):
  found = inspect.inspect_loss(textbook, example.batch())
  assert found.split == weights.INFERRED and list(found.parts) == ['policy']
  part, grpo = found.parts['policy'], taken_apart('grpo').parts['policy']
  for piece in ('ratio', 'advantages', 'reduction'):
    np.testing.assert_allclose(np.where(found.loss_mask, getattr(part, piece), 0),
                               np.where(found.loss_mask, getattr(grpo, piece), 0), rtol=1e-9)
  pushed = grpo.advantages != 0  # a token without advantage shows no mask
  np.testing.assert_allclose(part.stable[pushed], grpo.stable[pushed], rtol=1e-9)
  np.testing.assert_allclose(part.weights, found.weights)


def test_unexplained_weights_are_kept_whole():
  def odd(log_probs, *, loss_mask):
    return -reduction.token_mean(jnp.sin(3 * log_probs), loss_mask), {}
  found = inspect.inspect_loss(odd, example.batch())
  assert found.split == weights.UNEXPLAINED
  np.testing.assert_allclose(found.parts['policy'].weights, found.weights, rtol=1e-12)


def test_what_is_not_composed_is_the_rest():
  def mixed(log_probs, *, advantages, loss_mask):
    push, _ = likelihood.weighted_loss(
        log_probs, loss_mask, advantages=advantages, reduce=reduction.token_mean)
    return push + 0.1 * reduction.token_mean(jnp.square(log_probs), loss_mask), {}
  found = inspect.inspect_loss(mixed, example.batch())
  assert list(found.parts) == ['policy', 'rest']
  mask = found.loss_mask
  np.testing.assert_allclose(found.parts['rest'].weights[mask],
                             -0.2 * found.log_probs[mask] / mask.sum(), rtol=1e-9)


def test_a_batch_of_the_trainer_and_a_bound_function():
  arrays = example.batch()
  batch = types.TokenBatch(
      prompt_tokens=None, prompt_lengths=None, tokens=None, loss_mask=arrays['loss_mask'],
      on_policy=None, inputs={n: arrays[n] for n in ('log_probs', 'old_log_probs', 'rewards')})
  batch = batch.replace(inputs={**batch.inputs, 'advantages': arrays['rewards']})
  loss = functools.partial(policy_gradient.dapo_loss, clip_high=0.5)
  found = inspect.inspect_loss(loss, batch)
  want = inspect.inspect_loss('dapo', batch, clip_high=0.5)
  assert found.weights.any() and (found.weights == want.weights).all()
  given = found.parts['policy'].advantages[:, 0]
  np.testing.assert_array_equal(given, arrays['rewards'])  # not estimated anew


def test_file_and_row(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('from ptjax.losses import imitation\nmy_loss = imitation.sft_loss\n')
  for loss in (f'{path}:my_loss', algorithms.get('cpt')):
    found = inspect.inspect_loss(loss, example.batch())
    np.testing.assert_allclose(found.weights[found.loss_mask], 1 / found.loss_mask.sum())


def test_padding_may_hold_anything():
  arrays = example.batch()
  poison = {n: np.where(arrays['loss_mask'], arrays[n], np.nan)
            for n in ('log_probs', 'old_log_probs')}
  clean, poisoned = (inspect.inspect_loss('grpo', {**arrays, **p}) for p in ({}, poison))
  assert clean.summary == poisoned.summary
  np.testing.assert_array_equal(clean.weights, poisoned.weights)


def test_float32():
  with jax.enable_x64(False):
    found = inspect.inspect_loss('vespo', example.batch())
    assert found.weights.dtype == np.float32 and list(found.parts) == ['policy']


def test_equal_rewards_are_not_taken_for_no_policy_gradient():
  arrays = {**example.batch(), 'rewards': np.ones(example.B)}
  found = inspect.inspect_loss('grpo', arrays)
  assert found.split == weights.COMPOSED and not found.weights.any()
  assert found.summary['policy/masked_fraction'] == 0 and 'heaviest' not in found.table()


def test_table_names_the_heaviest_tokens(taken_apart):
  text = taken_apart('grpo').table(heaviest=2)
  assert text.startswith('grpo: composed of pieces')
  rows = text.splitlines()[-2:]
  found = taken_apart('grpo')
  i, t = np.unravel_index(np.abs(found.weights).argmax(), found.weights.shape)
  assert rows[0].split()[:3] == [str(i), str(t), repr(example.tokens()['log_probs'][i][t])]
  assert float(rows[0].split()[-1]) == pytest.approx(found.weights[i, t], rel=1e-3)
  assert 'rejected 5' in taken_apart('bpo').table()
  heads = taken_apart('reward_bt').table()
  assert "gradient through chosen_rewards: a reward model's head" in heads


def test_user_errors_are_named():
  arrays = example.batch()
  with pytest.raises(config.UserError, match="algo 'grop' is unknown; did you mean"):
    inspect.inspect_loss('grop', arrays)
  with pytest.raises(config.UserError, match='clip_hi: grpo has no such hyperparameter'):
    inspect.inspect_loss('grpo', arrays, clip_hi=0.3)
  without = {n: x for n, x in arrays.items() if n != 'old_log_probs'}
  with pytest.raises(config.UserError, match='grpo needs old_log_probs, but the batch holds only'):
    inspect.inspect_loss('grpo', without)
  without = {n: x for n, x in arrays.items() if n != 'rewards'}
  with pytest.raises(config.UserError, match='the advantage of grpo needs rewards'):
    inspect.inspect_loss('grpo', without)


def test_inspections_are_frozen(taken_apart):
  with pytest.raises(dataclasses.FrozenInstanceError):
    taken_apart('dpo').name = 'other'
