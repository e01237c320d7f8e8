"""A decoder as functions of (config, params).

Parameters are a plain dict; the leaves under 'layers' are stacked over the layers (leading axis
L), so that one compiled block serves any depth. What a token may see is not known here: `attend`
(see attention.py) holds the layout of the rows.
"""

import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from ptjax.models import config as config_lib
from ptjax.models import layers
from ptjax.models import rope

REMAT = ('none', 'dots', 'full')

_SCORE_SCALE = 0.02


class Block(nn.Module):
  """One layer: attention and MLP, each normed before (and in Gemma after) and added."""
  config: config_lib.TransformerConfig

  @nn.compact
  def __call__(self, x, rope_table, window, attend, cache):
    """Applies the layer.

    Args:
      x: [N, width].
      rope_table: pair of [N, D / 2], or None.
      window: int or int32 scalar, tokens; 0 = global.
      attend: callable, see attention.py.
      cache: what `attend` takes for this layer.
    Returns:
      ([N, width], the new cache).
    """
    config = self.config
    norm = functools.partial(layers.Norm, config, config.norm)
    out, cache = layers.Attention(config, name='attention')(
        norm(name='attention_norm')(x), rope_table, window, attend, cache)
    if config.post_norms:
      out = norm(name='post_attention_norm')(out)
    x = x + out
    out = layers.Mlp(config, name='mlp')(norm(name='mlp_norm')(x))
    if config.post_norms:
      out = norm(name='post_mlp_norm')(out)
    return nn.with_logical_constraint(x + out, ('batch', None)), cache


def init(config, key):
  """Fresh parameters: normal, with less for what is added to the residual stream.

  Args:
    config: TransformerConfig.
    key: PRNG key. The values depend on nothing else, so they are equal on any mesh.
  Returns:
    The parameter tree, leaves in `config.param_dtype`.
  """
  keys = jax.random.split(key, 4 + config.num_layers)
  token = jnp.zeros([1], jnp.int32)
  x = jnp.zeros([1, config.width], config.dtype)

  def init_block(layer_key):
    attend = lambda query, key, value, window, cache: (query, cache)
    return Block(config).init(layer_key, x, None, 0, attend, None)['params']

  params = {
      'embed': _embedding(config).init(keys[0], token)['params'],
      'layers': jax.vmap(init_block)(keys[4:]),
      'final_norm': layers.Norm(config, config.norm).init(keys[1], x)['params'],
  }
  if config.position == 'learned':
    params['position_embed'] = _position_embedding(config).init(keys[2], token)['params']
  if config.num_labels:
    params['score'] = init_score(config, keys[3])
  elif not config.tie_embeddings:
    kernel = nn.initializers.normal(layers.init_scale(config))(
        keys[3], (config.width, config.vocab_size), jnp.dtype(config.param_dtype))
    params['head'] = {'kernel': kernel}
  return params


def init_score(config, key):
  """A fresh score head {'kernel': [width, num_labels]}, with a 'bias' where the config says so.

  Normal around zero and small, with the standard deviation of `transformers`, 0.02: scores start
  near zero and prefer no direction, so that a Bradley-Terry loss starts near log 2, yet, unlike
  with zeros, the body has a gradient from the first step.
  """
  dtype = jnp.dtype(config.param_dtype)
  head = {'kernel': nn.initializers.normal(_SCORE_SCALE)(
      key, (config.width, config.num_labels), dtype)}
  if config.score_bias:
    head['bias'] = jnp.zeros([config.num_labels], dtype)
  return head


def split_layers(params):
  """Returns `params` with 'layers' as a list of per-layer trees, for unrolled decoding.

  Done once per rollout, outside the decode loop: slicing inside would copy weights every step.
  """
  count = jax.tree.leaves(params['layers'])[0].shape[0]
  split = [jax.tree.map(lambda leaf, i=i: leaf[i], params['layers']) for i in range(count)]
  return {**params, 'layers': split}


