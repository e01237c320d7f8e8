"""FLOPs counted from shapes against XLA's count of unrolled programs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from ptjax import types
from ptjax import config as settings
from ptjax.models import attention
from ptjax.models import cache
from ptjax.models import costs
from ptjax.models import head
from ptjax.models import hub
from ptjax.models import lora
from ptjax.models import policy
from ptjax.models import presets
from ptjax.models import transformer
from ptjax.training import per_token

ROWS = costs.Rows(prompts=2, prompt_tokens=32, group_size=4, completion_tokens=48)
LONG = costs.Rows(prompts=1, prompt_tokens=300, group_size=2, completion_tokens=200)  # some blocks
PACKED = costs.Rows(
    prompts=2, prompt_tokens=300, group_size=1, completion_tokens=160, packed=True)
CONFIG = presets.get('tiny', width=256, num_heads=4, mlp_width=512, num_layers=2, vocab_size=512)
# Norms, softmax and activations, which only XLA counts, are one per cent at this width.
TOLERANCE = 0.025


def ints(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def counted(function, *arguments):
  return jax.jit(function).lower(*arguments).compile().cost_analysis()['flops']


@functools.cache
def split_shapes(config):
  return jax.eval_shape(transformer.split_layers, hub.param_shapes(config))


def log_probs(config, remat, params, *batch, slope=None):
  *arrays, packing = batch
  states = policy.hidden(config, params, *arrays, packing=packing, remat=remat)
  out = head.score(config, params, states, arrays[-1], chunk=arrays[-1].shape[1], slope=slope)
  return out['log_probs'], out['entropy']


def batch_shapes(rows=ROWS):
  p, s, _, t, packed = rows
  packing = types.Packing(segments=ints(p, s), positions=ints(p, s), predictors=ints(p, t))
  return ints(p, s), ints(p), ints(rows.completions, t), packing if packed else None


@pytest.mark.parametrize('changes', [
    {}, {'gated_mlp': False, 'num_kv_heads': 4, 'head_dim': 32, 'tie_embeddings': False}])
def test_layer_weights(changes):
  config = presets.get('tiny', **changes)
  every, down = costs.layer_weights(config)
  kernels = {jax.tree_util.keystr(path): leaf.size // config.num_layers
             for path, leaf in jax.tree_util.tree_leaves_with_path(
                 hub.param_shapes(config)['layers']) if path[-1].key == 'kernel'}
  assert every == sum(kernels.values())
  assert down == kernels["['mlp']['down']['kernel']"]


@pytest.mark.parametrize('rows', [ROWS, LONG, PACKED])
def test_log_prob_flops(rows):
  found = counted(functools.partial(log_probs, CONFIG, 'none'), split_shapes(CONFIG),
                  *batch_shapes(rows))
  assert costs.log_prob_flops(CONFIG, rows) == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize('remat', transformer.REMAT)
def test_update_flops(remat):
  def loss(params, *batch):
    scores, entropy = log_probs(CONFIG, remat, params, *batch)
    return (scores * entropy).sum()
  found = counted(jax.value_and_grad(loss), split_shapes(CONFIG), *batch_shapes())
  assert costs.update_flops(CONFIG, ROWS, remat=remat) == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize('remat', transformer.REMAT)
def test_update_flops_of_adapters(remat):
  """The embedding is differentiated too: it costs no product, and unrolled, XLA would otherwise
  see that the first layer's input needs no gradient."""
  config = dataclasses.replace(CONFIG, tie_embeddings=False)
  made_with = settings.LoraSettings(rank=8)
  base = hub.param_shapes(config)
  own = jax.eval_shape(lambda base: lora.init(base, made_with, jax.random.key(0)), base)
  adapters = sum(leaf.size for leaf in jax.tree.leaves(own)) // config.num_layers

  def loss(trained, base, *batch):
    own, embed = trained
    joined = lora.join({**base, 'embed': embed}, own, made_with.scale)
    scores, entropy = log_probs(config, remat, transformer.split_layers(joined), *batch)
    return (scores * entropy).sum()
  found = counted(jax.value_and_grad(loss), (own, base['embed']), base, *batch_shapes())
  expected = costs.update_flops(config, ROWS, remat=remat, adapters=adapters)
  assert expected == pytest.approx(found, rel=TOLERANCE)
  assert expected < 0.85 * costs.update_flops(config, ROWS, remat=remat)


def test_update_flops_where_the_head_knows_what_comes_back():
  slope = per_token.constant({'log_probs': jnp.ones((ROWS.completions, ROWS.completion_tokens))})
  def loss(params, *batch):
    scores, entropy = log_probs(CONFIG, 'dots', params, *batch, slope=slope)
    return scores.sum(), entropy
  found = counted(jax.value_and_grad(loss, has_aux=True), split_shapes(CONFIG), *batch_shapes())
  expected = costs.update_flops(CONFIG, ROWS, remat='dots', per_token=True)
  assert expected == pytest.approx(found, rel=TOLERANCE)
  saved = costs.head_flops(CONFIG, ROWS.completions * ROWS.completion_tokens)
  assert costs.update_flops(CONFIG, ROWS, remat='dots') - expected == saved


def test_micro_batches_of_a_loss_that_looks_at_all_of_them_cost_one_forward_pass_more():
  # In the second one the head knows what comes back.
  one, four = (costs.update_flops(CONFIG, ROWS, micro_batches=n) for n in (1, 4))
  head_once = costs.head_flops(CONFIG, ROWS.completions * ROWS.completion_tokens)
  assert four - one == costs.log_prob_flops(CONFIG, ROWS) - head_once
  one, four = (costs.update_flops(CONFIG, ROWS, micro_batches=n, per_token=True) for n in (1, 4))
  assert four == one


def test_prefill_flops():
  p, s, *_ = ROWS
  def prefill(params, tokens, lengths):
    hidden, store = transformer.forward(
        CONFIG, params, tokens.reshape(-1), jnp.tile(jnp.arange(s), p),
        attention.prefill(CONFIG, lengths, s))
    return transformer.logits(CONFIG, params, hidden.reshape(p, s, -1)[:, -1]), store
  found = counted(prefill, split_shapes(CONFIG), ints(p, s), ints(p))
  assert costs.prefill_flops(CONFIG, ROWS) == pytest.approx(found, rel=TOLERANCE)


def test_decode_flops():
  p, s, g, *_ = ROWS
  window = 64
  rows = ROWS.completions
  store = [(jnp.zeros((p, CONFIG.num_kv_heads, CONFIG.head_dim, s)),
            jnp.zeros((p, CONFIG.num_kv_heads, s, CONFIG.head_dim)))] * CONFIG.num_layers
  def decode(params, tokens, lengths, step, own):
    hidden, caches = transformer.forward(
        CONFIG, params, tokens, step, attention.decode(CONFIG, lengths, step, g),
        caches=cache.join(store, own))
    return transformer.logits(CONFIG, params, hidden), cache.own_part(caches)
  found = counted(decode, split_shapes(CONFIG), ints(rows), ints(p), ints(rows),
                  cache.init_own(CONFIG, rows, window))
  assert costs.decode_flops(CONFIG, ROWS, window) == pytest.approx(found, rel=TOLERANCE)
