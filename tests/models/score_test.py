"""What the head's chunk loop returns beside log-probs, and how it runs on several devices."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax import config as settings
from ptjax import sharding
from ptjax.models import config as config_lib
from ptjax.models import head
from ptjax.models import transformer
from ptjax.plan import collectives
from ptjax.training import per_token

B, T, V = 8, 5, 24
CONFIG = config_lib.TransformerConfig(
    family='gemma2', vocab_size=V, width=16, num_layers=1, num_heads=4, num_kv_heads=2,
    mlp_width=24, max_length=32, logit_softcap=4.0)
TEACHER = dataclasses.replace(CONFIG, width=8, head_dim=4, tie_embeddings=False, logit_softcap=None)
RANDOM = np.random.RandomState(0)
TOKENS = RANDOM.randint(0, V, (B, T)).astype(np.int32)
STATES = RANDOM.normal(size=(B, T, 16)).astype(np.float32)
TEACHER_STATES = RANDOM.normal(size=(B, T, 8)).astype(np.float32)
WEIGHTS = np.cos(np.arange(B * T)).reshape(B, T).astype(np.float32)


def draw(config, seed):
  random = np.random.RandomState(seed)
  return jax.tree.map(
      lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype),
      jax.eval_shape(lambda: transformer.init(config, jax.random.key(0))))


PARAMS, TEACHER_PARAMS = draw(CONFIG, 1), draw(TEACHER, 2)


def student_logits(params=PARAMS, states=STATES):
  return transformer.logits(CONFIG, params, states)


def teacher_logits():
  return transformer.logits(TEACHER, TEACHER_PARAMS, TEACHER_STATES)


def skewed(logits, other):
  """A divergence that tells its arguments, and temperatures, apart: KL(other || ours) at 2.

  Unlike those of `pieces.divergence` it has a gradient for the teacher, which `score` must stop.
  """
  ours, theirs = jax.nn.log_softmax(logits / 2.0), jax.nn.log_softmax(other / 2.0)
  return jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)


@functools.partial(jax.jit, static_argnames=('chunk', 'temperature'))
def run(params, states, teacher_params, teacher_states, chunk=None, temperature=1.0):
  """(outputs, the gradient of a function of all of them for every argument)."""
  def loss(params, states, teacher_params, teacher_states):
    out = head.score(
        CONFIG, params, states, TOKENS, temperature=temperature, with_sum_squares=True,
        divergence=skewed, teacher=(TEACHER, teacher_params, teacher_states), chunk=chunk)
    return sum(jnp.sum((i + WEIGHTS) * out[name]) for i, name in enumerate(
        ('log_probs', 'entropy', 'divergence'))), out
  grad, out = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(
      params, states, teacher_params, teacher_states)
  return out, grad


def arguments():
  return PARAMS, STATES, TEACHER_PARAMS, TEACHER_STATES


@pytest.mark.parametrize('temperature', [1.0, 0.5])
def test_sum_squares(temperature):
  logits = np.asarray(student_logits(), np.float64) / temperature
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  out, _ = run(*arguments(), chunk=2, temperature=temperature)
  np.testing.assert_allclose(
      out['sum_squares'], np.log(np.square(probs).sum(-1)), rtol=1e-5, atol=1e-6)


def test_sum_squares_carry_no_gradient():
  def loss(params):
    return head.score(CONFIG, params, STATES, TOKENS, with_sum_squares=True)['sum_squares'].sum()
  assert all(not leaf.any() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(PARAMS)))


def test_sum_squares_of_a_sure_and_an_undecided_model():
  sure = {'embed': {'embedding': np.zeros([V, 16], np.float32)}}
  sure['embed']['embedding'][3] = 1000.0
  out = head.score(dataclasses.replace(CONFIG, logit_softcap=None), sure, np.ones_like(STATES),
                     TOKENS, with_sum_squares=True)
  np.testing.assert_allclose(out['sum_squares'], 0.0, atol=1e-6)
  out = head.score(CONFIG, {'embed': {'embedding': np.zeros([V, 16], np.float32)}}, STATES,
                     TOKENS, with_sum_squares=True)
  np.testing.assert_allclose(out['sum_squares'], -np.log(V), rtol=1e-6)


@pytest.mark.parametrize('chunk', [None, 2])
def test_divergence_equals_that_of_all_logits(chunk):
  def plain(params, states):
    log_probs = jax.nn.log_softmax(student_logits(params, states))
    own = jnp.take_along_axis(log_probs, TOKENS[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    divergence = skewed(student_logits(params, states), teacher_logits())
    return jnp.sum(WEIGHTS * own + (1 + WEIGHTS) * entropy + (2 + WEIGHTS) * divergence), divergence
  expected, value = jax.jit(jax.grad(plain, (0, 1), has_aux=True))(PARAMS, STATES)
  out, gradient = run(*arguments(), chunk=chunk)
  np.testing.assert_allclose(out['divergence'], value, rtol=2e-5, atol=1e-6)
  assert value.std() > 0.05
  scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
  chex.assert_trees_all_close(gradient[:2], expected, atol=2e-6 * scale, rtol=0)
  assert all(not leaf.any() for leaf in jax.tree.leaves(gradient[2:]))  # the teacher's


def test_divergence_is_taken_at_temperature_one():
  warm, _ = run(*arguments(), temperature=1.0)
  cold, _ = run(*arguments(), temperature=0.5)
  np.testing.assert_array_equal(warm['divergence'], cold['divergence'])
  assert np.abs(warm['entropy'] - cold['entropy']).max() > 0.1


def test_a_teacher_with_another_vocabulary_is_refused():
  with pytest.raises(settings.UserError, match='a teacher with another vocabulary: 25 tokens, the '
                     'student 24'):
    head.score(CONFIG, PARAMS, STATES, TOKENS, divergence=skewed,
                 teacher=(dataclasses.replace(TEACHER, vocab_size=25), None, TEACHER_STATES))


def test_outputs_are_made_on_request():
  out = head.score(CONFIG, PARAMS, STATES, TOKENS, with_entropy=False)
  assert sorted(out) == ['likeliest', 'log_probs']


def test_full_logits_of_neither_model_exist():
  vocab = 521
  config, teacher = (dataclasses.replace(c, vocab_size=vocab) for c in (CONFIG, TEACHER))
  shapes = lambda c: jax.eval_shape(lambda: transformer.init(c, jax.random.key(0)))
  def loss(params, teacher_params, chunk):
    out = head.score(config, params, STATES, TOKENS, with_sum_squares=True, divergence=skewed,
                       teacher=(teacher, teacher_params, TEACHER_STATES), chunk=chunk)
    return sum(out[name].sum() for name in ('log_probs', 'entropy', 'sum_squares', 'divergence'))
  def sizes(chunk):
    text = jax.jit(jax.grad(functools.partial(loss, chunk=chunk))).lower(
        shapes(config), shapes(teacher)).compile().as_text()
    return {int(np.prod([int(n) for n in shape.split(',')]))
            for shape in re.findall(r'f32\[([\d,]+)\]', text)}
  assert B * T * vocab in sizes(T)  # the probe sees them where they are
  assert max(sizes(1)) <= vocab * 16  # the embedding; a chunk's logits have B * vocab
  assert B * vocab in sizes(1)


@pytest.mark.parametrize('mesh', ['data=8', 'fsdp=8', 'data=2,fsdp=2,tensor=2', 'tensor=8'])
def test_devices_change_nothing(mesh):
  expected_out, expected = run(*arguments(), chunk=2)
  mesh = sharding.make_mesh(mesh)
  with sharding.use(mesh):
    placed = (sharding.put(PARAMS, sharding.tree_sharding(mesh, PARAMS)),
              sharding.put(STATES, sharding.batch(mesh)),
              sharding.put(TEACHER_PARAMS, sharding.tree_sharding(mesh, TEACHER_PARAMS)),
              sharding.put(TEACHER_STATES, sharding.batch(mesh)))
    out, gradient = run(*placed, chunk=2)
  chex.assert_trees_all_close(jax.device_get(out), jax.device_get(expected_out), atol=1e-5)
  for one, other in zip(gradient[:2], expected[:2]):
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(other))
    chex.assert_trees_all_close(jax.device_get(one), jax.device_get(other), atol=2e-6 * scale)


def test_rows_that_do_not_split_over_the_devices_run_all_the_same():
  def loss(params, states, tokens):
    return head.score(CONFIG, params, states, tokens, chunk=2)['log_probs'].sum()
  expected = jax.jit(jax.grad(loss))(PARAMS, STATES[:6], TOKENS[:6])
  with sharding.use(sharding.make_mesh('fsdp=8')):
    chex.assert_trees_all_close(
        jax.device_get(jax.jit(jax.grad(loss))(PARAMS, STATES[:6], TOKENS[:6])),
        jax.device_get(expected), atol=1e-4)


@pytest.mark.parametrize('mesh', ['data=8', 'fsdp=8', 'data=2,fsdp=2,tensor=2'])
def test_the_head_gradient_is_added_up_once_however_many_chunks(mesh):
  mesh = sharding.make_mesh(mesh)
  def loss(params, states, tokens, chunk):
    return head.score(CONFIG, params, states, tokens, chunk=chunk)['log_probs'].sum()
  def summed(chunk):
    weights, rows = sharding.tree_sharding(mesh, PARAMS), sharding.batch(mesh)
    with sharding.use(mesh):
      text = jax.jit(jax.grad(functools.partial(loss, chunk=chunk)),
                     in_shardings=(weights, rows, rows), out_shardings=weights).lower(
                         PARAMS, STATES, TOKENS).compile().as_text()
    return collectives.bytes_received(text).get('all-reduce', 0)
  kernel = V * 16 * 4 // mesh.shape['tensor']
  # Split over `tensor`, a chunk's maximum, sum and hit are added up too, some bytes a position.
  assert summed(1) - summed(T) < kernel / 4
  assert kernel < summed(1) < 2 * kernel + 16 * B * T * 4


# --- the gradient made in the forward pass

NAMES = 'log_probs', 'entropy', 'divergence'


def objective(out):
  """Per token, and of none of its outputs linear."""
  return sum(jnp.sum((1 + i) * WEIGHTS * jnp.sin(out[name])) for i, name in enumerate(NAMES))


@functools.partial(jax.jit, static_argnames=('config', 'chunk', 'known'))
def gradients(config, params, states, teacher_params, chunk, known):
  slope = per_token.split(jax.grad(objective), dict.fromkeys(NAMES, jnp.zeros((B, T))))
  def value(params, states):
    out = head.score(config, params, states, TOKENS, temperature=0.7, divergence=skewed,
                     teacher=(TEACHER, teacher_params, TEACHER_STATES), chunk=chunk,
                     slope=slope if known else None)
    return objective(out), out
  return jax.value_and_grad(value, (0, 1), has_aux=True)(params, states)


def assert_gradients_close(one, other):
  chex.assert_trees_all_close(jax.device_get(one[0]), jax.device_get(other[0]), rtol=1e-5)
  for mine, expected in zip(one[1], other[1]):
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(
        jax.device_get(mine), jax.device_get(expected), atol=2e-6 * scale)


@pytest.mark.parametrize('chunk', [1, 2, 5])
@pytest.mark.parametrize('tied', [True, False])
def test_a_gradient_made_in_the_forward_pass_is_that_of_autodiff(tied, chunk):
  config = dataclasses.replace(CONFIG, tie_embeddings=tied)
  params = draw(config, 1)
  expected = gradients(config, params, STATES, TEACHER_PARAMS, T, False)
  assert_gradients_close(
      gradients(config, params, STATES, TEACHER_PARAMS, chunk, True), expected)


def test_a_gradient_made_in_the_forward_pass_on_several_devices():
  expected = gradients(CONFIG, PARAMS, STATES, TEACHER_PARAMS, 2, False)
  mesh = sharding.make_mesh('data=2,fsdp=2,tensor=2')
  with sharding.use(mesh):
    placed = (sharding.put(PARAMS, sharding.tree_sharding(mesh, PARAMS)),
              sharding.put(STATES, sharding.batch(mesh)),
              sharding.put(TEACHER_PARAMS, sharding.tree_sharding(mesh, TEACHER_PARAMS)))
    assert_gradients_close(gradients(CONFIG, *placed, 2, True), expected)


def products(config, *, known, of=(0, 1)):
  """How many products with the head a compiled gradient of log-probs and their sum takes."""
  slope = per_token.constant({'log_probs': jnp.asarray(WEIGHTS)}) if known else None
  def value(params, states):
    out = head.score(config, params, states, TOKENS, chunk=1, slope=slope)['log_probs']
    return jnp.sum(WEIGHTS * out), out
  gradient = jax.jit(jax.grad(value, of, has_aux=True))
  text = gradient.lower(draw(config, 1), STATES).compile().as_text()
  return len(re.findall(r' dot\(', text))


@pytest.mark.parametrize('tied', [True, False])
def test_three_products_instead_of_four_and_two_where_the_head_is_frozen(tied):
  config = dataclasses.replace(CONFIG, tie_embeddings=tied)
  assert products(config, known=False) == 4 and products(config, known=True) == 3
  assert products(config, known=True, of=1) == 2


def test_an_id_out_of_range_is_no_token():
  """Its logit counts as 0 and has no gradient, whether it is too large or negative."""
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
  tokens = jnp.array([[-1, 0, 4], [5, 7, -5]])
  weights = jnp.arange(1.0, 7.0).reshape(2, 3)
  def by_gather(logits):
    return (head._of_tokens(logits, tokens, 5) * weights).sum()
  def by_comparison(logits):
    return ((logits * (tokens[..., None] == jnp.arange(5)[None, None])).sum(-1) * weights).sum()
  np.testing.assert_allclose(by_gather(logits), by_comparison(logits), rtol=1e-6)
  np.testing.assert_array_equal(jax.grad(by_gather)(logits), jax.grad(by_comparison)(logits))
