"""Every row of the table through the train step: no split and no mesh changes its update.

Compiling a train step per row, split and mesh would take minutes, so one step trains many rows at
once, each on parameters of its own: `[B, T]` becomes R blocks of T tokens, block r belongs to row
r, and the loss is the sum of the rows' losses on their blocks. The gradient of row r's parameters
is that of its loss alone.
"""

import functools
import inspect
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ptjax import algorithms
from ptjax import sharding
from ptjax import types
from ptjax.losses import modifiers
from ptjax.training import algorithm
from ptjax.training import state as training_state
from ptjax.training import step as training_step

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import bigram

VOCAB, P, G, T = 8, 8, 6, 4
B = P * G

# Losses that no sum over rows or pairs gives; these take every split on every mesh.
WHOLE_BATCH = (
    'kto', 'bco', 'kto_oxrl', 'mpo', 'aot', 'aot_unpaired', 'drdpo', 'betadpo', 'betadpo_oxrl',
    'alpha_dpo', 'sampo', 'clip_cov', 'kl_cov', 'grpo+top_entropy', 'grpo+adaptive_entropy')

# Makes each term count where the default switches it off, or selects nothing in so few tokens.
OVERRIDES = {'kl_coefficient': 0.1, 'entropy_coefficient': 0.1, 'fraction': 0.3,
             'covariance_low': 0.0, 'entropy_target': 9.0, 'drift_threshold': 0.0}


def make_inputs():
  """Every array a loss may name beside the model's outputs, and the mask [B, T]."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  uniform = lambda *shape: rng.uniform(size=shape).astype(np.float32)
  log_probs = lambda *shape: -3.0 * uniform(*shape)
  mask = np.arange(T) < rng.integers(1, T + 1, (B, 1))
  demonstration = np.arange(B) % G == G - 1
  pairs = B // 2
  return mask, {
      'old_log_probs': log_probs(B, T), 'reference_log_probs': log_probs(B, T),
      'rollout_log_probs': log_probs(B, T), 'teacher_log_probs': log_probs(B, T),
      'old_values': normal(B, T), 'returns': normal(B, T),
      'advantages': normal(B), 'rewards': uniform(B), 'truncated': uniform(B) < 0.3,
      'demonstration': demonstration, 'from_rollouts': ~demonstration & (uniform(B) < 0.7),
      'imitated': demonstration & (np.arange(B) < B // 2),
      'off_policy': demonstration & (np.arange(B) > B // 2 + G),
      'labels': uniform(B) < 0.5, 'desirable_probabilities': uniform(B),
      'step_mask': mask & (uniform(B, T) < 0.6), 'step_labels': uniform(B, T) < 0.5,
      'ranks': rng.permuted(np.tile(np.arange(G, dtype=np.int32), (P, 1)), axis=1),
      # One number or one sequence per pair.
      'chosen_scores': 1.0 + uniform(pairs), 'rejected_scores': uniform(pairs),
      'chosen_win_probabilities': uniform(pairs), 'rejected_win_probabilities': uniform(pairs),
      'reference_drew_chosen': uniform(pairs) < 0.5, 'margins': uniform(pairs),
      'corrupted_log_probs': log_probs(pairs, T),
      'corrupted_reference_log_probs': log_probs(pairs, T)}


LOSS_MASK, INPUTS = make_inputs()
TEACHER = np.random.default_rng(3).normal(size=(VOCAB, VOCAB)).astype(np.float32)
BLOCKED = ('old_log_probs', 'rollout_log_probs')  # the step itself reads these beside the outputs
ALIASES = {n: n if n in BLOCKED else f'all_{n}' for n in INPUTS}  # of the joint loss, to which the
# step then does nothing of what it does to one that names pairs or ranks
NAMES = (*algorithms.TABLE, *(f'grpo+{modifier}' for modifier in modifiers.MODIFIERS))


def test_the_whole_batch_losses_are_rows():
  assert set(WHOLE_BATCH) <= set(NAMES)


@functools.lru_cache(None)
def bound_rows(names):
  rows = [algorithms.get(name) for name in names]
  return [algorithm.bind(row, {k: v for k, v in OVERRIDES.items()
                               if k in row.hyperparameters()}) for row in rows]


def inputs_for(loss, inputs):
  """The inputs a door would make for this loss."""
  taken = {*inspect.signature(loss).parameters, 'reference_log_probs'}
  outputs = training_step.model_outputs(loss)
  chosen = {n: x for n, x in inputs.items() if n in taken}
  if 'scores' in outputs:  # whose rewards the head gives
    chosen.pop('rewards', None)
  if 'mismatched_log_probs' in taken:  # rows are own, mismatched, own, ...
    chosen['labels'] = chosen['labels'][::2]
  return chosen


def joint_loss(names):
  """The sum of the rows' losses, each on its block of tokens."""
  def loss(*, loss_mask, loss_state, key, **arrays):
    total, metrics, states = 0.0, {}, {}
    for i, (name, bound) in enumerate(zip(names, bound_rows(names))):
      block = slice(i * T, (i + 1) * T)
      inputs = {n: arrays[alias][:, block] if n in BLOCKED else arrays[alias]
                for n, alias in ALIASES.items()}
      batch = types.TokenBatch(
          prompt_tokens=None, prompt_lengths=np.ones(P, np.int32), tokens=None, on_policy=None,
          loss_mask=loss_mask[:, block], inputs=inputs_for(bound.loss, inputs))
      outputs = {n: arrays[n][:, i if n == 'scores' else block]
                 for n in training_step.model_outputs(bound.loss)}
      value, _, states[name] = training_step.call(
          bound.loss, outputs, batch, loss_state=loss_state[name], key=key)
      total, metrics[f'value/{name}'] = total + value, value
    return total, metrics, states
  of_model = (name for output, read_by in training_step.MODEL_OUTPUTS.items()
              for name in (output, read_by[-1]) if name != 'demonstration_log_probs')
  loss.__signature__ = inspect.Signature([
      inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY)
      for n in dict.fromkeys(('loss_mask', 'loss_state', 'key', *of_model, *ALIASES.values()))])
  return loss


