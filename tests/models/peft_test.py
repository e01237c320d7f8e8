"""Adapters in PEFT's format, both ways, against PEFT itself; needs torch (the `parity` extra)."""

import dataclasses
import functools
import json
import pathlib
import shutil

import hub_models
import jax
import jax.numpy as jnp
import numpy as np
import peft_models
import pytest
from safetensors import numpy as safetensors_numpy
import transformers

from ptjax import config as settings
from ptjax import sharding
from ptjax.data import tokenizer as data_tokenizer
from ptjax.models import hub
from ptjax.models import lora
from ptjax.models import peft
from ptjax.models import transformer

theirs, torch = peft_models.theirs, peft_models.torch
ALL, TOKENS, VARIANTS = peft_models.ALL, peft_models.TOKENS, peft_models.VARIANTS
VOCAB, WIDTH = peft_models.VOCAB, peft_models.WIDTH
base_model, noisy = peft_models.base_model, peft_models.noisy
made_by_peft, made_by_us = peft_models.made_by_peft, peft_models.made_by_us
our_logits, torch_logits = peft_models.our_logits, peft_models.torch_logits

# Float32 sums in another order, logits of size 5; measured at most 5e-6.
TOLERANCE = 2e-5


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
  """`name -> directory` of a random base model, made once."""
  return functools.cache(functools.partial(
      peft_models.save_base, tmp_path_factory.mktemp('bases')))


# Ours, opened by PEFT.


@pytest.mark.parametrize('targets', [('all-linear',), ('query', 'value'), ('key', 'down', 'out')])
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('name', ['qwen2', 'gpt2'])
def test_peft_opens_what_we_save(name, variant, targets, bases, tmp_path):
  if name == 'gpt2' and variant == 'dora' and targets != ('all-linear',):
    targets = ('query', 'key', 'value', 'down')
  directory = bases(name)
  config, params, adapters, own = made_by_us(directory, dict(variant=variant, targets=targets))
  peft.save(tmp_path / 'a', config, adapters, own, base=directory)
  model = theirs.PeftModel.from_pretrained(base_model(directory), tmp_path / 'a')
  got = our_logits(config, lora.join(params, adapters, own.scale))
  np.testing.assert_allclose(got, torch_logits(model), atol=TOLERANCE)
  assert np.abs(got - our_logits(config, params)).max() > 0.1
  # PEFT has a place for every tensor of the file, and no adapter of its own beside them.
  stored = safetensors_numpy.load_file(tmp_path / 'a' / peft.WEIGHTS)
  placed = theirs.get_peft_model_state_dict(model)
  assert set(stored) == set(placed)
  for key, tensor in placed.items():
    np.testing.assert_array_equal(tensor.numpy(), stored[key])


def test_fused_kernels_make_one_adapter_of_blocks(bases, tmp_path):
  config, _, adapters, own = made_by_us(bases('gpt2'), dict(targets=('query', 'value', 'down')))
  peft.save(tmp_path / 'a', config, adapters, own, base='gpt2')
  raw = json.loads((tmp_path / 'a' / peft.CONFIG).read_text())
  assert sorted(raw['target_modules']) == ['c_attn', 'mlp.c_proj'] and raw['fan_in_fan_out']
  assert raw['rank_pattern'] == {'c_attn': 8} and raw['alpha_pattern'] == {'c_attn': 12.0}
  stored = safetensors_numpy.load_file(tmp_path / 'a' / peft.WEIGHTS)
  b = stored['base_model.model.transformer.h.1.attn.c_attn.lora_B.weight']  # [out, r]
  assert b.shape == (3 * WIDTH, 8)
  filled = [[bool(np.any(b[i:i + WIDTH, j:j + 4])) for j in (0, 4)] for i in (0, WIDTH, 2 * WIDTH)]
  assert filled == [[True, False], [False, False], [False, True]]


def test_dora_on_part_of_a_fused_matrix_is_refused(bases, tmp_path):
  config, _, adapters, own = made_by_us(
      bases('gpt2'), dict(targets=('query', 'value'), variant='dora'))
  for message in (hub_models.refusal(peft.check, config, own),
                  hub_models.refusal(
                      peft.save, tmp_path / 'a', config, adapters, own, base='gpt2')):
    assert 'all of query, key, value' in message and 'c_attn' in message
  assert not (tmp_path / 'a').exists()
  peft.check(config, dataclasses.replace(own, targets=('down', 'out')))
  peft.check(config, dataclasses.replace(own, targets=('all-linear',)))
  peft.check(config, dataclasses.replace(own, variant='lora'))
  peft.check(hub.load_config(bases('qwen2')), own)


def test_a_base_directory_is_found_from_anywhere(bases, tmp_path, monkeypatch):
  config, _, adapters, own = made_by_us(bases('qwen2'), {})
  monkeypatch.chdir(pathlib.Path(bases('qwen2')).parent)
  peft.save(tmp_path / 'a', config, adapters, own, base='qwen2')
  monkeypatch.chdir(tmp_path)
  assert hub.load_config('a') == config
  peft.save(tmp_path / 'a', config, adapters, own, base='Qwen/Qwen2.5-0.5B')
  assert peft.base_of('a') == 'Qwen/Qwen2.5-0.5B'


