"""What of a loss's derivative needs one token alone: found where it is so, and nowhere else."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax import algorithms
from ptjax import types
from ptjax.losses import modifiers
from ptjax.models import head
from ptjax.training import algorithm
from ptjax.training import per_token
from ptjax.training import step as training_step

B, T = 6, 5
RANDOM = np.random.default_rng(0)
MASK = np.arange(T) < RANDOM.integers(1, T + 1, (B, 1))
WEIGHTS = RANDOM.normal(size=(B, T)).astype(np.float32)
VALUES = {'log_probs': RANDOM.normal(size=(B, T)).astype(np.float32)}


def some(tree, rows=slice(1, 3), places=slice(2, None)):
  return jax.tree.map(lambda x: x[rows, places], tree)


@jax.jit
def nested(x):
  return jax.nn.log_sigmoid(jnp.clip(x, -1.0, 0.5)) + jnp.where(x > 0, x**3, jax.nn.relu(-x))


PER_TOKEN = {
    'calls, choices and bounds': lambda x: nested(x) * WEIGHTS,
    'a sum of data alone': lambda x: jnp.where(MASK, jnp.exp(x), 0.0) / MASK.sum(),
    'a number of data alone, spread out': lambda x: x * jnp.full((B, T), WEIGHTS.max()),
    'data of each row, and of each place': lambda x: jax.lax.mul(
        x, jnp.asarray(WEIGHTS[:, :1])) + jax.lax.mul(x, jnp.asarray(WEIGHTS[:1])),
    'data alone': lambda x: jnp.where(MASK, WEIGHTS, 0.0),
    'its argument': lambda x: x,
    'a mean thrown away': lambda x: (x * 2.0, x.mean())[0],
}


@pytest.mark.parametrize('function', PER_TOKEN.values(), ids=PER_TOKEN)
def test_a_few_positions_are_computed_as_all_are(function):
  named = lambda values: {'slope': function(values['log_probs'])}
  found = per_token.split(named, VALUES)
  expected = named(VALUES)['slope']
  np.testing.assert_array_equal(found(VALUES)['slope'], expected)
  few = found.apply(some(VALUES), some(found.arrays), found.scalars)['slope']
  np.testing.assert_array_equal(few, some(expected))
  assert all(x.shape == (B, T) for x in found.arrays) and not any(map(jnp.ndim, found.scalars))


MIXED = {
    'a sum of log-probs': lambda x: x + x.sum(-1, keepdims=True),
    'a running sum': lambda x: jnp.cumsum(x, -1),
    'one of each row': lambda x: jax.lax.mul(x, x[:, :1]),
    'a shift': lambda x: jnp.roll(x, 1, -1),
    'another row': lambda x: x[::-1],
    'a sorted one': lambda x: jnp.sort(x, -1),
    'within a call': lambda x: jax.jit(lambda x: jnp.where(x > 0, x, x.max()))(x),
    'within a loop': lambda x: jax.lax.fori_loop(0, 2, lambda i, y: y * y.mean(), x),
}


@pytest.mark.parametrize('function', MIXED.values(), ids=MIXED)
def test_what_reads_other_positions_is_found_out(function):
  assert per_token.split(lambda values: {'slope': function(values['log_probs'])}, VALUES) is None


def test_arguments_that_come_too_late():
  values = {**VALUES, 'values': VALUES['log_probs'] + 1.0}
  alone = lambda v: {'slope': v['log_probs'] * WEIGHTS}
  both = lambda v: {'slope': v['log_probs'] * v['values']}
  found = per_token.split(alone, values, mixed=['values'])
  np.testing.assert_array_equal(found(VALUES)['slope'], alone(values)['slope'])
  assert per_token.split(both, values, mixed=['values']) is None
  np.testing.assert_array_equal(per_token.split(both, values)(values)['slope'],
                                both(values)['slope'])


# --- the losses of the table

P, G = 2, 3
PER_TOKEN_ROWS = """
    sft cpt rft raft dft kd seqkd gkd opd sdft sdpo ssd reinforce reinforce_pp reinforce_pp_baseline
    remax gpg opo ppo ppo_dual_clip grpo dr_grpo bnpo dapo sgrpo sgrpo_oxrl rlhf rlaif gdpo
    grpo_process pass_at_k cispo cispo_oxrl sapo nash_md hpt hpt_soft hpt_off hpt_mix luffy
    sft_then_grpo grpo+tis grpo+mis grpo+mask_truncated grpo+entropy_bonus grpo+corrected_kl grpo+kl
    grpo+adaptive_kl grpo+adaptive_reward_kl""".split()
NAMES = (*algorithms.TABLE, *(f'grpo+{modifier}' for modifier in modifiers.MODIFIERS))


def derivative_of(name):
  """(the loss's derivative as the train step asks for it, the model outputs it reads)."""
  bound = algorithm.bind(algorithms.get(name), {})
  loss, outputs = bound.loss, training_step.model_outputs(bound.loss)
  if not outputs or set(outputs) - {*head.DIFFERENTIABLE, 'values'}:
    return None, ()
  rng = np.random.default_rng(1)
  rows = P * G
  pool = {n: rng.normal(size=(rows, T)).astype(np.float32) - 2.0 for n in (
      'old_log_probs', 'reference_log_probs', 'rollout_log_probs', 'teacher_log_probs',
      'old_values', 'returns')}
  pool.update({n: rng.normal(size=rows).astype(np.float32) for n in ('advantages', 'rewards')})
  pool.update({n: rng.uniform(size=rows) < 0.5 for n in (
      'truncated', 'demonstration', 'from_rollouts', 'imitated', 'off_policy', 'labels')})
  pool['desirable_probabilities'] = rng.uniform(size=rows).astype(np.float32)
  names = {*inspect.signature(loss).parameters, 'reference_log_probs'}
  batch = types.TokenBatch(
      prompt_tokens=None, prompt_lengths=np.ones(P, np.int32), tokens=None,
      loss_mask=jnp.asarray(MASK),       on_policy=np.asarray(False),
      inputs={n: jnp.asarray(x) for n, x in pool.items() if n in names})
  if set(training_step.required_inputs(loss)) - {
      *pool, 'loss_mask', 'pair', 'side', 'key', 'loss_state', *outputs}:
    return None, ()
  by_head = [n for n in outputs if n in head.DIFFERENTIABLE]

  def derivative(values):
    def value(own):
      found = {**values, **own}
      return training_step.call(
          loss, found, training_step.with_old_log_probs(batch, values),
          loss_state=training_step.initial_loss_state(loss), key=jax.random.key(0))[0]
    return jax.grad(value)({n: values[n] for n in by_head})
  return derivative, outputs


@pytest.mark.slow
def test_rows_are_told_apart():
  found = set()
  for name in NAMES:
    derivative, outputs = derivative_of(name)
    if derivative is not None:
      shapes = dict.fromkeys(outputs, jax.ShapeDtypeStruct((P * G, T), jnp.float32))
      mixed = set(outputs) - set(head.DIFFERENTIABLE)
      if per_token.split(derivative, shapes, mixed=mixed) is not None:
        found.add(name)
  assert found == set(PER_TOKEN_ROWS)


@pytest.mark.slow
@pytest.mark.parametrize('name', PER_TOKEN_ROWS)
def test_a_per_token_row_does_not_hear_of_other_tokens(name):
  """By the loss itself: what the other tokens are does not move a token's derivative."""
  derivative, outputs = derivative_of(name)
  rng = np.random.default_rng(2)
  draw = lambda: {n: rng.normal(size=(P * G, T)).astype(np.float32) - 2.0 for n in outputs}
  one, other = draw(), draw()
  keep = rng.uniform(size=(P * G, T)) < 0.5
  mix = {n: np.where(keep, one[n], other[n]) for n in outputs}
  whole, changed = derivative(one), derivative(mix)
  for n in whole:
    np.testing.assert_array_equal(np.where(keep, whole[n], 0.0), np.where(keep, changed[n], 0.0))
