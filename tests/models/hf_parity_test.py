"""Every family against `transformers` on a random tiny model; needs torch (the `parity` extra)."""

import functools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import transformers

from ptjax.data import tokenizer
from ptjax.models import attention
from ptjax.models import hub
from ptjax.models import presets
from ptjax.models import transformer

torch = pytest.importorskip('torch', reason='parity needs torch: pip install -e ".[parity]"')

VOCAB, WIDTH, LENGTH, LAYERS = 64, 32, 40, 3  # LENGTH passes every window and original length here

_GPT2 = dict(vocab_size=VOCAB, n_embd=WIDTH, n_head=4, n_layer=LAYERS, n_positions=64)
_LLAMA = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
_SLIDING = ['sliding_attention', 'full_attention', 'sliding_attention']
_GEMMA = dict(
    _LLAMA, head_dim=16, query_pre_attn_scalar=24, sliding_window=7, attn_logit_softcapping=3.0,
    final_logit_softcapping=5.0, layer_types=_SLIDING)


def _rope(kind, **settings):
  return dict(rope_theta=1000.0, rope_type=kind, **settings)


CASES = {
    'gpt2': lambda: transformers.GPT2Config(**_GPT2),
    'gpt2-untied': lambda: transformers.GPT2Config(
        **_GPT2, n_inner=40, tie_word_embeddings=False, activation_function='gelu',
        scale_attn_weights=False),
    'llama': lambda: transformers.LlamaConfig(**_LLAMA),
    'llama-biased': lambda: transformers.LlamaConfig(
        **_LLAMA, head_dim=12, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    'llama-llama3': lambda: transformers.LlamaConfig(**_LLAMA, rope_parameters=_rope(
        'llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)),
    'llama-linear': lambda: transformers.LlamaConfig(
        **_LLAMA, rope_parameters=_rope('linear', factor=4.0)),
    'qwen2-yarn': lambda: transformers.Qwen2Config(**_LLAMA, rope_parameters=_rope(
        'yarn', factor=4.0, original_max_position_embeddings=16)),
    'mistral': lambda: transformers.MistralConfig(**_LLAMA, sliding_window=7),
    'qwen2': lambda: transformers.Qwen2Config(**_LLAMA, tie_word_embeddings=True),
    'qwen2-sliding': lambda: transformers.Qwen2Config(
        **_LLAMA, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    'qwen3': lambda: transformers.Qwen3Config(**_LLAMA, head_dim=16),
    'gemma2': lambda: transformers.Gemma2Config(**_GEMMA),
    'gemma3_text': lambda: transformers.Gemma3TextConfig(
        **_GEMMA, rope_parameters={
            'full_attention': _rope('linear', factor=8.0),
            'sliding_attention': dict(rope_theta=100.0, rope_type='default')}),
    'gemma3': lambda: transformers.Gemma3Config(
        text_config=dict(
            _GEMMA, final_logit_softcapping=None, sliding_window_pattern=2, layer_types=None),
        vision_config=dict(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            image_size=8, patch_size=4), mm_tokens_per_image=4, image_token_index=60,
        boi_token_index=61, eoi_token_index=62),
}

TOKENS = np.random.default_rng(0).integers(0, 60, (2, LENGTH))

# Float32 sums in another order, relative to the largest logit; measured at most 3e-6.
TOLERANCE = 1e-5


@pytest.fixture(scope='session')
def checkpoints(tmp_path_factory):
  """`name -> directory` of a random model of that case, made once."""
  root = tmp_path_factory.mktemp('checkpoints')

  @functools.cache
  def make(name):
    torch.manual_seed(0)
    config = CASES[name]()
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    model = _auto_class(config).from_config(config)
    with torch.no_grad():
      for parameter_name, parameter in model.named_parameters():
        # The usual initialisation (0.02, biases 0) would leave attention uniform and hide errors.
        noise = torch.randn(parameter.shape) * (0.1 if parameter.ndim == 1 else 0.2)
        parameter.copy_(parameter + noise if 'norm' in parameter_name else noise)
    model.save_pretrained(root / name)
    tokenizer.characters('abcdef').save_pretrained(root / name)
    return str(root / name)

  return make


def _auto_class(config):
  if config.model_type == 'gemma3':
    return transformers.AutoModelForImageTextToText
  return transformers.AutoModelForCausalLM


def torch_logits(directory, dtype='float32'):
  """[2, LENGTH, VOCAB] float32, by transformers."""
  config = transformers.AutoConfig.from_pretrained(directory)
  # Eager: the fused attention of torch leaves Gemma's soft cap out.
  model = _auto_class(config).from_pretrained(
      directory, dtype=getattr(torch, dtype), attn_implementation='eager').eval()
  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.float().numpy()


def our_logits(config, params):
  rows, length = TOKENS.shape

  @jax.jit
  def run(params):
    positions = jnp.tile(jnp.arange(length), rows)
    attend = attention.prefill(config, jnp.full([rows], length), length)
    hidden, _ = transformer.forward(
        config, params, jnp.asarray(TOKENS, jnp.int32).reshape(-1), positions, attend)
    return transformer.logits(config, params, hidden)

  return np.asarray(run(params)).reshape(rows, length, -1)


def difference(got, want):
  """Largest difference, relative to the largest logit."""
  return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize('name', CASES)
def test_logits_equal_and_survive_export(name, checkpoints, tmp_path):
  source = checkpoints(name)
  want = torch_logits(source)
  config, params, loaded_tokenizer = hub.load(source)
  assert difference(our_logits(config, params), want) < TOLERANCE

  hub.export(tmp_path / 'model', config, params, loaded_tokenizer)
  np.testing.assert_array_equal(torch_logits(tmp_path / 'model'), want)
  again, params_again, _ = hub.load(tmp_path / 'model')
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, params_again, params)
  opened = transformers.AutoTokenizer.from_pretrained(tmp_path / 'model')
  assert opened('fade').input_ids == loaded_tokenizer('fade').input_ids


def test_the_cases_differ_where_they_should(checkpoints):
  """The settings under test are really in the files, or the parity above would prove little."""
  config = {name: hub.load_config(checkpoints(name)) for name in CASES}
  assert config['llama-biased'].head_dim == 12 != WIDTH // 4
  assert config['llama'].num_kv_heads == 2 and not config['llama'].tie_embeddings
  assert config['llama-biased'].tie_embeddings and config['llama-biased'].mlp_bias
  assert dict(config['llama-llama3'].rope_scaling)['original_max_position_embeddings'] < LENGTH
  assert config['mistral'].layer_windows == (7, 7, 7)
  assert config['qwen2-sliding'].layer_windows == (0, 7, 7)
  assert config['gemma2'].layer_windows == (7, 0, 7)
  assert config['gemma3'].layer_windows == (7, 0, 7)
  assert config['gemma3_text'].local_rope_theta == 100.0 != config['gemma3_text'].rope_theta
  assert config['gemma2'].query_scale == 24 ** -0.5 and config['gemma2'].attention_softcap == 3.0


@pytest.mark.parametrize('name', ['gpt2', 'llama-biased', 'qwen3', 'gemma2', 'gemma3_text'])
def test_bfloat16_is_as_exact_as_torch(name, checkpoints):
  """Both round at every operation, so they are held against float32, not against each other."""
  source = checkpoints(name)
  exact, theirs = torch_logits(source), torch_logits(source, 'bfloat16')
  config, params, _ = hub.load(source, dtype='bfloat16', param_dtype='bfloat16')
  ours = our_logits(config, params)
  error = lambda logits: np.sqrt(np.square(logits - exact).mean())
  assert error(ours) < 1.2 * error(theirs)
  assert error(ours) > 0  # it is bfloat16


def _edit(source, target, change):
  """Copies a model directory with a changed config.json."""
  shutil.copytree(source, target)
  path = os.path.join(target, 'config.json')
  with open(path, encoding='utf-8') as file:
    raw = json.load(file)
  change(raw)
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(raw, file)
  return str(target)


@pytest.mark.parametrize('name, change', [
    ('llama', lambda raw: raw['rope_parameters'].update(rope_theta=50.0)),
    ('llama-llama3', lambda raw: raw['rope_parameters'].update(factor=2.0)),
    ('llama-llama3', lambda raw: raw['rope_parameters'].update(
        original_max_position_embeddings=32)),
    ('llama-llama3', lambda raw: raw.update(rope_parameters=dict(rope_theta=1000.0))),
    ('gemma3_text', lambda raw: raw['rope_parameters']['sliding_attention'].update(
        rope_theta=30.0)),
    # The same number of weights, cut into heads of half the width.
    ('qwen2', lambda raw: raw.update(
        head_dim=4, num_attention_heads=8, num_key_value_heads=4)),
    ('mistral', lambda raw: raw.update(sliding_window=5)),
])
def test_a_changed_setting_changes_the_logits(name, change, checkpoints, tmp_path):
  source = checkpoints(name)
  edited = _edit(source, tmp_path / 'edited', change)
  config, params, _ = hub.load(edited)
  assert config != hub.load_config(source)
  got, want = our_logits(config, params), torch_logits(edited)
  assert difference(got, want) < TOLERANCE
  assert difference(got, torch_logits(source)) > 1e-3


def test_both_spellings_of_rope_are_one_config(checkpoints, tmp_path):
  def older(raw):
    parameters = raw.pop('rope_parameters')
    raw['rope_theta'] = parameters.pop('rope_theta')
    raw['rope_scaling'] = parameters

  def oldest(raw):
    older(raw)
    raw['rope_scaling']['type'] = raw['rope_scaling'].pop('rope_type')

  source = checkpoints('llama-llama3')
  config = hub.load_config(source)
  assert hub.load_config(_edit(source, tmp_path / 'older', older)) == config
  assert hub.load_config(_edit(source, tmp_path / 'oldest', oldest)) == config

  def older_gemma(raw):
    parameters = raw.pop('rope_parameters')
    raw['rope_local_base_freq'] = parameters['sliding_attention']['rope_theta']
    raw['rope_scaling'] = parameters['full_attention']
    raw['rope_theta'] = raw['rope_scaling'].pop('rope_theta')

  source = checkpoints('gemma3_text')
  assert hub.load_config(
      _edit(source, tmp_path / 'gemma', older_gemma)) == hub.load_config(source)


@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_sharded_index_as_transformers_writes_it(name, checkpoints, tmp_path):
  source = checkpoints(name)
  model = transformers.AutoModelForCausalLM.from_pretrained(source)
  model.save_pretrained(tmp_path, max_shard_size='20KB')
  assert len(list(tmp_path.glob('*.safetensors'))) > 2
  config = hub.load_config(tmp_path)
  jax.tree.map(np.testing.assert_array_equal,
               hub.load_params(tmp_path, config), hub.load_params(source, config))


def test_base_model_names_without_prefix(checkpoints, tmp_path):
  """The published gpt2 has no `transformer.` before its names, and masks among its tensors."""
  source = checkpoints('gpt2')
  model = transformers.AutoModelForCausalLM.from_pretrained(source)
  for block in model.transformer.h:
    block.attn.register_buffer('bias', torch.ones(1, 1, 64, 64, dtype=torch.uint8))
    block.attn.register_buffer('masked_bias', torch.tensor(-1e4))
  model.transformer.save_pretrained(tmp_path)
  names = safetensors_numpy.load_file(tmp_path / 'model.safetensors').keys()
  assert {'wte.weight', 'h.0.attn.bias', 'h.0.attn.masked_bias'} <= names
  config = hub.load_config(tmp_path)
  jax.tree.map(np.testing.assert_array_equal,
               hub.load_params(tmp_path, config), hub.load_params(source, config))


def test_a_preset_exports(tmp_path):
  """A model that was never a Hugging Face one opens in transformers."""
  config = presets.get('tiny', vocab_size=VOCAB, width=WIDTH, mlp_width=48, max_length=64)
  params = transformer.init(config, jax.random.key(0))
  hub.export(tmp_path / 'model', config, params, tokenizer.characters('abcdef'))
  with open(tmp_path / 'model' / 'config.json', encoding='utf-8') as file:
    assert json.load(file)['architectures'] == ['Qwen2ForCausalLM']
  assert difference(torch_logits(tmp_path / 'model'), our_logits(config, params)) < TOLERANCE