def forward(config, params, tokens, positions, attend, *, caches=None, rope_tables=None, scan=None,
            remat='none'):
  """Runs the decoder up to and with its final norm.

  Args:
    config: TransformerConfig.
    params: the parameter tree; 'layers' stacked, or a list of per-layer trees.
    tokens: [N] int32; ids out of range read the nearest row.
    positions: [N] int32, each token's place in its sequence.
    attend: callable `(query [N, heads, D], key [N, kv, D], value [N, kv, D], window, cache) ->
      (out [N, heads, D], new_cache)`.
    caches: list with one cache per layer, or None.
    rope_tables: `make_rope_tables(config, positions)`, from a loop that made them outside; None:
      made here.
    scan: whether to scan over stacked layers. None: yes, unless caches or layers are lists.
    remat: what the backward pass recomputes. 'none': nothing; 'dots': all but the results of
      products with weights; 'full': whole layers.
  Returns:
    (hidden [N, width], caches). The new caches are stacked when scanned, else a list; None where
    `attend` makes none.
  """
  if remat not in REMAT:
    raise ValueError(f'remat is {remat!r}; expected one of {", ".join(REMAT)}')
  stacked = not isinstance(params['layers'], (list, tuple))
  if scan is None:
    scan = stacked and caches is None
  if scan and not (stacked and caches is None):
    raise ValueError('scan=True needs stacked layers and no caches')

  x = _embedding(config).apply({'params': params['embed']}, tokens)
  if config.embedding_scale != 1.0:
    x = x * jnp.asarray(config.embedding_scale, x.dtype)
  if config.position == 'learned':
    x = x + _position_embedding(config).apply({'params': params['position_embed']}, positions)
  if rope_tables is None:
    rope_tables = make_rope_tables(config, positions)
  x = nn.with_logical_constraint(x, ('batch', None))

  def layer(x, layer_params, window, cache):
    return Block(config).apply(
        {'params': layer_params}, x, _choose(rope_tables, window), window, attend, cache)

  if scan:
    x, caches = _scan(config, layer, x, params['layers'], remat)
  else:
    layer_params = params['layers'] if not stacked else split_layers(params)['layers']
    new_caches = []
    for i, window in enumerate(config.layer_windows):
      # The window rides in the closure: as an argument checkpoint would turn it into an array.
      one = _rematerialized(functools.partial(_with_window, layer, window), remat, scanned=False)
      x, new_cache = one(x, layer_params[i], None if caches is None else caches[i])
      new_caches.append(new_cache)
    caches = None if all(cache is None for cache in new_caches) else new_caches
  x = layers.Norm(config, config.norm).apply({'params': params['final_norm']}, x)
  return x, caches


def make_rope_tables(config, positions):
  """As `rope.tables`, of positions [...]; (None, None) where positions are learned."""
  if config.position == 'learned':
    return None, None
  tables = rope.tables(config, positions.reshape(-1))
  return jax.tree.map(lambda x: x.reshape(*positions.shape, -1), tables)


def head_kernel(config, params):
  """The output projection as it is stored, split over the vocabulary only.

  Made once outside a loop over chunks, it is gathered once. [width, vocab]; of tied embeddings
  [vocab, width], for a transposed copy would be as large as the embeddings, and its gradient too.

  Raises:
    ValueError: the model has a score head instead.
  """
  if config.num_labels:
    raise ValueError(f'a model with a score head ({config.num_labels} labels) has no vocabulary '
                     'head; load it as a language model to have its log-probs')
  if config.tie_embeddings:
    return nn.with_logical_constraint(params['embed']['embedding'], ('vocab', None))
  return nn.with_logical_constraint(params['head']['kernel'], (None, 'vocab'))


def logits(config, params, hidden):
  """Next-token logits [..., vocab] float32 of `hidden` [..., width] from `forward`."""
  return project(config, head_kernel(config, params), hidden)


def project(config, kernel, hidden):
  """`logits` with the kernel from `head_kernel` at hand."""
  kernel = kernel.T if config.tie_embeddings else kernel
  flat = hidden.reshape(-1, config.width)
  out = layers.product(flat, kernel, config.dtype).reshape(*hidden.shape[:-1], -1)
  if config.logit_softcap is not None:
    out = jnp.tanh(out / config.logit_softcap) * config.logit_softcap
  inner = (None,) * (hidden.ndim - 2)
  return nn.with_logical_constraint(out, ('batch', *inner, 'vocab') if out.ndim > 1 else ('vocab',))


def head_scores(config, head, hidden):
  """Scores [..., num_labels] float32 of `hidden` [..., width]; `head` as from `init_score`."""
  flat = hidden.reshape(-1, config.width)
  out = layers.product(flat, head['kernel'], config.dtype)
  if 'bias' in head:
    out += head['bias'][None].astype(jnp.float32)
  return out.reshape(*hidden.shape[:-1], -1)


def _embedding(config):
  return layers.Embedding(config, config.vocab_size, 'vocab')


def _position_embedding(config):
  return layers.Embedding(config, config.max_length)


def _with_window(layer, window, x, layer_params, cache):
  return layer(x, layer_params, window, cache)


def _choose(rope_tables, window):
  """The sliding layers' table where the model has one."""
  everywhere, local = rope_tables
  if local is None:
    return everywhere
  if isinstance(window, int):
    return local if window else everywhere
  return tuple(jnp.where(window > 0, l, e) for l, e in zip(local, everywhere))


def _scan(config, layer, x, stacked, remat):
  """Runs `layer` over the stacked parameters; returns (x, stacked new caches or None)."""
  windows = config.layer_windows
  if len(set(windows)) == 1:  # known while tracing: the masks of global layers stay plain causal
    body = lambda x, layer_params: layer(x, layer_params, windows[0], None)
    return lax.scan(_rematerialized(body, remat, scanned=True), x, stacked)
  body = lambda x, inputs: layer(x, *inputs, None)
  return lax.scan(
      _rematerialized(body, remat, scanned=True), x, (stacked, jnp.array(windows, jnp.int32)))


def _rematerialized(function, remat, *, scanned):
  if remat == 'none':
    return function
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == 'dots' else None
  # A scan's body is already opaque to common-subexpression elimination.
  return jax.checkpoint(function, policy=policy, prevent_cse=not scanned)
