"""Loading and exporting without torch: placement, the real checkpoint, and everything unusable."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from ptjax import config as settings
from ptjax import sharding
from ptjax.data import tokenizer as data_tokenizer
from ptjax.models import attention
from ptjax.models import config as config_lib
from ptjax.models import hf_config
from ptjax.models import hf_weights
from ptjax.models import hub
from ptjax.models import presets
from ptjax.models import transformer

CONFIG = config_lib.TransformerConfig(
    family='llama', vocab_size=64, width=32, num_layers=3, num_heads=4, num_kv_heads=2,
    mlp_width=48, max_length=64, tie_embeddings=False)
GPT2 = config_lib.TransformerConfig(
    family='gpt2', vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=4,
    mlp_width=48, max_length=64, activation='gelu_tanh', gated_mlp=False, norm='layer',
    norm_epsilon=1e-5, position='learned', qkv_bias=True, out_bias=True, mlp_bias=True,
    norm_bias=True)


def random_params(config, seed=0):
  """Every leaf random, so that no two could be exchanged unseen."""
  generator = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape).astype(leaf.dtype),
                      hub.param_shapes(config))


@pytest.fixture(scope='session')
def characters():
  return data_tokenizer.characters('abcdef')


@pytest.fixture(scope='session')
def exported(tmp_path_factory, characters):
  """A random llama's directory; copy it before changing anything."""
  directory = tmp_path_factory.mktemp('hub') / 'model'
  hub.export(directory, CONFIG, random_params(CONFIG), characters)
  return directory


@pytest.fixture
def model(exported, tmp_path):
  """A copy of it to spoil."""
  return shutil.copytree(exported, tmp_path / 'model')


def assert_equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def edit_json(path, **changes):
  raw = json.loads(path.read_text())
  path.write_text(json.dumps({**raw, **changes}))


def edit_tensors(directory, change):
  """Rewrites model.safetensors after `change(dict of tensors)`."""
  path = directory / 'model.safetensors'
  tensors = safetensors_numpy.load_file(path)
  change(tensors)
  safetensors_numpy.save_file(tensors, path)


def refusal(function, *args, **kwargs):
  """The message with which a UserError refuses; always one line."""
  with pytest.raises(settings.UserError) as caught:
    function(*args, **kwargs)
  assert '\n' not in str(caught.value)
  return str(caught.value)


# Round trips.


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
  edit_json(tmp_path / 'm' / 'config.json', eos_token_id=[7])
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


# The real checkpoint.


@pytest.fixture(scope='module')
def stories(shared_data):
  directory = shared_data / 'models' / 'stories260K'
  golden = json.loads((shared_data / 'models' / 'stories260K_golden.json').read_text())
  return hub.load(directory), golden


def log_probs(config, params, rows):
  """Next-token log-probs [rows, length, vocab] of right-padded rows of ids."""
  positions = jnp.tile(jnp.arange(rows.shape[1]), rows.shape[0])
  attend = attention.prefill(config, jnp.full([len(rows)], rows.shape[1]), rows.shape[1])
  hidden, _ = transformer.forward(config, params, rows.reshape(-1), positions, attend)
  return jax.nn.log_softmax(
      transformer.logits(config, params, hidden)).reshape(*rows.shape, config.vocab_size)


def test_real_checkpoint_log_probs(stories):
  (config, params, tokenizer), golden = stories
  for row in golden['teacher_forced']:
    ids = np.array(row['input_ids'], np.int32)
    assert tokenizer(row['text']).input_ids == row['input_ids']
    got = np.asarray(log_probs(config, params, ids[None])[0, :-1])
    got = np.take_along_axis(got, ids[1:, None], axis=1)[:, 0]
    # The file was computed in float64; torch's own float32 is off by up to 1.7e-5.
    np.testing.assert_allclose(
        got, row['token_logprobs'], rtol=0, atol=2 * golden['float32_max_abs_diff'])


def test_real_checkpoint_greedy_text(stories):
  (config, params, tokenizer), golden = stories
  prompts = golden['prompts']
  lengths = np.array([len(row['input_ids']) for row in prompts])
  count = len(prompts[0]['greedy_ids'])
  rows = np.zeros([len(prompts), lengths.max() + count], np.int32)
  for row, prompt in zip(rows, prompts):
    row[:len(prompt['input_ids'])] = prompt['input_ids']

  @jax.jit
  def generate(params, rows):
    def step(t, rows):
      last = jnp.asarray(lengths) + t
      scores = log_probs(config, params, rows)
      scores = jnp.take_along_axis(scores, last[:, None, None] - 1, axis=1)[:, 0]
      return rows.at[jnp.arange(len(prompts)), last].set(scores.argmax(-1).astype(jnp.int32))
    return jax.lax.fori_loop(0, count, step, rows)

  rows = np.asarray(generate(params, rows))
  for row, prompt, length in zip(rows, prompts, lengths):
    want = prompt['greedy_ids']
    assert row[length:length + len(want)].tolist() == want
    assert tokenizer.decode(want) == prompt['greedy_text']


def test_real_checkpoint_stops_on_both_ids(stories, shared_data):
  directory = shared_data / 'models' / 'stories260K'
  assert hub.load_stop_ids(directory, stories[0][2]) == (1, 2)


# What cannot be used.


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

  edit_tensors(model, change)
  message = refusal(hub.load, model)
  assert '1 missing: model.layers.1.mlp.up_proj.weight' in message
  assert '1 unexpected: model.layers.0.self_attn.q_proj.bias' in message
  assert 'model.norm.weight is [31], not [32]' in message


def test_too_many_wrong_tensors_are_counted(model):
  edit_json(model / 'config.json', intermediate_size=40)
  message = refusal(hub.load, model)
  assert '9 wrongly shaped' in message and '(4 more)' in message
  assert 'is [48, 32], not [40, 32]' in message


def test_missing_layer(model):
  edit_json(model / 'config.json', num_hidden_layers=4)
  assert 'model.layers.3.' in refusal(hub.load, model)


def test_harmless_buffers_are_ignored(model):
  edit_tensors(model, lambda tensors: tensors.update(
      {'model.layers.0.self_attn.rotary_emb.inv_freq': np.zeros(4, np.float32)}))
  assert_equal(hub.load_params(model, CONFIG), random_params(CONFIG))


def test_head_beside_tied_embeddings(model):
  edit_json(model / 'config.json', tie_word_embeddings=True)
  tied = dataclasses.replace(CONFIG, tie_embeddings=True)
  message = refusal(hub.load, model)  # transformers would not tie them
  assert 'lm_head.weight' in message and 'tie_word_embeddings' in message
  edit_tensors(model, lambda tensors: tensors.update(
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
  edit_json(model / 'config.json', **changes)
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
  edit_tensors(model, lambda tensors: tensors.update(
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
