"""The parts of a block. Activations are flat, `[N, width]`, N being all tokens of all sequences.

Rounding follows `transformers`: norms in float32, products in the compute dtype, parameters cast
to the compute dtype where they are used.
"""

import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from ptjax.models import config as config_lib
from ptjax.models import lora
from ptjax.models import rope


class Norm(nn.Module):
  """RMSNorm or LayerNorm over the last axis, computed in float32."""
  config: config_lib.TransformerConfig
  kind: str

  @nn.compact
  def __call__(self, x):
    config = self.config
    param_dtype = jnp.dtype(config.param_dtype)
    fill = nn.initializers.constant(1.0 - config.norm_offset)
    scale = self.param('scale', fill, x.shape[-1:], param_dtype)
    wide = x.astype(jnp.float32)
    if self.kind == 'layer':
      wide -= wide.mean(-1, keepdims=True)
    wide *= lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + config.norm_epsilon)
    shape = (1,) * (x.ndim - 1) + x.shape[-1:]
    if self.kind == 'rms' and config.norm_offset == 0.0:
      # Llama rounds before it scales, Gemma and LayerNorm after.
      return wide.astype(x.dtype) * scale.reshape(shape).astype(x.dtype)
    wide *= scale.reshape(shape).astype(jnp.float32) + config.norm_offset
    if self.kind == 'layer' and config.norm_bias:
      bias = self.param('bias', nn.initializers.zeros, x.shape[-1:], param_dtype)
      wide += bias.reshape(shape).astype(jnp.float32)
    return wide.astype(x.dtype)


class Embedding(nn.Module):
  """Rows of a table. Indices out of range read the nearest row, so that padding may hold any."""
  config: config_lib.TransformerConfig
  size: int
  split: str | None = None  # logical axis of the rows

  @nn.compact
  def __call__(self, indices):  # [N] int32 -> [N, width]
    table = self.param('embedding', nn.initializers.normal(init_scale(self.config)),
                       (self.size, self.config.width), jnp.dtype(self.config.param_dtype))
    # Rows are wanted whole: left split over `fsdp`, as the batch is too, they would make XLA
    # replicate the activations instead of gathering the table.
    table = nn.with_logical_constraint(table, (self.split, None))
    return jnp.take(table, indices, axis=0, mode='clip').astype(self.config.dtype)


def init_scale(config):
  """Standard deviation of fresh weights: unit-variance outputs for normed inputs.

  At width 128 GPT-2's fixed 0.02 makes a start so flat that a tiny model loses hundreds of steps.
  """
  return config.width**-0.5


class Dense(nn.Module):
  """A linear layer of the model; with adapters (see lora.py) where the parameters hold them."""
  config: config_lib.TransformerConfig
  features: int
  use_bias: bool
  scale: float | None = None  # standard deviation of a fresh kernel; None: init_scale

  @nn.compact
  def __call__(self, x):  # [N, in] -> [N, features]
    config = self.config
    dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
    kernel = self.param('kernel', nn.initializers.normal(self.scale or init_scale(config)),
                        (x.shape[-1], self.features), param_dtype)
    x = x.astype(dtype)
    if self.has_variable('params', 'lora_a'):
      out = lora.project(x, kernel, self.variables['params'], dtype)
    else:
      out = x @ kernel.astype(dtype)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,), param_dtype)
      out += bias.astype(dtype)[None]
    return out


def residual_scale(config):
  """Init of what is added to the residual stream: its variance must not grow with depth."""
  return init_scale(config) / (2 * config.num_layers)**0.5


class Attention(nn.Module):
  """Projections around `attend`, which knows where in its sequence every row stands."""
  config: config_lib.TransformerConfig

  @nn.compact
  def __call__(self, x, rope_table, window, attend, cache):
    """Returns ([N, width], new cache); arguments as in `transformer.Block`."""
    config = self.config
    def heads(name, count):
      out = Dense(config, count * config.head_dim, config.qkv_bias, name=name)(x)
      return out.reshape(-1, count, config.head_dim)

    query = nn.with_logical_constraint(heads('query', config.num_heads), ('batch', 'heads', None))
    key = heads('key', config.num_kv_heads)  # [N, kv, D]
    value = heads('value', config.num_kv_heads)
    if config.qk_norm:
      query = Norm(config, 'rms', name='query_norm')(query)
      key = Norm(config, 'rms', name='key_norm')(key)
    if rope_table is not None:
      query, key = rope.rotate(query, rope_table), rope.rotate(key, rope_table)
    out, cache = attend(query, key, value, window, cache)
    out = Dense(config, config.width, config.out_bias, residual_scale(config), name='out')(
        out.reshape(-1, config.num_heads * config.head_dim))
    return out, cache


class Mlp(nn.Module):
  """The position-wise network, gated (Llama) or plain (GPT-2)."""
  config: config_lib.TransformerConfig

  @nn.compact
  def __call__(self, x):  # [N, width] -> [N, width]
    config = self.config
    wide = functools.partial(Dense, config, config.mlp_width, config.mlp_bias)
    if config.gated_mlp:
      hidden = _activate(config, wide(name='gate')(x)) * wide(name='up')(x)
    else:
      hidden = _activate(config, wide(name='up')(x))
    hidden = nn.with_logical_constraint(hidden, ('batch', 'mlp'))
    # Without the barrier XLA:CPU recomputes the activation's gradient column by column, inside
    # the transposed product that reads it; measured 1.5x on a whole update. The axis of size one
    # keeps it from writing the activation over its input, for which it would compile a loop
    # without vector instructions (unless with fusion emitters, see process.py); 1.03x.
    hidden = lax.optimization_barrier(hidden[:, None])[:, 0]
    return Dense(config, config.width, config.mlp_bias, residual_scale(config), name='down')(hidden)


def _activate(config, x):
  if config.activation == 'silu':
    return nn.silu(x)
  return nn.gelu(x, approximate=config.activation == 'gelu_tanh')


def product(a, b, dtype):
  """`a @ b` (equal leading axes) in float32, both operands rounded to `dtype`.

  Its gradient rounds the incoming one to `dtype` too, where plain autodiff would multiply a
  float32 by a half-precision matrix, far from the fast path of an accelerator; sums stay float32.
  """
  if jnp.dtype(dtype) == jnp.float32:
    return a.astype(jnp.float32) @ b.astype(jnp.float32)
  return _rounded_product(a, b, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded_product(a, b, dtype):
  return jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _rounded_product_forward(a, b, dtype):
  return _rounded_product(a, b, dtype), (a, b)


def _rounded_product_backward(dtype, residuals, gradient):
  a, b = residuals
  transposed = lambda x: jnp.swapaxes(x, -1, -2)
  return (_rounded_product(gradient, transposed(b), dtype).astype(a.dtype),
          _rounded_product(transposed(a), gradient, dtype).astype(b.dtype))


_rounded_product.defvjp(_rounded_product_forward, _rounded_product_backward)
