"""Attention by one fused kernel where the device has one: cuDNN's, through `jax.nn`.

The kernel holds no scores `[T, T]`. It knows rows that are causal from their first token, and
anything else only as a mask of every pair of tokens, so groups are laid out as the former.
"""

import re

import jax
import jax.numpy as jnp

from ptjax import config as settings

_IMPLEMENTATION = 'cudnn'  # of jax.nn.dot_product_attention; tests put another one here
# Compute capability from which on the kernel runs -> the largest heads it takes there. From
# `check_is_flash_attention` of jax/_src/cudnn/fused_attention_stablehlo.py and cuDNN's support
# matrix: Ampere, then Hopper and later.
_MOST_HEAD_DIM = {(8, 0): 128, (9, 0): 256}


def choose(config, wanted, platform, capability=None):
  """Which attention a model computes with: a value for `TransformerConfig.attention`.

  Args:
    config: TransformerConfig.
    wanted: `model_settings.attention`: 'auto', 'xla' or 'cudnn'.
    platform: of the devices, as `jax.default_backend()` says it.
    capability: of GPUs, as `jax.Device.compute_capability` says it, e.g. '9.0'.
  Raises:
    UserError: 'cudnn' for a model or device that it cannot be had for.
  """
  reason = _obstacle(config, platform, capability)
  if wanted == 'cudnn' and reason:
    raise settings.UserError(f'model_settings.attention=cudnn: {reason}; use auto or xla')
  return 'xla' if wanted == 'xla' or reason else 'cudnn'


def _obstacle(config, platform, capability):
  if platform != 'gpu':
    return f'the kernel runs on NVIDIA GPUs, not on {platform}'
  numbers = re.fullmatch(r'(\d+)\.(\d+)', capability or '')
  if not numbers:  # AMD's are called gfx942 and the like
    return f'the kernel runs on NVIDIA GPUs, not on one of architecture {capability}'
  largest = [size for least, size in _MOST_HEAD_DIM.items()
             if least <= tuple(map(int, numbers.groups()))]
  if not largest:
    return f'the kernel wants compute capability 8.0 or later, and this GPU has {capability}'
  if config.dtype == 'float32':
    return 'the kernel computes in bfloat16 (model_settings.dtype)'
  if config.attention_softcap is not None:
    return 'the kernel knows no cap on scores, which this model has'
  if len(set(config.layer_windows)) > 1:
    return 'the layers have different windows'
  if config.head_dim % 8 or config.head_dim > max(largest):
    return (f'heads of {config.head_dim}; the kernel takes multiples of 8 up to {max(largest)} on '
            f'compute capability {capability}')
  return None


def causal(config, query, key, value, window):
  """Rows `[B, L, heads or kv, D]`, each causal from its first token: `[B, L, heads, D]`.

  Padding on the right sees real tokens and is seen by none.
  """
  return _call(config, (query, key, value), is_causal=True,
               local_window_size=(window - 1, 0) if window else None)


def masked(config, query, key, value, visible):
  """Rows `[B, L, heads or kv, D]` under `visible` `[B, L, L]` bool (query, key).

  The kernel is told by a bias of every pair in the compute dtype: 2 * B * L^2 bytes, read once per
  head, and nothing of what the mask hides is left out. It still holds no scores of each head.
  """
  odd = query.shape[1] % 2
  visible = jnp.pad(visible, ((0, 0), (0, odd), (0, odd)))
  return _call(config, (query, key, value), mask=visible[:, None])


def grouped(config, prompt_lengths, prompt_width, group_size, completion_width, query, key, value,
            window):
  """What `attention.grouped` computes, of the same flat rows `[P * (S + G * T), heads or kv, D]`.

  Each completion gets a row of its own, its prompt's tokens directly before it, so that the row is
  plainly causal. The prompt's queries run once per completion, its layers' products still once.
  """
  p, s, g, t = prompt_lengths.shape[0], prompt_width, group_size, completion_width
  lengths = prompt_lengths[:, None, None]  # [P, 1, 1]
  own = s + t * jnp.arange(g)[None, :, None]  # [1, G, 1]; where a completion starts
  at = jnp.arange(s + t)[None, None]
  places = jnp.where(at < lengths, at, own + at - lengths)  # [P, G, S + T]
  places = jnp.minimum(places, own + t - 1).reshape(p, -1)  # [P, G * (S + T)]; padding repeats

  def lay_out(x):
    x = x.reshape(p, s + g * t, *x.shape[1:])
    return _at(x, places).reshape(p * g, s + t, *x.shape[2:])
  out = causal(config, lay_out(query), lay_out(key), lay_out(value), window)
  out = out.reshape(p, g * (s + t), *out.shape[2:])
  back = jnp.arange(g)[None, :, None] * (s + t) + lengths + jnp.arange(t)[None, None]  # [P, G, T]
  back = jnp.concatenate([jnp.broadcast_to(jnp.arange(s), (p, s)), back.reshape(p, -1)], axis=1)
  return _at(out, back).reshape(-1, *out.shape[2:])


def _at(rows, places):
  """`rows` [P, L, heads, D] at `places` [P, M]: [P, M, heads, D]."""
  return jnp.take_along_axis(rows, places[..., None, None], axis=1)


def _call(config, rows, **options):
  length = rows[0].shape[1]
  # The kernel's backward pass wants an even number of tokens.
  query, key, value = (
      jnp.pad(x.astype(config.dtype), ((0, 0), (0, length % 2), (0, 0), (0, 0))) for x in rows)
  out = jax.nn.dot_product_attention(
      query, key, value, scale=config.query_scale,
      implementation=_IMPLEMENTATION, **options)
  return out[:, :length]
