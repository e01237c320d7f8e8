"""Tests of attention by a fused kernel: the same numbers, and the kernel in a program for GPUs.

No GPU is needed: the calls can be made without the kernel, and a program can be lowered for CUDA on
any machine.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from ptjax import config as settings
from ptjax import types
from ptjax.models import flash
from ptjax.models import policy
from ptjax.models import transformer

QWEN = tiny_models.QWEN
MISTRAL = dataclasses.replace(QWEN, family='mistral', qkv_bias=False, layer_windows=(4, 4))
RANDOM = np.random.default_rng(0)
P, S, G, T = 2, 6, 3, 5
PROMPTS = RANDOM.integers(0, 19, (P, S)).astype(np.int32)
LENGTHS = np.array([4, 6], np.int32)
TOKENS = RANDOM.integers(0, 19, (P * G, T)).astype(np.int32)
WEIGHTS = RANDOM.normal(size=(P * G, T)).astype(np.float32)
# Two sequences in a row, then one with two branches behind a prompt of three tokens.
PACKING = types.Packing(
    segments=np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 7 + [0]], np.int32),
    positions=np.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 3, 4, 0]], np.int32),
    predictors=np.array([[0, 1, 3, 4, 5], [2, 3, 2, 5, 5]], np.int32),
    branches=np.array([[0] * 8, [0, 0, 0, 1, 1, 2, 2, 0]], np.int32))
ROWS = RANDOM.integers(0, 19, (2, 8)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=('config', 'packed'))
def _weighted(config, params, packed):
  if packed:
    out = policy.log_probs(config, params, ROWS, np.array([7, 7], np.int32), TOKENS[:2],
                           packing=PACKING)
    return (out['log_probs'] * WEIGHTS[:2]).sum(), out
  out = policy.log_probs(config, params, PROMPTS, LENGTHS, TOKENS)
  return (out['log_probs'] * WEIGHTS).sum(), out


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('config', [QWEN, MISTRAL], ids=['global', 'window'])
def test_same_numbers_as_attention_by_xla(monkeypatch, config, packed):
  params = tiny_models.params(config)
  value = jax.value_and_grad(_weighted, argnums=1, has_aux=True)
  (_, ours), grads = value(config, params, packed)
  monkeypatch.setattr(flash, '_IMPLEMENTATION', 'xla')  # the same calls without the kernel
  (_, theirs), their_grads = value(dataclasses.replace(config, attention='cudnn'), params, packed)
  assert np.abs(ours['log_probs']).max() > 1  # attention has something to decide
  np.testing.assert_allclose(theirs['log_probs'], ours['log_probs'], atol=2e-5)
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * scale),
               their_grads, grads)


@pytest.mark.parametrize('packed', [False, True])
def test_a_program_for_gpus_calls_the_kernel_forward_and_backward(monkeypatch, packed):
  from jax._src.cudnn import fused_attention_stablehlo as fused
  monkeypatch.setattr(fused, 'check_cudnn_version', lambda: 91300)
  monkeypatch.setattr(fused, 'check_compute_capability', lambda _: True)
  config = dataclasses.replace(QWEN, attention='cudnn', dtype='bfloat16', head_dim=16)
  shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  grads = jax.jit(lambda params: jax.grad(
      lambda p: _weighted.__wrapped__(config, p, packed)[0])(params))
  text = grads.trace(shapes).lower(lowering_platforms=('cuda',)).as_text()
  calls = re.findall(r'__cudnn\$fmha\w+', text)
  assert any('Backward' in call for call in calls) and any('Backward' not in c for c in calls)


@pytest.mark.parametrize('change, wanted, platform, capability, found', [
    ({}, 'auto', 'gpu', '9.0', 'cudnn'), ({}, 'auto', 'cpu', None, 'xla'),
    ({}, 'xla', 'gpu', '9.0', 'xla'), ({}, 'cudnn', 'gpu', '9.0', 'cudnn'),
    ({'dtype': 'float32'}, 'auto', 'gpu', '9.0', 'xla'),
    ({'head_dim': 12}, 'auto', 'gpu', '9.0', 'xla'),
    ({'attention_softcap': 50.0}, 'auto', 'gpu', '9.0', 'xla'),
    ({'layer_windows': (0, 4)}, 'auto', 'gpu', '9.0', 'xla'),
    # Gemma's heads want Hopper, and nothing before Ampere has the kernel.
    ({'head_dim': 256}, 'auto', 'gpu', '9.0', 'cudnn'),
    ({'head_dim': 256}, 'auto', 'gpu', '12.0', 'cudnn'),
    ({'head_dim': 264}, 'auto', 'gpu', '9.0', 'xla'),
    ({'head_dim': 256}, 'auto', 'gpu', '8.0', 'xla'),
    ({'head_dim': 136}, 'auto', 'gpu', '8.9', 'xla'),
    ({'head_dim': 128}, 'auto', 'gpu', '8.0', 'cudnn'),
    ({}, 'auto', 'gpu', '7.5', 'xla'), ({}, 'auto', 'gpu', 'gfx942', 'xla')])
def test_the_kernel_is_taken_where_it_can_be(change, wanted, platform, capability, found):
  config = dataclasses.replace(QWEN, **{'dtype': 'bfloat16', 'head_dim': 16, **change})
  assert flash.choose(config, wanted, platform, capability) == found


@pytest.mark.parametrize('change, platform, capability, reason', [
    ({}, 'cpu', None, 'not on cpu'), ({'dtype': 'float32'}, 'gpu', '9.0', 'bfloat16'),
    ({'attention_softcap': 50.0}, 'gpu', '9.0', 'cap'),
    ({'head_dim': 12}, 'gpu', '9.0', 'heads of 12; .* up to 256'),
    ({'head_dim': 256}, 'gpu', '8.6', 'heads of 256; .* up to 128 on compute capability 8.6'),
    ({}, 'gpu', '7.0', '8.0 or later, and this GPU has 7.0'), ({}, 'gpu', 'gfx90a', 'gfx90a')])
def test_asking_for_it_in_vain_says_why(change, platform, capability, reason):
  config = dataclasses.replace(QWEN, **{'dtype': 'bfloat16', 'head_dim': 16, **change})
  with pytest.raises(settings.UserError, match=f'attention=cudnn.*{reason}'):
    flash.choose(config, 'cudnn', platform, capability)
