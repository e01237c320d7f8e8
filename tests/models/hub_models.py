"""Tiny models for the tests of loading and exporting, and ways to spoil their directories."""

import json

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from ptjax import config as settings
from ptjax.models import config as config_lib
from ptjax.models import hub

CONFIG = config_lib.TransformerConfig(
    family='llama', vocab_size=64, width=32, num_layers=3, num_heads=4, num_kv_heads=2,
    mlp_width=48, max_length=64, tie_embeddings=False)
GPT2 = config_lib.TransformerConfig(
    family='gpt2', vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=4,
    mlp_width=48, max_length=64, activation='gelu_tanh', gated_mlp=False, norm='layer',
    norm_epsilon=1e-5, position='learned', qkv_bias=True, out_bias=True, mlp_bias=True,
    norm_bias=True)


def random_params(config, seed=0):
  """Every leaf random, so that no two could be exchanged unseen."""
  generator = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape).astype(leaf.dtype),
                      hub.param_shapes(config))


def assert_equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def edit_json(path, **changes):
  raw = json.loads(path.read_text())
  path.write_text(json.dumps({**raw, **changes}))


def edit_tensors(directory, change):
  """Rewrites model.safetensors after `change(dict of tensors)`."""
  path = directory / 'model.safetensors'
  tensors = safetensors_numpy.load_file(path)
  change(tensors)
  safetensors_numpy.save_file(tensors, path)


def refusal(function, *args, **kwargs):
  """The message with which a UserError refuses; always one line."""
  with pytest.raises(settings.UserError) as caught:
    function(*args, **kwargs)
  assert '\n' not in str(caught.value)
  return str(caught.value)