def make_forward(names):
  """One bigram model per block, of which every output is made."""
  measures = {i: bound.divergence for i, bound in enumerate(bound_rows(names)) if bound.divergence}
  def outputs_of(logits, tokens):
    return {**bigram.outputs(logits, tokens),
            'sum_squares': jax.nn.logsumexp(2.0 * jax.nn.log_softmax(logits), axis=-1),
            'values': logits[..., 0], 'step_logits': logits[..., :2],
            'scores': logits[..., 1].sum(1, keepdims=True)}
  def forward(params, frozen, batch):
    del frozen
    models = params['embed']['embedding']  # [R, V, V]
    first = batch.tokens[:, :T]  # all blocks hold the same tokens
    previous = bigram.previous_tokens(batch.prompt_tokens, batch.prompt_lengths, first)
    found = jax.vmap(lambda model: outputs_of(model[previous], first), out_axes=1)(models)
    teacher, none = jnp.asarray(TEACHER)[previous], jnp.zeros(first.shape)
    found['divergence'] = jnp.stack([
        measures[i](models[i][previous], teacher) if i in measures else none
        for i in range(len(names))], axis=1)
    return {n: x.reshape(len(x), -1, *x.shape[3:]) for n, x in found.items()}
  return forward


def normalized_descent():
  """Steps of length 1/2 per row, so that no row's updates drown in its parameters' rounding.

  The state keeps the gradient norms, [R].
  """
  def update(grads, _, params=None):
    del params
    norms = jax.tree.map(lambda g: jnp.sqrt(jnp.square(g).sum((1, 2), keepdims=True)), grads)
    steps = jax.tree.map(lambda g, n: -0.5 * g / jnp.maximum(n, 1e-30), grads, norms)
    return steps, jax.tree.map(lambda n: n[:, 0, 0], norms)
  return optax.GradientTransformation(
      lambda params: jax.tree.map(lambda p: jnp.zeros(p.shape[0]), params), update)


