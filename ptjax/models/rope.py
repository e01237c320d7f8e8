"""Rotary position embeddings and the ways checkpoints stretch them."""

import math

import jax.numpy as jnp
import numpy as np

from ptjax import config as settings


def tables(config, positions):
  """Cosines and sines for the global layers and, where they differ, for the sliding ones.

  Args:
    config: TransformerConfig with position 'rope'.
    positions: [N] int32.
  Returns:
    (global, local): pairs (cos, sin), each [N, D / 2] float32; local is None unless
    `local_rope_theta` is set.
  """
  frequencies, amplitude = _scaled_frequencies(config)
  local = None
  if config.local_rope_theta is not None:
    local = _table(positions, _frequencies(config.local_rope_theta, config.head_dim), 1.0)
  return _table(positions, frequencies, amplitude), local


def rotate(x, table):
  """Rotates `x` [N, heads, D]; the two halves of D are the two coordinates of each pair.

  The table is rounded to x's dtype first, as `transformers` does.
  """
  cos, sin = (t.astype(x.dtype)[:, None, :] for t in table)  # [N, 1, D / 2]
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _table(positions, frequencies, amplitude):
  angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)[None, :]
  return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def _frequencies(theta, head_dim):
  # In float32 throughout, like the checkpoints' own code: at long range the rounding shows.
  exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  return np.float32(1.0) / np.float32(theta)**exponents


def _scaled_frequencies(config):
  """Returns ([D / 2] float32 frequencies, the factor of cosines and sines)."""
  frequencies = _frequencies(config.rope_theta, config.head_dim)
  scaling = dict(config.rope_scaling or ())
  kind = scaling.get('rope_type', 'default')
  if kind == 'default':
    return frequencies, 1.0
  if kind not in _SCALINGS:
    raise settings.UserError(f'rope scaling {kind!r} is not supported; supported: default, '
                             + ', '.join(sorted(_SCALINGS)))
  return _SCALINGS[kind](config, frequencies, scaling)


def _linear(config, frequencies, scaling):
  del config
  return frequencies / np.float32(scaling['factor']), 1.0


def _llama3(config, frequencies, scaling):
  """Slow pairs are slowed by `factor`, fast ones kept, those between blended (Llama 3.1)."""
  del config
  low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
  turns = scaling['original_max_position_embeddings'] * frequencies / (2 * math.pi)
  keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return ((1 - keep) * frequencies / scaling['factor'] + keep * frequencies).astype(np.float32), 1.0


def _yarn(config, frequencies, scaling):
  """YaRN. Source: arXiv:2309.00071, as implemented in `transformers`."""
  dim, factor = config.head_dim, scaling['factor']
  original = scaling['original_max_position_embeddings']

  def pair_turning(turns):  # the (fractional) index of the pair that turns so often in `original`
    return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

  low = pair_turning(scaling.get('beta_fast') or 32)
  high = pair_turning(scaling.get('beta_slow') or 1)
  if scaling.get('truncate', True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  if low == high:
    high += 0.001
  slow = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)

  def amplitude(weight):
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

  attention_factor = scaling.get('attention_factor')
  if attention_factor is None:
    weights = scaling.get('mscale'), scaling.get('mscale_all_dim')
    attention_factor = amplitude(weights[0]) / amplitude(weights[1]) if all(weights) else (
        amplitude(1.0))
  return (frequencies / factor * slow + frequencies * (1 - slow)).astype(np.float32), (
      attention_factor)


_SCALINGS = {'linear': _linear, 'llama3': _llama3, 'yarn': _yarn}