def test_an_earlier_adapter_is_replaced_and_nothing_else(bases, tmp_path):
  config, _, adapters, own = made_by_us(bases('qwen2'), {})
  for _ in range(2):
    peft.save(tmp_path / 'a', config, adapters, own, base='b')
  assert sorted(path.name for path in (tmp_path / 'a').iterdir()) == [peft.CONFIG, peft.WEIGHTS]
  (tmp_path / 'thesis').mkdir()
  (tmp_path / 'thesis' / 'text').write_text('five years')
  assert 'is not an adapter directory' in hub_models.refusal(
      peft.save, tmp_path / 'thesis', config, adapters, own, base='b')


# PEFT's, opened by us.


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('name', ['qwen2', 'gpt2'])
def test_we_open_what_peft_saves(name, variant, bases, tmp_path):
  expected = made_by_peft(bases(name), name, tmp_path, **VARIANTS[variant])
  directory = bases(name)
  config = hub.load_config(directory)
  params = hub.load_params(directory, config)
  adapters, own = peft.load(tmp_path, config, base=directory)
  assert (own.variant, own.rank, own.alpha) == (variant, 4, 6.0)
  assert set(own.targets) == {'query', 'key', 'value', 'out', 'up', 'down'} | (
      {'gate'} if name == 'qwen2' else set())
  got = our_logits(config, lora.join(params, adapters, own.scale))
  np.testing.assert_allclose(got, expected, atol=TOLERANCE)
  # And as a model of its own, merged.
  merged_config, whole = hub.load_config(tmp_path), hub.load_params(tmp_path, config)
  assert merged_config == config
  np.testing.assert_allclose(our_logits(config, whole), expected, atol=TOLERANCE)


@pytest.mark.parametrize('options', [
    dict(rank_pattern={'q_proj': 2, r'layers\.1\..*v_proj': 3}, alpha_pattern={'down_proj': 1}),
    dict(layers_to_transform=[1], target_modules=['q_proj', 'up_proj']),
    dict(use_dora=True, use_rslora=True), dict(init_lora_weights='gaussian', lora_dropout=0.5),
    dict(target_modules='all-linear'), dict(target_modules=r'.*\.1\.mlp\.(up|down)_proj')],
    ids=['patterns', 'layers', 'dora-rslora', 'gaussian', 'all-linear', 'regex'])
def test_we_open_every_way_of_placing_them(options, bases, tmp_path):
  model = noisy(theirs.get_peft_model(base_model(bases('qwen2')), theirs.LoraConfig(
      **{'r': 4, 'lora_alpha': 6, 'target_modules': ALL['qwen2'], **options}))).eval()
  model.save_pretrained(tmp_path)
  config = hub.load_config(bases('qwen2'))
  adapters, own = peft.load(tmp_path, config)
  joined = lora.join(hub.load_params(bases('qwen2'), config), adapters, own.scale)
  np.testing.assert_allclose(our_logits(config, joined), torch_logits(model), atol=TOLERANCE)
  peft.save(tmp_path / 'again', config, adapters, own, base=bases('qwen2'))
  again = theirs.PeftModel.from_pretrained(base_model(bases('qwen2')), tmp_path / 'again')
  np.testing.assert_allclose(torch_logits(again), torch_logits(model), atol=TOLERANCE)


def test_save_then_load_is_the_identity(bases, tmp_path):
  config, _, adapters, own = made_by_us(bases('llama'), dict(variant='rslora'))
  peft.save(tmp_path / 'a', config, adapters, own, base='b')
  loaded, found = peft.load(tmp_path / 'a', config)
  assert dataclasses.replace(found, targets=('all-linear',)) == own
  jax.tree.map(np.testing.assert_array_equal, loaded, adapters)


@pytest.mark.parametrize('kind', ['sequence', 'token'])
@pytest.mark.parametrize('name', ['qwen2', 'gpt2'])
def test_heads_that_score_go_along(name, kind, bases, tmp_path):
  """A reward model's and a process reward model's head train whole, and PEFT keeps them so."""
  labels, bias = (1, False) if kind == 'sequence' else (2, True)
  directory = bases(name)
  config = hub.load_config(directory, num_labels=labels, score_bias=bias)
  params = hub.load_params(directory, config)
  own = settings.LoraSettings(rank=4, alpha=6.0)
  random = np.random.default_rng(5)
  adapters = jax.tree.map(lambda x: x + 0.1 * random.standard_normal(x.shape).astype(np.float32),
                          lora.init(params, own, jax.random.key(0)))
  peft.save(tmp_path / 'a', config, adapters, own, base=directory)
  classifier = (transformers.AutoModelForSequenceClassification if kind == 'sequence'
                else transformers.AutoModelForTokenClassification)
  model = classifier.from_pretrained(directory, dtype=torch.float32, num_labels=labels,
                                     pad_token_id=VOCAB - 1, attn_implementation='eager')
  opened = theirs.PeftModel.from_pretrained(model, tmp_path / 'a').eval()
  expected = torch_logits(opened)
  hidden = peft_models.our_hidden(config, lora.join(params, adapters, own.scale))
  got = transformer.head_scores(config, adapters['score'], hidden)
  got = got[:, -1] if kind == 'sequence' else got
  np.testing.assert_allclose(got, expected, atol=TOLERANCE)

  opened.save_pretrained(tmp_path / 'theirs')  # and back
  loaded, _ = peft.load(tmp_path / 'theirs', config)
  jax.tree.map(np.testing.assert_array_equal, loaded['score'], adapters['score'])
  whole = hub.load_params(tmp_path / 'theirs', config)
  jax.tree.map(np.testing.assert_array_equal, whole['score'], adapters['score'])
  message = hub_models.refusal(peft.load, tmp_path / 'theirs', hub.load_config(directory))
  assert 'unexpected' in message and '.weight' in message


