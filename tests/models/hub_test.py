"""Loading and exporting without torch: round trips, and where each leaf goes."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import textwrap

import hub_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from ptjax import sharding
from ptjax.data import tokenizer as tokenizers
from ptjax.models import hf_config
from ptjax.models import hf_weights
from ptjax.models import hub
from ptjax.models import presets

CONFIG = hub_models.CONFIG
GPT2 = hub_models.GPT2
assert_equal = hub_models.assert_equal
random_params = hub_models.random_params
refusal = hub_models.refusal


# Round trips.


def test_a_tokenizer_of_our_own_comes_back_in_any_family(tmp_path):
  ours = tokenizers.characters()
  text = 'two  spaces\nand a line'
  for config in (presets.get('tiny', vocab_size=len(ours), num_layers=1), GPT2):  # Qwen2; GPT-2
    config = dataclasses.replace(config, vocab_size=len(ours))
    hub.export(tmp_path / config.family, config, random_params(config), ours)
    again = hub.load_tokenizer(tmp_path / config.family)
    assert again(text)['input_ids'] == ours(text)['input_ids']
    assert again.decode(again(text)['input_ids'], skip_special_tokens=True) == text


@pytest.mark.parametrize('config', [
    CONFIG, GPT2, dataclasses.replace(CONFIG, tie_embeddings=True, param_dtype='bfloat16')])
@pytest.mark.parametrize('max_file_bytes', [hub.MAX_FILE_BYTES, 20_000])
def test_export_then_load_is_the_identity(config, max_file_bytes, tmp_path, characters):
  params = random_params(config)
  hub.export(tmp_path / 'model', config, params, characters, max_file_bytes=max_file_bytes)
  files = list((tmp_path / 'model').glob('*.safetensors'))
  assert (len(files) > 1) == (max_file_bytes == 20_000)
  assert all(f.stat().st_size < 30_000 for f in files) or len(files) == 1
  loaded_config, loaded, loaded_tokenizer = hub.load(tmp_path / 'model', dtype=config.dtype)
  assert loaded_config == config
  assert jax.tree.map(lambda x: x.dtype, loaded) == jax.tree.map(lambda x: x.dtype, params)
  assert_equal(loaded, params)
  assert loaded_tokenizer('fade').input_ids == characters('fade').input_ids
  assert sorted(os.listdir(tmp_path)) == ['model']  # nothing temporary is left


def test_dtypes_apart(exported):
  config, params, _ = hub.load(exported, dtype='bfloat16')
  assert (config.dtype, config.param_dtype) == ('bfloat16', 'float32')
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  config, params, _ = hub.load(exported, param_dtype='bfloat16')
  assert (config.dtype, config.param_dtype) == ('float32', 'bfloat16')
  assert_equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(CONFIG)))


def test_export_replaces_a_model_whole_or_not_at_all(model, characters, monkeypatch):
  new = random_params(CONFIG, seed=1)
  with monkeypatch.context() as patch:
    patch.setattr(safetensors_numpy, 'save_file', lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      hub.export(model, CONFIG, new, characters)
  assert_equal(hub.load_params(model, CONFIG), random_params(CONFIG))
  assert os.listdir(model.parent) == ['model']
  hub.export(model, CONFIG, new, characters, max_file_bytes=20_000)
  assert_equal(hub.load_params(model, CONFIG), new)  # no file of the old one is in the way


def test_export_keeps_what_is_not_a_model(tmp_path, characters):
  (tmp_path / 'thesis.txt').write_text('five years')
  assert 'not a model directory' in refusal(
      hub.export, tmp_path, CONFIG, random_params(CONFIG), characters)
  assert (tmp_path / 'thesis.txt').read_text() == 'five years'


def test_export_refuses_what_the_family_cannot_say(tmp_path, characters):
  config = dataclasses.replace(CONFIG, qkv_bias=True)  # in llama the output has one too
  message = refusal(hub.export, tmp_path / 'm', config, random_params(config), characters)
  assert 'llama' in message and 'qkv_bias=True' in message
  config = dataclasses.replace(CONFIG, family='mamba')
  assert 'gemma3_text' in refusal(hub.export, tmp_path / 'm', config, {
      'embed': {'embedding': np.zeros([1, 1])}}, characters)
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('name', presets.names())
def test_every_preset_has_a_config_json(name):
  config = presets.get(name)
  raw = json.loads(json.dumps(hf_config.to_hf(config, dtype='bfloat16')))
  assert hf_config.from_hf(raw) == dataclasses.replace(
      config, dtype='bfloat16', param_dtype='bfloat16')


def test_stop_ids(tmp_path, characters):
  hub.export(tmp_path / 'm', CONFIG, random_params(CONFIG), characters, stop_ids=(2, 5))
  assert characters.eos_token_id == 2
  assert hub.load_stop_ids(tmp_path / 'm', characters) == (2, 5)
  (tmp_path / 'm' / 'generation_config.json').unlink()
  assert hub.load_stop_ids(tmp_path / 'm', characters) == (2,)
  hub_models.edit_json(tmp_path / 'm' / 'config.json', eos_token_id=[7])
  assert hub.load_stop_ids(tmp_path / 'm', characters) == (2, 7)


# Placement.


@pytest.mark.parametrize('config', [CONFIG, GPT2])
def test_each_device_gets_its_part_alone(config, tmp_path, characters, monkeypatch):
  """The host never assembles more of a leaf than one device holds, nor one part twice."""
  params = random_params(config)
  hub.export(tmp_path / 'm', config, params, characters)
  mesh = sharding.make_mesh('data=2,fsdp=2,tensor=2')
  assembled = []  # per leaf: (shape, sharding, the parts made)
  original = jax.make_array_from_callback

  def recording(shape, target, callback):
    parts = []
    assembled.append((shape, target, parts))

    def record(index):
      parts.append(callback(index))
      return parts[-1]
    return original(shape, target, record)

  monkeypatch.setattr(jax, 'make_array_from_callback', recording)
  shardings = sharding.tree_sharding(mesh, hub.param_shapes(config))
  loaded = hub.load_params(tmp_path / 'm', config, shardings=shardings)
  assert_equal(loaded, params)
  assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == shardings

  assert len(assembled) == len(jax.tree.leaves(params))
  kernels = 0
  for shape, target, parts in assembled:
    assert {part.shape for part in parts} == {target.shard_shape(shape)}
    if len(shape) == 3:  # a stacked kernel: fsdp 2 x tensor 2, and both `data` replicas
      kernels += 1
      assert all(part.size * 4 == np.prod(shape) for part in parts)
      assert len(parts) == 8 and len({id(part) for part in parts}) == 4
  assert kernels >= 6


def test_shardings_as_a_function(exported):
  mesh = sharding.make_mesh('fsdp=4,tensor=2')
  loaded = hub.load_params(
      exported, CONFIG, shardings=lambda shapes: sharding.tree_sharding(mesh, shapes))
  assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == sharding.tree_sharding(
      mesh, random_params(CONFIG))
  assert_equal(loaded, random_params(CONFIG))


def test_files_are_read_once_and_by_slices(exported, monkeypatch):
  """Reads are as small as one layer of one device's part; every byte is read exactly once."""
  sizes = []
  original = hf_weights.Checkpoint.read

  def read(self, name, index):
    tensor = original(self, name, index)
    sizes.append(tensor.nbytes)
    return tensor

  monkeypatch.setattr(hf_weights.Checkpoint, 'read', read)
  mesh = sharding.make_mesh('fsdp=8')
  hub.load_params(
      exported, CONFIG, shardings=lambda shapes: sharding.tree_sharding(mesh, shapes))
  params = random_params(CONFIG)
  assert max(sizes) == params['embed']['embedding'].nbytes // 8
  assert sum(sizes) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.fixture
def unused_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


_PROCESS = textwrap.dedent('''
    import sys
    import jax
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    from ptjax import sharding
    from ptjax.models import hub
    mesh = sharding.make_mesh('fsdp=2,tensor=2')
    config, params, tokenizer = hub.load(
        sys.argv[3], shardings=lambda shapes: sharding.tree_sharding(mesh, shapes))
    assert not params['head']['kernel'].is_fully_addressable
    hub.export(sys.argv[4], config, params, tokenizer, max_file_bytes=20_000)
    hub.load_config(sys.argv[4])  # there for every process
    ''')


@pytest.mark.slow
def test_two_processes_load_and_export(exported, tmp_path, unused_port):
  environment = dict(
      os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS='--xla_force_host_platform_device_count=2')
  processes = [
      subprocess.Popen(
          [sys.executable, '-c', _PROCESS, f'localhost:{unused_port}', str(i), str(exported),
           str(tmp_path / 'm')], env=environment, stderr=subprocess.PIPE, text=True)
      for i in range(2)]
  for process in processes:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
  assert_equal(hub.load_params(tmp_path / 'm', CONFIG), random_params(CONFIG))
