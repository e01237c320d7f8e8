"""Adapters that do not fit, are not supported or are damaged: one clear line each."""

import dataclasses
import functools
import shutil

import hub_models
import numpy as np
import peft_models
import pytest
from safetensors import numpy as safetensors_numpy

from ptjax.models import hub
from ptjax.models import peft


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
  """`name -> directory` of a random base model, made once."""
  return functools.cache(functools.partial(
      peft_models.save_base, tmp_path_factory.mktemp('bases')))


@pytest.fixture(scope='module')
def adapter(bases, tmp_path_factory):
  folder = tmp_path_factory.mktemp('adapter') / 'a'
  peft_models.made_by_peft(bases('qwen2'), 'qwen2', folder, target_modules=['q_proj', 'down_proj'])
  return folder


@pytest.fixture
def spoilt(adapter, tmp_path):
  return shutil.copytree(adapter, tmp_path / 'a')


def edit(folder, **changes):
  hub_models.edit_json(folder / peft.CONFIG, **changes)


def edit_tensors(folder, change):
  tensors = safetensors_numpy.load_file(folder / peft.WEIGHTS)
  change(tensors)
  safetensors_numpy.save_file(tensors, folder / peft.WEIGHTS)


def test_another_base(adapter, bases):
  qwen2 = hub.load_config(bases('qwen2'))
  message = hub_models.refusal(peft.load, adapter, qwen2, base='/models/other')
  assert bases('qwen2') in message and '/models/other' in message
  peft.load(adapter, qwen2, base='Somebody/Qwen2')  # the same model in another place
  message = hub_models.refusal(peft.load, adapter, dataclasses.replace(qwen2, width=64, head_dim=8))
  assert '4 wrongly shaped' in message and 'q_proj.lora_a is [4, 32], not [4, 64]' in message
  assert 'width 64' in message and bases('qwen2') in message
  message = hub_models.refusal(peft.load, adapter, hub.load_config(bases('gpt2')))
  assert '8 unexpected' in message and 'layers.0.self_attn.q_proj' in message
  message = hub_models.refusal(peft.load, adapter, dataclasses.replace(
      qwen2, num_layers=1, layer_windows=None))
  assert '4 unexpected' in message and 'layers.1.' in message


@pytest.mark.parametrize('changes, words', [
    (dict(peft_type='IA3'), ('peft_type', 'IA3', 'LORA')),
    (dict(bias='all'), ("bias='all'", 'none')),
    (dict(init_lora_weights='pissa'), ('pissa', 'gaussian')),
    (dict(target_parameters=['experts']), ('target_parameters', 'merge the adapter with peft')),
    (dict(some_future_variant={'x': 1}), ('some_future_variant', 'merge')),
    (dict(r=0), ('r=0', 'positive')), (dict(lora_alpha='big'), ('lora_alpha', "'big'"))])
def test_settings_that_are_not_supported(changes, words, spoilt, bases):
  edit(spoilt, **changes)
  message = hub_models.refusal(peft.load, spoilt, hub.load_config(bases('qwen2')))
  assert str(spoilt) in message and all(word in message for word in words), message


def test_damaged_files(spoilt, bases):
  config = hub.load_config(bases('qwen2'))
  key = 'base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight'
  edit_tensors(spoilt, lambda tensors: tensors.pop(key))
  message = hub_models.refusal(peft.load, spoilt, config)
  assert '1 missing: model.layers.1.self_attn.q_proj.lora_b' in message
  edit_tensors(spoilt, lambda tensors: tensors.update({
      key: np.zeros((32, 4), np.float32),
      'base_model.model.model.embed_tokens.weight': np.zeros((64, 32), np.float32)}))
  assert '1 unexpected: embed_tokens.weight' in hub_models.refusal(peft.load, spoilt, config)
  whole = (spoilt / peft.WEIGHTS).read_bytes()
  (spoilt / peft.WEIGHTS).write_bytes(whole[:-50])
  assert 'truncated or corrupt' in hub_models.refusal(peft.load, spoilt, config)
  (spoilt / peft.WEIGHTS).unlink()
  assert 'pickle' in hub_models.refusal(peft.load, spoilt, config)


def test_dora_lacking_a_layer_is_refused(bases, tmp_path):
  """Its magnitudes would be the base's norms, which the adapter does not hold."""
  peft_models.made_by_peft(
      bases('qwen2'), 'qwen2', tmp_path, use_dora=True, layers_to_transform=[1])
  message = hub_models.refusal(peft.load, tmp_path, hub.load_config(bases('qwen2')))
  assert 'missing: model.layers.0.' in message


def test_a_base_that_is_not_there(spoilt):
  edit(spoilt, base_model_name_or_path='/nowhere/base')
  message = hub_models.refusal(hub.load_config, spoilt)
  assert str(spoilt) in message and '/nowhere/base does not exist' in message
  edit(spoilt, base_model_name_or_path=None)
  assert 'names no base model' in hub_models.refusal(hub.load_config, spoilt)