def test_a_fresh_head_on_an_adapter_of_a_language_model(bases, tmp_path):
  made_by_peft(bases('qwen2'), 'qwen2', tmp_path)
  config, params = hub.load_config(tmp_path, num_labels=1), hub.load_params(
      tmp_path, hub.load_config(tmp_path, num_labels=1))
  body = hub.load_params(tmp_path, hub.load_config(tmp_path))
  head = params.pop('score')
  assert head['kernel'].shape == (config.width, 1)
  jax.tree.map(np.testing.assert_array_equal, params, body)


# Training.


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('name', ['qwen2', 'gpt2'])
def test_one_step_equals_pefts(name, variant, bases, tmp_path):
  """One step of plain gradient descent on the adapters, in both, from the same noisy ones.

  GPT-2's c_attn is left out: PEFT lets query, key and value share one A, we do not.
  """
  targets = ALL[name][1:] if name == 'gpt2' else ALL[name]
  made_by_peft(bases(name), name, tmp_path, target_modules=targets, **VARIANTS[variant])
  model = theirs.PeftModel.from_pretrained(
      base_model(bases(name)), tmp_path, is_trainable=True).train(False)
  rate = 0.5
  optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
  ids = torch.tensor(TOKENS)
  logits = model(ids).logits[:, :-1]
  torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), ids[:, 1:].reshape(-1)).backward()
  optimizer.step()
  model.save_pretrained(tmp_path / 'stepped')

  config = hub.load_config(bases(name))
  params = hub.load_params(bases(name), config)
  before, own = peft.load(tmp_path, config)

  @jax.jit
  def gradient(adapters):
    def loss(adapters):
      out = jax.nn.log_softmax(our_logits(config, lora.join(params, adapters, own.scale))[:, :-1])
      return -jnp.take_along_axis(out, TOKENS[:, 1:, None], axis=-1).mean()
    return jax.grad(loss)(adapters)

  after = jax.tree.map(lambda w, g: w - rate * g, before, gradient(before))
  expected, _ = peft.load(tmp_path / 'stepped', config)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), after, expected)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)
  assert min(jax.tree.leaves(moved)) > 1e-4


# As a model.


def test_adapter_directory_is_a_model(bases, tmp_path):
  made_by_peft(bases('qwen2'), 'qwen2', tmp_path / 'a')
  shutil.copytree(bases('qwen2'), tmp_path / 'base')
  raw = json.loads((tmp_path / 'a' / peft.CONFIG).read_text())
  (tmp_path / 'a' / peft.CONFIG).write_text(
      json.dumps({**raw, 'base_model_name_or_path': str(tmp_path / 'base')}))
  base_tokenizer = data_tokenizer.characters('abc')
  base_tokenizer.save_pretrained(tmp_path / 'base')
  config, params, found = hub.load(tmp_path / 'a', param_dtype='bfloat16')
  assert found('cab').input_ids == base_tokenizer('cab').input_ids
  assert config.param_dtype == 'bfloat16'
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('bfloat16')}
  assert hub.load_stop_ids(tmp_path / 'a', found) == hub.load_stop_ids(tmp_path / 'base', found)
  data_tokenizer.characters('abcd').save_pretrained(tmp_path / 'a')  # its own goes first
  assert len(hub.load_tokenizer(tmp_path / 'a')) == len(base_tokenizer) + 1
  hub.export(tmp_path / 'whole', config, params, found)
  assert not peft.is_adapter(tmp_path / 'whole')
  reloaded = hub.load_params(tmp_path / 'whole', config)
  jax.tree.map(np.testing.assert_array_equal, reloaded, params)


def test_sharded_merge(bases, tmp_path):
  made_by_peft(bases('qwen2'), 'qwen2', tmp_path)
  config = hub.load_config(tmp_path)
  mesh = sharding.make_mesh('data=2,fsdp=2,tensor=2')
  found = hub.load_params(
      tmp_path, config, shardings=lambda shapes: sharding.tree_sharding(mesh, shapes))
  plain = hub.load_params(tmp_path, config)
  assert jax.tree.map(lambda leaf: leaf.sharding, found) == sharding.tree_sharding(mesh, plain)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, plain)
