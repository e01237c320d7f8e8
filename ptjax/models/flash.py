"""Attention by one fused kernel where the device has one: cuDNN's, through `jax.nn`.

The kernel holds no scores `[T, T]`. It knows rows that are causal from their first token, and
anything else only as a mask of every pair of tokens, so groups are laid out as the former.
"""

import jax
import jax.numpy as jnp

from ptjax import config as settings

_IMPLEMENTATIONS = {'cudnn': 'cudnn', 'jax': 'xla'}
_MOST_HEAD_DIM = 256  # on Hopper and later; 128 before


def choose(config, wanted, platform):
  """Which attention a model computes with: a value for `TransformerConfig.attention`.

  Args:
    config: TransformerConfig.
    wanted: `model_settings.attention`: 'auto', 'xla' or 'cudnn'.
    platform: of the devices, as `jax.default_backend()` says it.
  Raises:
    UserError: 'cudnn' for a model or device that it cannot be had for.
  """
  reason = _obstacle(config, platform)
  if wanted == 'cudnn' and reason:
    raise settings.UserError(f'model_settings.attention=cudnn: {reason}; use auto or xla')
  return 'xla' if wanted == 'xla' or reason else 'cudnn'


def _obstacle(config, platform):
  if platform != 'gpu':
    return f'the kernel runs on NVIDIA GPUs, not on {platform}'
  if config.dtype == 'float32':
    return 'the kernel computes in bfloat16 (model_settings.dtype)'
  if config.attention_softcap is not None:
    return 'the kernel knows no cap on scores, which this model has'
  if len(set(config.layer_windows)) > 1:
    return 'the layers have different windows'
  if config.head_dim % 8 or config.head_dim > _MOST_HEAD_DIM:
    return (f'heads of {config.head_dim}; the kernel takes multiples of 8 up to '
            f'{_MOST_HEAD_DIM}')
  return None


def causal(config, query, key, value, window):
  """Rows `[B, L, heads or kv, D]`, each causal from its first token: `[B, L, heads, D]`.

  Padding on the right sees real tokens and is seen by none.
  """
  return _call(config, (query, key, value), is_causal=True,
               local_window_size=(window - 1, 0) if window else None)


def masked(config, query, key, value, visible):
  """Rows `[B, L, heads or kv, D]` under `visible` `[B, L, L]` bool (query, key)."""
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
      implementation=_IMPLEMENTATIONS[config.attention], **options)
  return out[:, :length]
