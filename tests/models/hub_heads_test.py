"""Score heads in directories: fresh on a language model, kept, refused, exported."""

import dataclasses
import json
import shutil

import hub_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax import sharding
from ptjax.models import hf_config
from ptjax.models import hub
from ptjax.models import transformer

CONFIG = hub_models.CONFIG
assert_equal = hub_models.assert_equal
random_params = hub_models.random_params
refusal = hub_models.refusal
REWARD = dataclasses.replace(CONFIG, num_labels=1)
STEPS = dataclasses.replace(hub_models.GPT2, num_labels=2, score_bias=True)


@pytest.fixture(scope='module')
def reward_model(tmp_path_factory, characters):
  directory = tmp_path_factory.mktemp('heads') / 'reward'
  hub.export(directory, REWARD, random_params(REWARD), characters)
  return directory


@pytest.mark.parametrize('config', [
    REWARD, STEPS, dataclasses.replace(hub_models.GPT2, num_labels=1),
    dataclasses.replace(CONFIG, num_labels=3, score_bias=True, tie_embeddings=True)])
def test_export_then_load_is_the_identity(config, tmp_path, characters):
  params = random_params(config)
  hub.export(tmp_path / 'm', config, params, characters)
  loaded_config, loaded, _ = hub.load(tmp_path / 'm')
  assert loaded_config == config == hub.load_config(tmp_path / 'm', num_labels=config.num_labels)
  assert_equal(loaded, params)
  raw = json.loads((tmp_path / 'm' / 'config.json').read_text())
  assert len(raw['id2label']) == len(raw['label2id']) == config.num_labels
  assert not (tmp_path / 'm' / 'generation_config.json').exists()


@pytest.mark.parametrize('bias', [False, True])
def test_a_fresh_head_on_a_language_model(exported, bias):
  config, params, _ = hub.load(exported, num_labels=1, score_bias=bias)
  assert config == dataclasses.replace(REWARD, score_bias=bias)
  body = random_params(CONFIG)
  del body['head']  # the checkpoint's lm_head.weight is not needed, and no reason to refuse
  head = params.pop('score')
  assert_equal(params, body)
  assert_equal(head, transformer.init_score(config, jax.random.key(0)))
  assert ('bias' in head) == bias
  other = hub.load_params(exported, config, key=jax.random.key(1))['score']['kernel']
  assert (other != head['kernel']).any()


def test_a_fresh_head_is_placed_and_cast_as_asked(exported):
  mesh = sharding.make_mesh('fsdp=4,tensor=2')
  config = hub.load_config(exported, num_labels=1, param_dtype='bfloat16')
  shardings = sharding.tree_sharding(mesh, hub.param_shapes(config))
  params = hub.load_params(exported, config, shardings=shardings)
  assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('bfloat16')}
  assert_equal(params['score'], transformer.init_score(config, jax.random.key(0)))


def test_a_head_of_the_checkpoint_is_never_made_afresh(reward_model, tmp_path):
  model = shutil.copytree(reward_model, tmp_path / 'model')
  hub_models.edit_tensors(model, lambda tensors: tensors.pop('score.weight'))
  assert '1 missing: score.weight' in refusal(hub.load, model)


def test_another_number_of_labels_is_refused(reward_model):
  message = refusal(hub.load_config, reward_model, num_labels=2)
  assert 'has 1 labels, not 2' in message and str(reward_model) in message
  assert 'has 1 labels, not 0' in refusal(hub.load_config, reward_model, num_labels=0)


def test_two_labels_are_what_a_file_leaves_out(reward_model, tmp_path):
  raw = json.loads((reward_model / 'config.json').read_text())
  assert hf_config.from_hf(raw).num_labels == 1
  del raw['id2label'], raw['label2id']
  assert hf_config.from_hf(raw).num_labels == 2
  assert hf_config.from_hf({**raw, 'num_labels': 5}).num_labels == 5
  assert hf_config.from_hf({**raw, 'architectures': ['LlamaForCausalLM']}).num_labels == 0


def test_a_token_classifier_that_the_family_lacks_is_refused(tmp_path):
  config = dataclasses.replace(REWARD, family='gemma3_text', score_bias=True)
  assert 'no token classifier for gemma3_text' in refusal(
      hub.export, tmp_path / 'm', config, random_params(config), None)


def test_padding_with_the_end_token_is_not_written(exported, tmp_path):
  """transformers would take the end token for padding and read the score before it."""
  tokenizer = hub.load_tokenizer(exported)
  assert tokenizer.pad_token_id != tokenizer.eos_token_id
  tokenizer.pad_token = tokenizer.eos_token
  hub.export(tmp_path / 'm', REWARD, random_params(REWARD), tokenizer)
  assert json.loads((tmp_path / 'm' / 'config.json').read_text())['pad_token_id'] is None
  hub.export(tmp_path / 'lm', CONFIG, random_params(CONFIG), tokenizer)
  raw = json.loads((tmp_path / 'lm' / 'config.json').read_text())
  assert raw['pad_token_id'] == raw['eos_token_id']


@pytest.mark.parametrize('critic', [
    {'kernel': np.zeros([32, 1]), 'bias': np.zeros([1])}, random_params(REWARD)])
def test_a_policy_is_exported_without_its_critic(critic, tmp_path, characters):
  params = random_params(CONFIG)
  hub.export(tmp_path / 'm', CONFIG, {**params, 'critic': critic}, characters)
  config, loaded, _ = hub.load(tmp_path / 'm')
  assert config == CONFIG
  assert_equal(loaded, params)
