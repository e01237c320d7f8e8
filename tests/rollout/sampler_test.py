"""The sampler against the plain model, and against itself under every other schedule."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ptjax import config as settings
from ptjax import keys
from ptjax import sharding
from ptjax import types
from ptjax.models import attention
from ptjax.models import config as config_lib
from ptjax.models import hub
from ptjax.models import policy
from ptjax.models import transformer
from ptjax.rollout import decoding
from ptjax.rollout import sampler
from ptjax.rollout import schedule

P, S, G, T = 3, 8, 2, 20
STOPS = (5, 9)
KEY = keys.stream(0, 'rollout', 0)
CONFIG = config_lib.TransformerConfig(
    family='qwen2', vocab_size=40, width=16, num_layers=2, num_heads=4, num_kv_heads=2,
    mlp_width=32, max_length=128, qkv_bias=True)
LETTERS = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN'


@functools.cache
def params_of(config):
  # Larger than fresh weights, so that the next token depends on the ones before.
  return jax.tree.map(lambda x: 12 * x if x.ndim > 2 else x,
                      jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(0)))


@functools.cache
def sampler_for(config=CONFIG, **options):
  return sampler.make_sampler(config, sampler.SamplingOptions(
      **{'max_tokens': T, 'group_size': G, 'stop_ids': STOPS, **options}), decode_text=decode)


def decode(ids):
  return ''.join(LETTERS[i] for i in ids)


def make_prompts(num=P, width=S, group=G, seed=0):
  rng = np.random.default_rng(seed)
  lengths = np.array([8, 3, 5, 1, 7, 2, 4, 6], np.int32)[:num]
  tokens = rng.integers(0, CONFIG.vocab_size, (8, 8)).astype(np.int32)[:num]
  tokens = np.pad(tokens, ((0, 0), (0, width - 8)), constant_values=7)
  return types.Prompts(tokens=tokens, lengths=lengths, ids=10 + np.arange(num, dtype=np.int32),
                       sample_ids=np.tile(np.arange(group, dtype=np.int32), (num, 1)))


def fetch(rollouts):
  return jax.tree.map(np.asarray, rollouts)


def assert_same(one, other, rows=slice(None)):
  np.testing.assert_array_equal(one.tokens, other.tokens[rows])
  np.testing.assert_array_equal(one.loss_mask, other.loss_mask[rows])
  np.testing.assert_array_equal(one.truncated, other.truncated[rows])
  np.testing.assert_allclose(one.log_probs, other.log_probs[rows], atol=1e-5)


@pytest.fixture(scope='module')
def rollouts():
  """What every other schedule must reproduce."""
  return fetch(sampler_for()(params_of(CONFIG), make_prompts(), KEY))


def test_shapes_mask_and_truncation(rollouts):
  assert rollouts.tokens.shape == (P * G, T) and rollouts.tokens.dtype == np.int32
  assert rollouts.log_probs.dtype == np.float32
  lengths = rollouts.loss_mask.sum(1)
  ended = np.array([row[n - 1] in STOPS for row, n in zip(rollouts.tokens, lengths)])
  # The mask is a prefix; it holds the stop token, which comes last and only once.
  np.testing.assert_array_equal(rollouts.loss_mask, np.arange(T)[None] < lengths[:, None])
  for row, n in zip(rollouts.tokens, lengths):
    assert not set(row[:n - 1]) & set(STOPS)
  np.testing.assert_array_equal(rollouts.truncated, ~ended)
  np.testing.assert_array_equal(lengths[rollouts.truncated], T)
  assert ended.any() and not ended.all()
  assert (rollouts.log_probs[~rollouts.loss_mask] == 0).all()
  assert (rollouts.log_probs[rollouts.loss_mask] < 0).all()


@pytest.mark.parametrize('chunk', [1, 4])
def test_same_tokens_in_any_chunk(rollouts, chunk):
  assert_same(fetch(sampler_for(chunk=chunk)(params_of(CONFIG), make_prompts(), KEY)), rollouts)


def test_same_tokens_alone_and_in_any_order(rollouts):
  prompts = make_prompts()
  alone = fetch(sampler_for()(params_of(CONFIG), jax.tree.map(lambda x: x[1:2], prompts), KEY))
  assert_same(alone, rollouts, slice(G, 2 * G))
  order = np.array([2, 0, 1])
  shuffled = jax.tree.map(lambda x: x[order], prompts)
  shuffled = shuffled.replace(sample_ids=shuffled.sample_ids[:, ::-1])
  rows = (order[:, None] * G + np.arange(G)[None, ::-1]).reshape(-1)
  assert_same(fetch(sampler_for()(params_of(CONFIG), shuffled, KEY)), rollouts, rows)


def test_same_tokens_in_any_padding(rollouts):
  prompts = make_prompts(width=16)
  assert_same(fetch(sampler_for()(params_of(CONFIG), prompts, KEY)), rollouts)


@pytest.mark.slow
@pytest.mark.parametrize('gather', [True, False])
def test_same_tokens_on_a_mesh(rollouts, gather):
  mesh = sharding.make_mesh('data=2,fsdp=2,tensor=2')
  params = params_of(CONFIG)
  params = sharding.put(params, sharding.tree_sharding(mesh, params))
  sample = sampler.make_sampler(
      CONFIG, sampler_for().options, mesh=mesh, gather_weights=gather)
  result = sample(params, make_prompts(), KEY)  # 3 prompts over 4 parts: one is filled up
  assert all(x.is_fully_replicated for x in jax.tree.leaves(result))
  assert_same(fetch(result), rollouts)


@pytest.mark.slow
def test_same_truncated_draws_on_a_mesh():
  options = dict(temperature=1.3, top_k=20, top_p=0.8, min_p=0.02)
  plain = fetch(sampler_for(**options)(params_of(CONFIG), make_prompts(), KEY))
  mesh = sharding.make_mesh('data=2,fsdp=2,tensor=2')
  params = params_of(CONFIG)
  params = sharding.put(params, sharding.tree_sharding(mesh, params))
  sample = sampler.make_sampler(CONFIG, sampler_for(**options).options, mesh=mesh)
  assert_same(fetch(sample(params, make_prompts(), KEY)), plain)


def test_every_step_prompt_and_sample_draws_anew(rollouts):
  # The defect: the same random numbers in every rollout.
  params, prompts = params_of(CONFIG), make_prompts()
  other_step = fetch(sampler_for()(params, prompts, keys.stream(0, 'rollout', 1)))
  assert (other_step.tokens != rollouts.tokens).any(1).all()
  other_ids = fetch(sampler_for()(params, prompts.replace(ids=prompts.ids + 100), KEY))
  assert (other_ids.tokens != rollouts.tokens).any(1).all()
  groups = rollouts.tokens.reshape(P, G, T)
  assert (groups[:, 0] != groups[:, 1]).any(-1).all()
  assert_same(fetch(sampler_for()(params, prompts, KEY)), rollouts)


def test_first_token_has_the_softmax_distribution():
  group = 2000
  prompts = make_prompts(num=1, group=group)
  sample = sampler_for(max_tokens=1, group_size=group, temperature=1.5)
  tokens = fetch(sample(params_of(CONFIG), prompts, KEY)).tokens[:, 0]
  everything = np.arange(CONFIG.vocab_size, dtype=np.int32)[:, None]
  probs = np.exp(policy.log_probs(CONFIG, params_of(CONFIG), prompts.tokens, prompts.lengths,
                                  everything, temperature=1.5)['log_probs'][:, 0],
                 dtype=np.float64)
  counts = np.bincount(tokens, minlength=CONFIG.vocab_size)
  assert (probs * group > 5).all()  # as the test statistic wants
  assert stats.chisquare(counts, group * probs / probs.sum()).pvalue > 1e-3


@pytest.mark.parametrize('options', [{}, {'temperature': 0.7, 'chunk': 5, 'top_k': 8}], ids=str)
def test_log_probs_equal_the_trainers(options):
  params, prompts = params_of(CONFIG), make_prompts()
  result = fetch(sampler_for(**options)(params, prompts, KEY))
  trainer = policy.log_probs(CONFIG, params, prompts.tokens, prompts.lengths, result.tokens,
                             temperature=options.get('temperature', 1.0))['log_probs']
  np.testing.assert_allclose(np.where(result.loss_mask, trainer, 0), result.log_probs, atol=1e-5)


GPT2 = dataclasses.replace(
    CONFIG, family='gpt2', num_kv_heads=4, activation='gelu_tanh', gated_mlp=False, norm='layer',
    norm_bias=True, position='learned', out_bias=True, mlp_bias=True, max_length=32)
GEMMA = dataclasses.replace(
    CONFIG, family='gemma3_text', activation='gelu_tanh', norm_offset=1.0, qk_norm=True,
    post_norms=True, layer_windows=(6, 0), local_rope_theta=1e3, embedding_scale=4.0,
    logit_softcap=20.0, attention_softcap=30.0, qkv_bias=False)


@pytest.mark.slow
@pytest.mark.parametrize('config', [CONFIG, GPT2, GEMMA], ids=lambda c: c.family)
def test_greedy_is_the_argmax_of_the_full_forward(config):
  params, prompts = params_of(config), make_prompts(group=1)
  sample = sampler_for(config, group_size=1, temperature=0.0, stop_ids=())
  result = fetch(sample(params, prompts, KEY))
  for i, n in enumerate(prompts.lengths):
    row = jnp.concatenate([prompts.tokens[i, :n], result.tokens[i]])
    hidden, _ = transformer.forward(
        config, params, row, jnp.arange(row.size),
        attention.prefill(config, jnp.array([row.size]), row.size))
    logits = transformer.logits(config, params, hidden[n - 1:-1])
    np.testing.assert_array_equal(result.tokens[i], logits.argmax(-1))
    np.testing.assert_allclose(
        result.log_probs[i], jax.nn.log_softmax(logits).max(-1), atol=1e-5)


@pytest.mark.slow
def test_stop_string_cuts_alike_in_any_chunk(rollouts):
  params, prompts = params_of(CONFIG), make_prompts()
  # From the middle of completions: a pair of tokens, and one that comes early.
  strings = decode(rollouts.tokens[0, 10:12]), decode(rollouts.tokens[3, 1:3])
  results = [fetch(sampler_for(stop_strings=strings, chunk=chunk)(params, prompts, KEY))
             for chunk in (4, 16)]
  assert_same(*results)
  for row in range(P * G):
    n = rollouts.loss_mask[row].sum()
    ends = [text.find(s) + len(s) for s in strings
            for text in [decode(rollouts.tokens[row, :n])] if s in text]
    cut = min(ends, default=n)
    assert results[0].loss_mask[row].sum() == cut
    np.testing.assert_array_equal(results[0].tokens[row, :cut], rollouts.tokens[row, :cut])
    assert results[0].truncated[row] == (rollouts.truncated[row] and not ends)
  assert results[0].loss_mask[0].sum() <= 12 and results[0].loss_mask[3].sum() == 3


@pytest.mark.slow
def test_stops_early_when_all_are_done(rollouts):
  sample = sampler_for(chunk=4)
  params, prompts = params_of(CONFIG), make_prompts()
  sample(params, prompts, KEY)
  full = sample.last_stats
  tokens = rollouts.loss_mask.sum()
  lengths = rollouts.loss_mask.sum(1)
  live = [(lengths > 1 + 4 * chunk).sum() for chunk in range(5)]
  slots = [min(n for n in (1, 2, 3, 6) if n >= count) for count in live]
  assert full == {'chunks': 5, 'steps': 20, 'prefill_tokens': 16, 'decode_tokens': tokens,
                  'busy_fraction': (tokens - 6) / (4 * sum(slots))}
  everything = sampler_for(chunk=4, stop_ids=tuple(range(CONFIG.vocab_size)))
  result = fetch(everything(params, prompts, KEY))
  assert everything.last_stats['steps'] == 0
  np.testing.assert_array_equal(result.loss_mask.sum(1), 1)
  assert not result.truncated.any()
  # Most tokens stop: a few chunks are run, not all.
  most = sampler_for(chunk=4, stop_ids=tuple(range(0, CONFIG.vocab_size, 2)))
  longest = fetch(most(params, prompts, KEY)).loss_mask.sum(1).max()
  assert 1 < longest < 13
  assert most.last_stats['chunks'] == -(-(longest - 1) // 4)


def test_nothing_is_compiled_again(rollouts):
  sample = sampler_for(stop_ids=())  # nothing ends early, so every call decodes alike
  params, prompts = params_of(CONFIG), make_prompts()
  sample(params, prompts, KEY)
  before = sample.compilations
  events = []
  listen = lambda event, seconds, **_: events.append(event)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    shorter = prompts.replace(lengths=np.array([2, 2, 1], np.int32))
    for step in range(1, 4):
      changed = jax.tree.map(lambda x: x * 1.01, params)
      events.clear()
      sample(changed, shorter, keys.stream(0, 'rollout', step))
      assert not [e for e in events if 'backend_compile' in e]
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert sample.compilations == before
  assert len({name if isinstance(name, str) else name[0] for name, _ in sample._programs}) == 4


def test_the_cache_is_updated_in_place(rollouts):
  chunk = next(p for (name, _), p in sampler_for()._programs.items() if name[0] == 'chunk')
  width = schedule.window_sizes(T)[0] * CONFIG.num_kv_heads * CONFIG.head_dim
  cache_bytes = CONFIG.num_layers * 2 * P * G * width * 4
  assert chunk.memory_analysis().alias_size_in_bytes >= cache_bytes


def test_sines_are_made_outside_the_loop(rollouts):
  chunk = next(p for (name, _), p in sampler_for()._programs.items() if name[0] == 'chunk')
  text = chunk.as_text()
  computations = dict(re.findall(r'^(?:ENTRY )?%([\w.-]+) \(.*?\{\n(.*?)^\}', text, re.M | re.S))
  inside = set(re.findall(r'body=%([\w.-]+)', text))
  for _ in computations:  # and all they call
    called = re.compile(r'(?:calls|to_apply|body)=%([\w.-]+)')
    inside |= {name for one in inside for name in called.findall(computations[one])}
  sines = {name for name, lines in computations.items() if re.search(r' (?:co)?sine\(', lines)}
  assert sines and not sines & inside


# A change of each option, and whether it changes the tokens drawn; else it must raise.
CHANGES = {
    'max_tokens': 7, 'temperature': 0.5, 'top_k': 2, 'top_p': 0.3, 'min_p': 0.5,
    'stop_ids': (1, 2, 3), 'stop_strings': tuple('abcdefgh'), 'group_size': 3, 'chunk': 4,
    'slots': 2,
    'mixture': (0.5, 0.5)}


def test_the_table_of_changes_is_whole():
  assert set(CHANGES) == {f.name for f in dataclasses.fields(sampler.SamplingOptions)}


@pytest.mark.slow
@pytest.mark.parametrize('name', CHANGES)
def test_every_option_is_read(rollouts, name):
  sample = sampler_for(**{name: CHANGES[name]})
  if name in ('group_size', 'mixture'):
    with pytest.raises(ValueError, match=name):
      sample(params_of(CONFIG), make_prompts(), KEY)
    return
  result = fetch(sample(params_of(CONFIG), make_prompts(), KEY))
  if name in ('chunk', 'slots'):  # changes the work, not the result
    sampler_for()(params_of(CONFIG), make_prompts(), KEY)
    assert sample.last_stats['chunks'] > sampler_for().last_stats['chunks']
  else:
    assert (result.tokens.shape != rollouts.tokens.shape
            or (result.tokens != rollouts.tokens).any())


def test_a_mixture_draws_from_the_geometric_mean():
  """Its log-probs against the closed form from each model's own logits."""
  other = jax.tree.map(lambda x: -0.7 * x, params_of(CONFIG))
  both = [params_of(CONFIG), other]
  shares, temperature = np.array([0.3, 0.7]), 0.8
  prompts = make_prompts()
  result = fetch(sampler_for(mixture=tuple(shares), temperature=temperature)(both, prompts, KEY))

  def log_softmax(params):
    states = policy.hidden(CONFIG, params, prompts.tokens, prompts.lengths, result.tokens)
    logits = np.asarray(transformer.logits(CONFIG, params, states), np.float64) / temperature
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
  mixed = sum(share * log_softmax(params) for share, params in zip(shares, both))
  mixed -= np.logaddexp.reduce(mixed, axis=-1, keepdims=True)
  expected = np.take_along_axis(mixed, result.tokens[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(result.log_probs, np.where(result.loss_mask, expected, 0), atol=2e-5)


def test_a_mixture_with_one_share_is_that_model(rollouts):
  both = [jax.tree.map(lambda x: -0.7 * x, params_of(CONFIG)), params_of(CONFIG)]
  assert_same(fetch(sampler_for(mixture=(0.0, 1.0))(both, make_prompts(), KEY)), rollouts)
  with pytest.raises(ValueError, match='1 models for a mixture of 2'):
    sampler_for(mixture=(0.0, 1.0))(both[:1], make_prompts(), KEY)
  with pytest.raises(settings.UserError, match='mixture.*sum to 1'):
    sampler.SamplingOptions(max_tokens=1, mixture=(0.5, 0.6))


@pytest.mark.slow
def test_half_precision_over_full_weights():
  config = dataclasses.replace(CONFIG, dtype='bfloat16')
  prompts = make_prompts()
  sample = sampler_for(config)
  result = fetch(sample(params_of(config), prompts, KEY))
  trainer = policy.log_probs(config, params_of(config), prompts.tokens, prompts.lengths,
                             result.tokens)['log_probs']
  gap = np.abs(np.where(result.loss_mask, trainer, 0) - result.log_probs)
  assert gap.max() < 0.1  # 2^-8 relative, in logits of about 10
  weights = jax.eval_shape(lambda p: decoding.decode_weights(config, p), params_of(config))
  assert {str(x.dtype) for x in jax.tree.leaves(weights) if x.ndim > 1} == {'bfloat16'}
  assert weights['final_norm']['scale'].dtype == np.float32


@pytest.mark.slow
def test_golden_greedy_text_of_a_real_model(shared_data):
  config, params, _ = hub.load(str(shared_data / 'models' / 'stories260K'), dtype='float32')
  golden = json.loads((shared_data / 'models' / 'stories260K_golden.json').read_text())['prompts']
  tokens = [row['input_ids'] for row in golden]
  longest = max(len(row['greedy_ids']) for row in golden)
  prompts = types.Prompts(
      tokens=np.array([t + [0] * (max(map(len, tokens)) - len(t)) for t in tokens], np.int32),
      lengths=np.array([len(t) for t in tokens], np.int32),
      ids=np.arange(len(tokens), dtype=np.int32),
      sample_ids=np.zeros((len(tokens), 1), np.int32))
  sample = sampler.make_sampler(
      config, sampler.SamplingOptions(max_tokens=longest, temperature=0.0))
  result = fetch(sample(params, prompts, KEY))
  for row, expected in zip(result.tokens, golden):
    np.testing.assert_array_equal(row[:len(expected['greedy_ids'])], expected['greedy_ids'])


@pytest.mark.parametrize('bad', [
    {'max_tokens': 0}, {'temperature': -1.0}, {'temperature': float('nan')}, {'top_k': -1},
    {'top_k': 0.5}, {'top_p': 0.0}, {'top_p': 1.5}, {'min_p': -0.1}, {'group_size': 0},
    {'chunk': 0}, {'slots': -1}, {'stop_ids': 5}, {'stop_ids': ('a',)}, {'stop_strings': 'stop'},
    {'stop_strings': ('',)}], ids=str)
def test_bad_options_are_refused_by_name(bad):
  with pytest.raises(settings.UserError, match=next(iter(bad))):
    sampler.SamplingOptions(**{'max_tokens': 4, **bad})


def test_options_are_checked_against_the_model():
  with pytest.raises(settings.UserError, match='stop_strings'):
    sampler.make_sampler(CONFIG, sampler.SamplingOptions(max_tokens=4, stop_strings=('x',)))
  with pytest.raises(settings.UserError, match='40'):
    sampler.make_sampler(CONFIG, sampler.SamplingOptions(max_tokens=4, stop_ids=(40,)))


def test_prompts_that_cannot_be_run_are_refused():
  prompts = make_prompts()
  with pytest.raises(settings.UserError, match='row 11'):
    empty = prompts.replace(lengths=np.array([3, 0, 2], np.int32))
    sampler_for()(params_of(CONFIG), empty, KEY)
  with pytest.raises(settings.UserError, match='128 positions'):
    sampler_for(max_tokens=121)(params_of(CONFIG), prompts, KEY)
