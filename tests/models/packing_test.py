"""Several sequences in one row: what each token sees, and scores and gradients as if run alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from ptjax import sharding
from ptjax import types
from ptjax.models import attention
from ptjax.models import policy

V = 19
LLAMA, GPT2 = tiny_models.LLAMA, tiny_models.GPT2
GEMMA = dataclasses.replace(tiny_models.GEMMA, logit_softcap=4.0)
_params = tiny_models.params
CONFIGS = {'llama': LLAMA, 'gpt2': GPT2, 'gemma': GEMMA}

S, T = 18, 12
# (prompt, completion) lengths of the sequences of each of 8 rows; none fills its row.
LENGTHS = [[(2, 4), (1, 3), (3, 4)], [(5, 9)], [(1, 1), (6, 2), (4, 2)], [(2, 8), (3, 4)],
           [(3, 3), (3, 3)], [(1, 10), (2, 2)], [(4, 4), (1, 7)], [(2, 2), (2, 2), (2, 2), (1, 1)]]
RANDOM = np.random.RandomState(0)
ROWS = [[(RANDOM.randint(0, V, prompt), RANDOM.randint(0, V, own)) for prompt, own in row]
        for row in LENGTHS]


def _packed(filler=0):
  """Arguments of `policy.log_probs`, and the loss mask; padding holds `filler` everywhere."""
  count = len(ROWS)
  rows = np.full([count, S], filler, np.int32)
  segments = np.zeros([count, S], np.int32)
  positions = np.full([count, S], filler, np.int32)
  tokens = np.full([count, T], filler, np.int32)
  predictors = np.full([count, T], filler, np.int32)
  mask = np.zeros([count, T], bool)
  used = np.zeros(count, np.int32)
  for b, sequences in enumerate(ROWS):
    at = target = 0
    for number, (prompt, own) in enumerate(sequences, 1):
      length = len(prompt) + len(own)
      rows[b, at:at + length] = np.concatenate([prompt, own])
      segments[b, at:at + length] = number
      positions[b, at:at + length] = np.arange(length)
      tokens[b, target:target + len(own)] = own
      predictors[b, target:target + len(own)] = at + len(prompt) - 1 + np.arange(len(own))
      mask[b, target:target + len(own)] = True
      at, target = at + length, target + len(own)
    used[b] = at
  packing = types.Packing(segments=segments, positions=positions, predictors=predictors)
  return (rows, used, tokens, packing), mask


def _alone():
  """The same sequences one a row: arguments of `policy.log_probs`, and the loss mask."""
  sequences = [sequence for row in ROWS for sequence in row]
  longest = [max(len(sequence[i]) for sequence in sequences) for i in (0, 1)]
  prompts, tokens = (np.zeros([len(sequences), n], np.int32) for n in longest)
  mask = np.zeros(tokens.shape, bool)
  for b, (prompt, own) in enumerate(sequences):
    prompts[b, :len(prompt)] = prompt
    tokens[b, :len(own)] = own
    mask[b, :len(own)] = True
  lengths = np.array([len(prompt) for prompt, _ in sequences], np.int32)
  return (prompts, lengths, tokens, None), mask


@functools.partial(jax.jit, static_argnames=('config', 'chunk'))
def _run(config, params, batch, weights, chunk=None):
  """(outputs, the gradient of a function of every log-prob and entropy)."""
  *arrays, packing = batch
  def loss(params):
    out = policy.log_probs(config, params, *arrays, packing=packing, chunk=chunk)
    counts = weights != 0.0
    return jnp.sum(weights * out['log_probs'] + weights**2 * out['entropy'], where=counts), out
  gradient, out = jax.grad(loss, has_aux=True)(params)
  return out, gradient


def _weights(mask):
  """A weight of its own for every real token, in order; 0 on padding."""
  weights = np.zeros(mask.shape, np.float32)
  weights[mask] = np.cos(np.arange(mask.sum())) + 1.5
  return weights


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_packed_rows_equal_sequences_alone(config):
  (batch, mask), (alone, alone_mask) = _packed(), _alone()
  out, gradient = _run(config, _params(config), batch, _weights(mask))
  expected, expected_gradient = _run(config, _params(config), alone, _weights(alone_mask))
  for name in ('log_probs', 'entropy'):
    np.testing.assert_allclose(
        np.asarray(out[name])[mask], np.asarray(expected[name])[alone_mask], rtol=1e-6, atol=1e-5)
  np.testing.assert_array_equal(out['likeliest'][mask], expected['likeliest'][alone_mask])
  tiny_models.assert_same_gradient(gradient, expected_gradient)
  assert np.asarray(out['log_probs'])[mask].std() > 0.3  # the check has something to see


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_padding_may_hold_anything(config):
  (batch, mask), (other, _) = _packed(), _packed(filler=10**6)
  out, gradient = _run(config, _params(config), batch, _weights(mask))
  other_out, other_gradient = _run(config, _params(config), other, _weights(mask))
  for name, value in out.items():
    np.testing.assert_array_equal(value[mask], other_out[name][mask])
    assert np.isfinite(other_out[name]).all()
  jax.tree.map(np.testing.assert_array_equal, gradient, other_gradient)


def test_devices_change_nothing_and_share_the_work():
  batch, mask = _packed()
  _, expected = _run(LLAMA, _params(LLAMA), batch, _weights(mask))
  for text in ('data=8', 'fsdp=4,tensor=2'):
    mesh = sharding.make_mesh(text)
    params = sharding.put(_params(LLAMA), sharding.tree_sharding(mesh, _params(LLAMA)))
    with sharding.use(mesh):
      placed = sharding.put((batch, _weights(mask)), sharding.batch(mesh))
      _, gradient = _run(LLAMA, params, *placed)
    tiny_models.assert_same_gradient(gradient, expected)
    if text == 'data=8':
      with sharding.use(mesh):
        compiled = _run.lower(LLAMA, params, *placed).compile().as_text()
      assert 'all-gather' not in compiled and 'collective-permute' not in compiled


def test_targets_of_other_rows_are_refused():
  (rows, used, tokens, packing), _ = _packed()
  with pytest.raises(ValueError, match='7 rows of targets do not fit 8 packed rows'):
    policy.log_probs(LLAMA, _params(LLAMA), rows, used, tokens[:7], packing=packing)


@pytest.mark.parametrize('block, window', [(128, 0), (128, 3), (2, 0), (2, 1), (2, 3)])
@pytest.mark.parametrize('softcap', [None, 1.5])
@pytest.mark.parametrize('branched', [False, True])
def test_attention_equals_masks_written_out(branched, block, window, softcap, monkeypatch):
  monkeypatch.setattr(attention, '_BLOCK_QUERIES', block)
  config = dataclasses.replace(LLAMA, attention_softcap=softcap, query_scale=0.7)
  segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 3, 3, 3]], np.int32)
  positions = np.array([[0, 1, 2, 0, 1, 2, 3, 0, 0], [0, 0, 1, 2, 3, 4, 0, 1, 2]], np.int32)
  branches = None
  if branched:  # of prompts of 1, 1, 1, 3 and 1 tokens
    branches = np.array([[0, 1, 2, 0, 1, 1, 2, 0, 0], [0, 0, 0, 0, 1, 2, 0, 1, 1]], np.int32)
    positions = np.array([[0, 1, 1, 0, 1, 2, 1, 0, 0], [0, 0, 1, 2, 3, 3, 0, 1, 2]], np.int32)
  rows, s = segments.shape
  query = RANDOM.normal(size=(rows * s, 4, 4))
  key, value = RANDOM.normal(size=(2, rows * s, 2, 4))
  packing = types.Packing(
      segments=segments, positions=positions, predictors=None, branches=branches)
  out, cache = jax.jit(attention.packed(config, jax.tree.map(jnp.asarray, packing)),
                       static_argnums=3)(*map(jnp.float32, (query, key, value)), window, None)
  assert cache is None
  at = np.arange(s)
  for row in range(rows):
    here = slice(row * s, (row + 1) * s)
    for i in range(s):
      visible = (segments[row] == segments[row, i]) & (at <= i)
      if branched:
        visible &= (branches[row] == 0) | (branches[row] == branches[row, i])
      if window and segments[row, i]:
        visible &= positions[row, i] - positions[row] < window
      elif window and not branched:
        visible &= i - at < window
      for head in range(4):
        scores = key[here][:, head // 2] @ query[here][i, head] * 0.7
        if softcap:
          scores = softcap * np.tanh(scores / softcap)
        weights = np.where(visible, np.exp(scores), 0.0)
        expected = weights @ value[here][:, head // 2] / weights.sum()
        np.testing.assert_allclose(out[row * s + i, head], expected, rtol=2e-5, atol=2e-6)


def test_causal_blocks_cover_every_query_once(monkeypatch):
  for length in (1, 127, 128, 129, 544, 5000):
    blocks = attention.causal_blocks(length)
    assert [i for start, stop in blocks for i in range(start, stop)] == list(range(length))
    assert len(blocks) <= 8 and (length < 1024 or len(blocks) == 8)
  monkeypatch.setattr(attention, '_BLOCK_QUERIES', 2)
  assert attention.causal_blocks(5) == [(0, 2), (2, 4), (4, 5)]


def test_causal_blocks_leave_out_what_nobody_sees():
  """The scores above the diagonal blocks are never multiplied out, in either direction."""
  def flops(length, window=0):
    def loss(query, key, value):
      attend = attention.prefill(LLAMA, jnp.array([length]), length)
      return attend(query, key, value, window, None)[0].sum()
    shapes = [jax.ShapeDtypeStruct((length, heads, 4), jnp.float32) for heads in (4, 2, 2)]
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile().cost_analysis()['flops']
  # One block at 128, eight at 1024, which compute 36 of 64 squares of that size.
  assert 35 < flops(1024) / flops(128) < 39
  assert flops(1024, window=128) < 0.45 * flops(1024)  # 15 squares at most
