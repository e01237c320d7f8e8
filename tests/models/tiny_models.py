"""Tiny models of several families, one per kind of position, norm and attention, for tests."""

import dataclasses
import functools

import chex
import jax
import numpy as np

from ptjax.models import config as config_lib
from ptjax.models import transformer

QWEN = config_lib.TransformerConfig(
    family='qwen2', vocab_size=19, width=16, num_layers=2, num_heads=4, num_kv_heads=2,
    mlp_width=24, max_length=32, qkv_bias=True)
LLAMA = dataclasses.replace(QWEN, family='llama', qkv_bias=False)
GEMMA = dataclasses.replace(
    LLAMA, family='gemma3_text', layer_windows=(3, 0), local_rope_theta=100.0, qk_norm=True,
    post_norms=True, norm_offset=1.0, attention_softcap=2.0)
GPT2 = dataclasses.replace(
    QWEN, family='gpt2', num_kv_heads=4, position='learned', norm='layer', norm_bias=True,
    gated_mlp=False, out_bias=True, mlp_bias=True, activation='gelu_tanh')


@functools.cache
def params(config, spread=0.3, critic=None):
  """Weights in which no bias or norm is neutral, and so large that attention is far from uniform.

  Args:
    config: TransformerConfig.
    spread: standard deviation of every weight.
    critic: 'head' or 'model' adds one as `critic`.
  """
  random = np.random.RandomState(1)
  def draw(path, leaf):
    centre = 1.0 - config.norm_offset if path[-1].key == 'scale' else 0.0
    return (centre + spread * random.normal(size=leaf.shape)).astype(leaf.dtype)
  shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  if critic is not None:
    head = {'kernel': np.zeros((config.width, 1), np.float32), 'bias': np.zeros(1, np.float32)}
    body = {name: tree for name, tree in shapes.items() if name != 'head'}
    shapes = {**shapes, 'critic': head if critic == 'head' else {**body, 'score': head}}
  return jax.tree_util.tree_map_with_path(draw, shapes)


def assert_same_gradient(gradient, expected):
  """As a whole to 1e-6; single entries feel float32 sums in another order a little more."""
  flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
  norm = np.linalg.norm(flat(expected))
  assert np.linalg.norm(flat(gradient) - flat(expected)) < 1e-6 * norm
  scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
  chex.assert_trees_all_close(gradient, expected, atol=3e-6 * scale, rtol=0)
