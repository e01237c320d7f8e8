"""Directories and names that cannot be used: one clear line each."""

import dataclasses

import hub_models
import huggingface_hub
import numpy as np
import pytest

from ptjax.models import hub

CONFIG = hub_models.CONFIG
assert_equal = hub_models.assert_equal
random_params = hub_models.random_params
refusal = hub_models.refusal


def test_missing_or_wrong_directory(tmp_path):
  assert 'does not exist' in refusal(hub.load, tmp_path / 'nowhere')
  assert 'does not exist' in refusal(hub.load, './nowhere')
  assert 'config.json' in refusal(hub.load, tmp_path)
  (tmp_path / 'file').write_text('')
  assert 'is a file' in refusal(hub.load, tmp_path / 'file')


def test_hub_name_offline():
  message = refusal(hub.load, 'nobody/no-such-model')
  assert 'nobody/no-such-model' in message and 'HF_HUB_OFFLINE' in message


def test_hub_name_is_fetched_without_pickles(exported, monkeypatch):
  calls = []

  def snapshot_download(name, allow_patterns, ignore_patterns):
    calls.append((name, allow_patterns, ignore_patterns))
    return str(exported)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  assert hub.load('some/model')[0] == CONFIG
  assert hub.load_config('some/model') == CONFIG
  assert [name for name, *_ in calls] == ['some/model'] * 2
  assert '*.safetensors' in calls[0][1] and '*.safetensors' not in calls[1][1]
  assert not any('bin' in pattern for _, allowed, _ in calls for pattern in allowed)


def test_no_weights(model):
  (model / 'model.safetensors').unlink()
  (model / 'training_args.bin').write_bytes(b'')  # a pickle, but not weights
  assert 'no weights' in refusal(hub.load, model)
  (model / 'pytorch_model.bin').write_bytes(b'')
  message = refusal(hub.load, model)
  assert 'pytorch_model.bin' in message and 'convert' in message and 'safetensors' in message
  (model / 'pytorch_model.bin').unlink()
  (model / 'adapter_model.safetensors').write_bytes(b'')
  assert 'adapter' in refusal(hub.load, model)


def test_tensors_that_do_not_fit(model):
  def change(tensors):
    del tensors['model.layers.1.mlp.up_proj.weight']
    tensors['model.layers.0.self_attn.q_proj.bias'] = np.zeros(32, np.float32)
    tensors['model.norm.weight'] = np.zeros(31, np.float32)

  hub_models.edit_tensors(model, change)
  message = refusal(hub.load, model)
  assert '1 missing: model.layers.1.mlp.up_proj.weight' in message
  assert '1 unexpected: model.layers.0.self_attn.q_proj.bias' in message
  assert 'model.norm.weight is [31], not [32]' in message


def test_too_many_wrong_tensors_are_counted(model):
  hub_models.edit_json(model / 'config.json', intermediate_size=40)
  message = refusal(hub.load, model)
  assert '9 wrongly shaped' in message and '(4 more)' in message
  assert 'is [48, 32], not [40, 32]' in message


def test_missing_layer(model):
  hub_models.edit_json(model / 'config.json', num_hidden_layers=4)
  assert 'model.layers.3.' in refusal(hub.load, model)


def test_harmless_buffers_are_ignored(model):
  hub_models.edit_tensors(model, lambda tensors: tensors.update(
      {'model.layers.0.self_attn.rotary_emb.inv_freq': np.zeros(4, np.float32)}))
  assert_equal(hub.load_params(model, CONFIG), random_params(CONFIG))


def test_head_beside_tied_embeddings(model):
  hub_models.edit_json(model / 'config.json', tie_word_embeddings=True)
  tied = dataclasses.replace(CONFIG, tie_embeddings=True)
  message = refusal(hub.load, model)  # transformers would not tie them
  assert 'lm_head.weight' in message and 'tie_word_embeddings' in message
  hub_models.edit_tensors(model, lambda tensors: tensors.update(
      {'lm_head.weight': tensors['model.embed_tokens.weight']}))
  params = random_params(CONFIG)
  del params['head']
  assert_equal(hub.load_params(model, tied), params)


@pytest.mark.parametrize('changes, words', [
    (dict(model_type='bloom'), ('bloom', 'gpt2, llama, mistral, qwen2, qwen3, gemma2')),
    (dict(model_type=None), ('model_type None', 'llama')),
    (dict(rope_scaling={'rope_type': 'longrope'}), ('longrope', 'linear, llama3, yarn')),
    (dict(rope_scaling={'type': 'dynamic', 'factor': 2.0}), ('dynamic', 'linear')),
    (dict(rope_scaling={'rope_type': 'llama3', 'factor': 2.0}), ('lacks low_freq_factor',)),
    (dict(rope_parameters={'rope_theta': 5.0}), ('given twice', '10000.0', '5.0')),
    (dict(rope_theta='big'), ('rope_theta', "'big'")),
    (dict(partial_rotary_factor=0.5), ('partial_rotary_factor',)),
    (dict(hidden_act='relu'), ('relu', 'silu')),
    (dict(hidden_size=None), ('hidden_size is absent',)),
    (dict(num_hidden_layers='3'), ('num_hidden_layers', "'3'")),
    (dict(num_key_value_heads=3), ('num_key_value_heads=3',)),
    (dict(dtype='float8'), ('float8', 'bfloat16')),
    (dict(quantization_config={'quant_method': 'gptq'}), ('quantized', 'gptq')),
    (dict(model_type='qwen2', use_sliding_window=True, sliding_window=8,
          layer_types=['linear_attention'] * 3), ('layer_types', 'linear_attention')),
])
def test_config_that_is_not_supported(changes, words, model):
  hub_models.edit_json(model / 'config.json', **changes)
  message = refusal(hub.load_config, model)
  assert str(model / 'config.json') in message
  assert all(word in message for word in words), message


def test_config_that_is_not_json(model):
  (model / 'config.json').write_text('{"model_type": ')
  assert 'is not JSON' in refusal(hub.load, model)
  (model / 'config.json').write_text('[]')
  assert 'JSON object' in refusal(hub.load, model)


def test_unknown_dtype(exported):
  assert 'float8' in refusal(hub.load, exported, dtype='float8')


def test_truncated_weights(model):
  path = model / 'model.safetensors'
  whole = path.read_bytes()
  for kept in (whole[:-100], whole[:50], b''):
    path.write_bytes(kept)
    message = refusal(hub.load, model)
    assert str(path) in message and 'truncated or corrupt' in message


def test_quantized_tensors(model):
  hub_models.edit_tensors(model, lambda tensors: tensors.update(
      {'model.norm.weight': np.zeros(32, np.int8)}))
  assert 'model.norm.weight I8' in refusal(hub.load, model)


def test_index_naming_a_missing_file(tmp_path, characters):
  hub.export(tmp_path / 'm', CONFIG, random_params(CONFIG), characters, max_file_bytes=20_000)
  lost = sorted((tmp_path / 'm').glob('*.safetensors'))[1]
  lost.unlink()
  assert lost.name in refusal(hub.load, tmp_path / 'm')
  (tmp_path / 'm' / 'model.safetensors.index.json').write_text('{}')
  assert 'is not a safetensors index' in refusal(hub.load, tmp_path / 'm')


def test_no_tokenizer(model):
  for path in model.glob('tokenizer*'):
    path.unlink()
  assert 'no tokenizer' in refusal(hub.load, model)
  (model / 'tokenizer.json').write_text('{}')
  assert 'cannot be loaded' in refusal(hub.load, model)
