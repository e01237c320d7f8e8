"""Tiny models of three families, one per kind of position, norm and attention, for tests."""

import dataclasses
import functools

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
def params(config, spread=0.3):
  """Weights in which no bias or norm is neutral, and so large that attention is far from uniform.

  Args:
    config: TransformerConfig.
    spread: standard deviation of every weight.
  """
  random = np.random.RandomState(1)
  def draw(path, leaf):
    centre = 1.0 - config.norm_offset if path[-1].key == 'scale' else 0.0
    return (centre + spread * random.normal(size=leaf.shape)).astype(leaf.dtype)
  return jax.tree_util.tree_map_with_path(
      draw, jax.eval_shape(lambda: transformer.init(config, jax.random.key(0))))