def make_batch(blocks):
  rng = np.random.default_rng(1)
  tile = lambda x: np.tile(x, (1, blocks))
  return types.TokenBatch(
      prompt_tokens=rng.integers(0, VOCAB, (P, 3)).astype(np.int32),
      prompt_lengths=rng.integers(1, 4, P).astype(np.int32),
      tokens=tile(rng.integers(0, VOCAB, (B, T)).astype(np.int32)),
      loss_mask=tile(LOSS_MASK), on_policy=np.asarray(False),
      inputs={ALIASES[n]: tile(x) if n in BLOCKED else x for n, x in INPUTS.items()})


@functools.lru_cache(None)
def trained(names, micro_batches, on_mesh):
  """Two steps of all rows at once; what each made of each row, `[{row: {what: array}}] * 2`."""
  optimizer, mesh, shardings = normalized_descent(), None, None
  params = {'embed': {'embedding': np.random.default_rng(2).normal(
      size=(len(names), VOCAB, VOCAB)).astype(np.float32)}}
  start = {bound.row.name: training_step.initial_loss_state(bound.loss)
           for bound in bound_rows(names)}
  state = training_state.init(jax.tree.map(jnp.asarray, params), optimizer, start)
  if on_mesh:
    mesh = sharding.make_mesh('data=2,fsdp=2,tensor=2')
    shardings = training_state.shardings(mesh, params, optimizer, start)
    state = jax.device_put(state, shardings)
  step = training_step.make_train_step(
      make_forward(names), joint_loss(names), optimizer, micro_batches=micro_batches, mesh=mesh,
      state_sharding=shardings)
  steps = []
  for _ in range(2):
    state, metrics = step(state, training_step.place(make_batch(len(names)), mesh))
    found, metrics = sharding.fetch((state, metrics))
    models, norms = found.params['embed']['embedding'], found.opt_state['embed']['embedding']
    steps.append({name: {
        'parameters': models[i], 'gradient norm': norms[i], 'value': metrics[f'value/{name}'],
        'state': found.loss_state[name]} for i, name in enumerate(names)})
  return steps


def assert_same_updates(names, micro_batches, on_mesh):
  want, got = (trained(names, *how) for how in ((1, False), (micro_batches, on_mesh)))
  # Sums of a few dozen float32 in another order; parameters are of order 1.
  close = functools.partial(np.allclose, rtol=1e-5, atol=5e-6)
  differ = {(name, what) for before, after in zip(want, got) for name in names
            for what in before[name]
            if not jax.tree.all(jax.tree.map(close, after[name][what], before[name][what]))}
  assert not differ


SPLITS = [(2, False), (4, False), (1, True), (2, True), (4, True)]
IDS = [f'{parts} parts, {8 if on_mesh else 1} devices' for parts, on_mesh in SPLITS]


@pytest.mark.parametrize('split', [SPLITS[1], SPLITS[3]], ids=[IDS[1], IDS[3]])
def test_whole_batch_losses_do_not_depend_on_the_split(split):
  assert_same_updates(WHOLE_BATCH, *split)


@pytest.mark.slow
@pytest.mark.parametrize('split', SPLITS, ids=IDS)
def test_no_loss_depends_on_the_split(split):
  assert_same_updates(NAMES, *split)


@pytest.mark.parametrize('name', WHOLE_BATCH)
def test_statistics_are_carried_and_every_update_is_real(name):
  """Otherwise the comparisons above would compare nothing with nothing."""
  first, second = (step[name] for step in trained(WHOLE_BATCH, 1, False))
  assert first['gradient norm'] > 1e-4 and np.isfinite(first['parameters']).all()
  assert np.abs(second['parameters'] - first['parameters']).max() > 0.01
  start = bound_rows((name,))[0].loss
  for before, now, later in zip(jax.tree.leaves(training_step.initial_loss_state(start)),
                                jax.tree.leaves(first['state']), jax.tree.leaves(second['state'])):
    if name in ('mpo', 'bco') and now == 0.0:
      continue  # a cumulative mean keeps no standard deviation
    assert before != now != later
