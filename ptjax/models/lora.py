"""Low-rank adapters as functions over the parameter tree: LoRA, rsLoRA and DoRA.

A layer's kernel W [in, out] stays frozen; what trains are A [in, r] and B [r, out], and the layer
computes `x W + scale (x A) B`. DoRA trains a magnitude m [out] too and rescales each column of the
sum to it: `m / |W + scale A B| * (x W + scale (x A) B)`, the norm being a constant to the gradient.

Adapters are a tree parallel to the parameters that holds `lora_a`, `lora_b` and `magnitude` where
the parameters hold a `kernel`; those under 'layers' are stacked like it. A leaf called like one of
the base's takes its place: the head of a reward model starts fresh, so it trains whole.

Sources: LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA arXiv:2402.09353 (section 4.3 for the
norm's gradient); initialisation as in PEFT.
"""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from ptjax import config as settings_lib

ALL = 'all-linear'
_WHOLE = ('score', 'critic')  # what no pretraining has shaped: nothing to adapt


def init(params, settings, key):
  """Fresh adapters; with them the model is still `params`' own, as B is zero.

  Args:
    params: the base's parameter tree. Only its shapes are read, but for DoRA, whose magnitudes are
      the norms of its kernels' columns, and for heads that train whole, which are copied.
    settings: config.LoraSettings with a positive rank.
    key: PRNG key.
  Returns:
    The tree of adapters, float32 whatever the base is stored in: what is small may be exact.
  Raises:
    UserError: a target that no layer is called by.
  """
  kernels = _targets(params['layers'], settings.targets)
  layers = {}
  for (path, kernel), own_key in zip(kernels, jax.random.split(key, len(kernels))):
    *stack, features_in, features_out = kernel.shape
    bound = features_in**-0.5  # PEFT's kaiming_uniform(a=sqrt(5))
    adapter = {
        'lora_a': jax.random.uniform(
            own_key, (*stack, features_in, settings.rank), jnp.float32, -bound, bound),
        'lora_b': jnp.zeros((*stack, settings.rank, features_out), jnp.float32)}
    if settings.variant == 'dora':
      adapter['magnitude'] = column_norms(kernel, adapter, settings.scale)
    _put(layers, path, adapter)
  return {'layers': layers,
          **{name: jax.tree.map(jnp.copy, params[name]) for name in _WHOLE if name in params}}


def join(base, adapters, scale):
  """One tree for `transformer.forward` in which every adapter stands beside its kernel.

  Nothing is copied. The scale goes along as a constant leaf, so that it needs no gradient.

  Args:
    base: the frozen parameters, layers stacked.
    adapters: from `init`; differentiate with respect to these.
    scale: `LoraSettings.scale`.
  """
  joined = {**base}
  for name, value in adapters.items():
    # A critic, trained whole beside the adapters, is no part of the base.
    adapts = isinstance(value, dict) and name in base
    joined[name] = join(base[name], value, scale) if adapts else value
  if 'lora_a' in adapters:
    joined['lora_scale'] = np.full(adapters['lora_a'].shape[:-2], scale, np.float32)
  return joined


def merge(base, adapters, scale):
  """Parameters in the base's own structure and dtypes that compute what `join`'s do.

  For rollouts, where the extra products would cost as much as they are small, and for export. In
  bfloat16 the two differ by the rounding of the merged kernels.
  """
  merged = {**base}
  for name, value in adapters.items():
    if isinstance(value, dict):
      merged[name] = merge(base[name], value, scale) if name in base else value
    elif name in base:
      merged[name] = value.astype(base[name].dtype)
  if 'lora_a' in adapters:
    kernel = base['kernel'].astype(jnp.float32)
    kernel += scale * (adapters['lora_a'] @ adapters['lora_b'])
    if 'magnitude' in adapters:
      ratio = adapters['magnitude'] / column_norms(base['kernel'], adapters, scale)
      kernel *= ratio[..., None, :]
    merged['kernel'] = kernel.astype(base['kernel'].dtype)
  return merged


def project(x, kernel, adapter, dtype):
  """A layer with its adapter, on the activations: no product is as large as the kernel.

  Args:
    x: [N, in], in `dtype`.
    kernel: [in, out].
    adapter: dict with lora_a, lora_b, lora_scale [] and for DoRA magnitude.
    dtype: of the products.
  Returns:
    [N, out], in `dtype`.
  """
  scale = adapter['lora_scale']
  # The scale meets B in float32: rounded by itself it would be off by up to 0.4 % in bfloat16.
  out = x @ kernel.astype(dtype)
  out += (x @ adapter['lora_a'].astype(dtype)) @ (adapter['lora_b'] * scale).astype(dtype)
  if 'magnitude' in adapter:
    ratio = adapter['magnitude'] / column_norms(kernel, adapter, scale)
    out = (out * ratio[None]).astype(dtype)
  return out


def column_norms(kernel, adapter, scale):
  """|W + scale A B| of every column, [..., out] float32, a constant to the gradient.

  Expanded as |W|² + 2 scale W·(A B) + scale² |A B|², the sum itself is never made.
  """
  kernel, a, b = (lax.stop_gradient(x).astype(jnp.float32)
                  for x in (kernel, adapter['lora_a'], adapter['lora_b']))
  transposed = jnp.swapaxes(a, -1, -2)  # [..., r, in]
  inner = 2 * (transposed @ kernel) + scale * ((transposed @ a) @ b)  # [..., r, out]
  return jnp.sqrt(jnp.square(kernel).sum(-2) + scale * (inner * b).sum(-2))


def _targets(layers, targets):
  """The kernels that get adapters: [(path, kernel [L, in, out])]."""
  kernels = [(tuple(k.key for k in path[:-1]), leaf)
             for path, leaf in jax.tree_util.tree_leaves_with_path(layers)
             if path[-1].key == 'kernel']
  known = {path[-1] for path, _ in kernels}
  unknown = [target for target in targets if target not in known | {ALL}]
  if unknown:
    raise settings_lib.UserError(
        f'lora.targets={",".join(targets)}: no layer of this model is called '
        f'{" or ".join(unknown)}; there are {", ".join(sorted(known))}, or {ALL} for all of them')
  return [(path, leaf) for path, leaf in kernels if ALL in targets or path[-1] in targets]


def _put(tree, path, value):
  for name in path[:-1]:
    tree = tree.setdefault(name, {})
  tree[path[-1]] = value
