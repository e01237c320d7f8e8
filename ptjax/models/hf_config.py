"""A Hugging Face `config.json` <-> `TransformerConfig`.

Defaults are those of the classes in `transformers` (5.x), because a published file leaves out what
equals them. Both spellings of the rotary settings are read: `rope_theta` + `rope_scaling`, and the
`rope_parameters` of transformers 5. The first is written, since versions 4 and 5 both read it and
version 4 would silently pass over the second.
"""

import dataclasses

from ptjax import config as settings
from ptjax.models import config as model_config

ARCHITECTURES = {
    'gpt2': 'GPT2LMHeadModel',
    'llama': 'LlamaForCausalLM',
    'mistral': 'MistralForCausalLM',
    'qwen2': 'Qwen2ForCausalLM',
    'qwen3': 'Qwen3ForCausalLM',
    'gemma2': 'Gemma2ForCausalLM',
    'gemma3_text': 'Gemma3ForCausalLM',
}

# Classes with a score head instead; a token classifier's has a bias.
_SEQUENCE_CLASSIFIER, _TOKEN_CLASSIFIER = 'ForSequenceClassification', 'ForTokenClassification'
_NO_TOKEN_CLASSIFIER = ('gemma3_text',)

_GEMMA = ('gemma2', 'gemma3_text')

_LLAMA_DEFAULTS = dict(
    hidden_act='silu', rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=False,
    mlp_bias=False, num_key_value_heads=None, head_dim=None)
_QWEN_DEFAULTS = dict(
    _LLAMA_DEFAULTS, use_sliding_window=False, sliding_window=4096, max_window_layers=28)
_GEMMA_DEFAULTS = dict(
    hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256, rms_norm_eps=1e-6, tie_word_embeddings=True,
    hidden_activation='gelu_pytorch_tanh', attention_bias=False, query_pre_attn_scalar=256,
    sliding_window=4096)
_DEFAULTS = {
    'gpt2': dict(
        n_inner=None, activation_function='gelu_new', layer_norm_epsilon=1e-5,
        scale_attn_weights=True, tie_word_embeddings=True),
    'llama': _LLAMA_DEFAULTS,
    'mistral': dict(_LLAMA_DEFAULTS, num_key_value_heads=8, sliding_window=4096),
    'qwen2': _QWEN_DEFAULTS,
    'qwen3': dict(_QWEN_DEFAULTS, head_dim=128),
    'gemma2': dict(
        _GEMMA_DEFAULTS, vocab_size=256000, max_position_embeddings=8192,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    'gemma3_text': dict(
        _GEMMA_DEFAULTS, vocab_size=262208, max_position_embeddings=131072,
        attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window_pattern=6),
}

_ACTIVATIONS = {
    'silu': 'silu', 'swish': 'silu', 'gelu': 'gelu', 'gelu_new': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_fast': 'gelu_tanh'}

# Rope type -> (settings it needs, settings it may have).
_ROPE_KEYS = {
    'default': ((), ()),
    'linear': (('factor',), ()),
    'llama3': (('factor', 'low_freq_factor', 'high_freq_factor',
                'original_max_position_embeddings'), ()),
    'yarn': (('factor', 'original_max_position_embeddings'),
             ('attention_factor', 'beta_fast', 'beta_slow', 'mscale', 'mscale_all_dim',
              'truncate')),
}

_DTYPES = ('float32', 'bfloat16', 'float16')

# Settings that change the mathematics and that no code here knows: (key, value that is harmless).
_UNSUPPORTED = (
    ('scale_attn_by_inverse_layer_idx', False), ('add_cross_attention', False),
    ('use_bidirectional_attention', False), ('partial_rotary_factor', 1.0),
    ('token_classification_bias', True))


def from_hf(raw):
  """Reads a decoded `config.json`.

  Args:
    raw: dict; a multimodal Gemma 3 gives its `text_config`.
  Returns:
    A `TransformerConfig` whose two dtypes are the file's (float32 where it names none).
  Raises:
    UserError: an architecture, rotary embedding or setting that is not supported, or a size that
      is absent or not a number.
  """
  family = raw.get('model_type')
  if family == 'gemma3':
    outer = {k: raw[k] for k in ('dtype', 'torch_dtype', 'tie_word_embeddings', 'architectures',
                                 'id2label', 'num_labels') if k in raw}
    raw, family = {**raw.get('text_config', {}), **outer}, 'gemma3_text'
  if family not in ARCHITECTURES:
    raise settings.UserError(
        f'model_type {family!r} is not supported; supported: {", ".join(ARCHITECTURES)}')
  if raw.get('quantization_config'):
    method = raw['quantization_config'].get('quant_method', 'unknown method')
    raise settings.UserError(
        f'the weights are quantized ({method}), which is not supported; use the original weights')
  for key, harmless in _UNSUPPORTED:
    if raw.get(key) not in (None, harmless):
      raise settings.UserError(f'{key}={raw[key]!r} is not supported')
  raw = {**_DEFAULTS[family], **raw}
  dtype = _dtype(raw)
  fields = _gpt2_fields(raw) if family == 'gpt2' else _llama_fields(family, raw)
  return model_config.TransformerConfig(
      family=family, dtype=dtype, param_dtype=dtype, **fields, **_score_fields(raw))


def to_hf(config, *, dtype, bos_id=None, eos_id=None, pad_id=None):
  """Writes the `config.json` of `config`.

  Args:
    config: a `TransformerConfig`.
    dtype: str; of the weights beside the file.
    bos_id, eos_id, pad_id: the tokenizer's special ids, or None.
  Returns:
    A dict for `json.dump`.
  Raises:
    UserError: the family cannot express one of the config's fields, so that the file would stand
      for another model.
  """
  if config.family not in ARCHITECTURES:
    raise settings.UserError(
        f'cannot export family {config.family!r}; supported: {", ".join(ARCHITECTURES)}')
  fields = _gpt2_keys(config) if config.family == 'gpt2' else _llama_keys(config)
  raw = {
      'architectures': [_architecture(config)], 'model_type': config.family, **fields,
      **_score_keys(config), 'tie_word_embeddings': config.tie_embeddings,
      'dtype': dtype, 'torch_dtype': dtype,
      'bos_token_id': bos_id, 'eos_token_id': eos_id, 'pad_token_id': pad_id}
  back = dataclasses.replace(from_hf(raw), dtype=config.dtype, param_dtype=config.param_dtype)
  changed = [f'{f.name}={getattr(config, f.name)!r} (would become {getattr(back, f.name)!r})'
             for f in dataclasses.fields(config)
             if getattr(config, f.name) != getattr(back, f.name)]
  if changed:
    raise settings.UserError(
        f'a Hugging Face {config.family} model cannot express {", ".join(changed)}')
  return raw


def _score_fields(raw):
  architecture = (raw.get('architectures') or [''])[0]
  if not architecture.endswith((_SEQUENCE_CLASSIFIER, _TOKEN_CLASSIFIER)):
    return {}
  # transformers names the labels, and leaves out two, the usual number.
  labels = raw.get('id2label')
  count = _integer({'num_labels': 2, **raw}, 'num_labels') if labels is None else len(labels)
  return dict(num_labels=count, score_bias=architecture.endswith(_TOKEN_CLASSIFIER))


def _score_keys(config):
  if not config.num_labels:
    return {}
  names = [f'LABEL_{i}' for i in range(config.num_labels)]
  return dict(id2label={str(i): name for i, name in enumerate(names)},
              label2id={name: i for i, name in enumerate(names)})


def _architecture(config):
  """The class in transformers that opens `config`."""
  language_model = ARCHITECTURES[config.family]
  if not config.num_labels:
    return language_model
  if config.score_bias and config.family in _NO_TOKEN_CLASSIFIER:
    raise settings.UserError(f'transformers has no token classifier for {config.family}')
  body = language_model.removesuffix('ForCausalLM').removesuffix('LMHeadModel')
  return (body.replace('Gemma3', 'Gemma3Text')
          + (_TOKEN_CLASSIFIER if config.score_bias else _SEQUENCE_CLASSIFIER))


def _gpt2_fields(raw):
  width, heads = _integer(raw, 'n_embd'), _integer(raw, 'n_head')
  head_dim = _divide(width, heads, 'n_embd', 'n_head')
  mlp_width = 4 * width if raw['n_inner'] is None else _integer(raw, 'n_inner')
  return dict(
      vocab_size=_integer(raw, 'vocab_size'), width=width, num_layers=_integer(raw, 'n_layer'),
      num_heads=heads, num_kv_heads=heads, head_dim=head_dim, mlp_width=mlp_width,
      max_length=_integer(raw, 'n_positions'), activation=_activation(raw, 'activation_function'),
      gated_mlp=False, norm='layer', norm_epsilon=_number(raw, 'layer_norm_epsilon'),
      position='learned', qkv_bias=True, out_bias=True, mlp_bias=True, norm_bias=True,
      query_scale=head_dim ** -0.5 if raw['scale_attn_weights'] else 1.0,
      tie_embeddings=bool(raw['tie_word_embeddings']))


def _gpt2_keys(config):
  return dict(
      vocab_size=config.vocab_size, n_embd=config.width, n_head=config.num_heads,
      n_layer=config.num_layers, n_inner=config.mlp_width, n_positions=config.max_length,
      n_ctx=config.max_length, layer_norm_epsilon=config.norm_epsilon,
      activation_function='gelu' if config.activation == 'gelu' else 'gelu_new',
      scale_attn_weights=config.query_scale != 1.0)


def _llama_fields(family, raw):
  width, heads = _integer(raw, 'hidden_size'), _integer(raw, 'num_attention_heads')
  if raw.get('head_dim') is None:
    head_dim = _divide(width, heads, 'hidden_size', 'num_attention_heads')
  else:
    head_dim = _integer(raw, 'head_dim')
  kv_heads = heads if raw['num_key_value_heads'] is None else _integer(raw, 'num_key_value_heads')
  _divide(heads, kv_heads, 'num_attention_heads', 'num_key_value_heads')
  gemma = family in _GEMMA
  rope_theta, rope_scaling, local_rope_theta = _rope(family, raw)
  attention_bias = family != 'mistral' and bool(raw['attention_bias'])
  query_width = _integer(raw, 'query_pre_attn_scalar') if gemma else head_dim
  return dict(
      vocab_size=_integer(raw, 'vocab_size'), width=width,
      num_layers=_integer(raw, 'num_hidden_layers'), num_heads=heads, num_kv_heads=kv_heads,
      head_dim=head_dim, mlp_width=_integer(raw, 'intermediate_size'),
      max_length=_integer(raw, 'max_position_embeddings'),
      activation=_activation(raw, 'hidden_activation' if gemma else 'hidden_act'),
      norm_epsilon=_number(raw, 'rms_norm_eps'),
      norm_offset=1.0 if gemma else 0.0, rope_theta=rope_theta, rope_scaling=rope_scaling,
      local_rope_theta=local_rope_theta,
      qkv_bias=family == 'qwen2' or attention_bias,
      out_bias=family != 'qwen2' and attention_bias,
      mlp_bias=family == 'llama' and bool(raw['mlp_bias']),
      qk_norm=family in ('qwen3', 'gemma3_text'), post_norms=gemma,
      layer_windows=_layer_windows(family, raw),
      # transformers' Gemma 3 reads the key and does not apply it.
      attention_softcap=_number(raw, 'attn_logit_softcapping', optional=True)
      if family == 'gemma2' else None,
      logit_softcap=_number(raw, 'final_logit_softcapping', optional=True),
      query_scale=query_width ** -0.5, embedding_scale=width ** 0.5 if gemma else 1.0,
      tie_embeddings=bool(raw['tie_word_embeddings']))


def _llama_keys(config):
  gemma = config.family in _GEMMA
  activation = 'gelu_pytorch_tanh' if config.activation == 'gelu_tanh' else config.activation
  keys = dict(
      vocab_size=config.vocab_size, hidden_size=config.width,
      num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim,
      intermediate_size=config.mlp_width, max_position_embeddings=config.max_length,
      rms_norm_eps=config.norm_epsilon, rope_theta=config.rope_theta,
      rope_scaling=dict(config.rope_scaling) if config.rope_scaling else None)
  keys['hidden_activation' if gemma else 'hidden_act'] = activation
  window = max(config.layer_windows)
  if config.family != 'mistral':
    keys['attention_bias'] = config.out_bias
  if config.family == 'llama':
    keys['mlp_bias'] = config.mlp_bias
  if config.family == 'mistral':
    keys['sliding_window'] = window or None
  if config.family in ('qwen2', 'qwen3') and window:
    keys.update(use_sliding_window=True, sliding_window=window, max_window_layers=next(
        i for i, w in enumerate(config.layer_windows) if w))
  if config.family in ('qwen2', 'qwen3') or gemma:
    keys['layer_types'] = [
        'sliding_attention' if w else 'full_attention' for w in config.layer_windows]
  if gemma:
    keys.update(
        sliding_window=window or _GEMMA_DEFAULTS['sliding_window'],
        query_pre_attn_scalar=round(config.query_scale ** -2),
        attn_logit_softcapping=config.attention_softcap,
        final_logit_softcapping=config.logit_softcap)
  if config.family == 'gemma3_text':
    keys['rope_local_base_freq'] = config.local_rope_theta
  return keys


def _layer_windows(family, raw):
  """Returns each layer's window in tokens (own position included), 0 where it sees everything."""
  count = _integer(raw, 'num_hidden_layers')
  if family == 'llama':
    return (0,) * count
  if family in ('qwen2', 'qwen3') and not raw['use_sliding_window']:
    return (0,) * count
  if raw['sliding_window'] is None:
    return (0,) * count
  window = _integer(raw, 'sliding_window')
  if family == 'mistral':  # transformers gives every layer the window, whatever layer_types says
    return (window,) * count
  types = raw.get('layer_types')
  if types is None:
    if family == 'gemma2':
      sliding = [i % 2 == 0 for i in range(count)]
    elif family == 'gemma3_text':
      sliding = [(i + 1) % _integer(raw, 'sliding_window_pattern') != 0 for i in range(count)]
    else:
      sliding = [i >= raw['max_window_layers'] for i in range(count)]
    types = ['sliding_attention' if s else 'full_attention' for s in sliding]
  unknown = set(types) - {'sliding_attention', 'full_attention'}
  if unknown or len(types) != count:
    raise settings.UserError(
        f'layer_types must name sliding_attention or full_attention for each of {count} layers, '
        f'not {types}')
  return tuple(window if t == 'sliding_attention' else 0 for t in types)


def _rope(family, raw):
  """Returns `(rope_theta, rope_scaling, local_rope_theta)`."""
  parameters, scaling = raw.get('rope_parameters') or {}, raw.get('rope_scaling')
  if family != 'gemma3_text':
    if any(isinstance(v, dict) for v in parameters.values()):
      raise settings.UserError(
          f'rope_parameters per layer type are not supported for {family}: {parameters}')
    return *_rope_entry(raw, parameters, scaling, 'rope_theta', 10000.0), None
  if parameters and not any(isinstance(v, dict) for v in parameters.values()):
    raise settings.UserError(
        f'rope_parameters of gemma3 must be given per layer type, not {parameters}')
  theta, pairs = _rope_entry(
      raw, parameters.get('full_attention') or {}, scaling, 'rope_theta', 1e6)
  local_theta, local_pairs = _rope_entry(
      raw, parameters.get('sliding_attention') or {}, None, 'rope_local_base_freq', 10000.0)
  if local_pairs is not None:
    raise settings.UserError('rope scaling on sliding_attention layers is not supported')
  return theta, pairs, local_theta


def _rope_entry(raw, parameters, scaling, theta_key, default_theta):
  """One rotary embedding: returns its base and its scaling as sorted pairs, or None."""
  given = {_number(source, key) for source, key in ((parameters, 'rope_theta'), (raw, theta_key))
           if source.get(key) is not None}
  if len(given) > 1:
    raise settings.UserError(
        f'{theta_key} is given twice with different values: {raw[theta_key]} and '
        f'{parameters["rope_theta"]} in rope_parameters; keep one')
  theta = given.pop() if given else default_theta
  entry = scaling or parameters
  kind = entry.get('rope_type') or entry.get('type') or 'default'
  if kind not in _ROPE_KEYS:
    raise settings.UserError(
        f'rope type {kind!r} is not supported; supported: {", ".join(_ROPE_KEYS)}')
  if entry.get('partial_rotary_factor') not in (None, 1.0):
    raise settings.UserError(
        f'partial_rotary_factor={entry["partial_rotary_factor"]} is not supported')
  if kind == 'default':
    return theta, None
  original = raw.get('original_max_position_embeddings', entry.get(
      'original_max_position_embeddings', raw.get('max_position_embeddings')))
  entry = {**entry, 'original_max_position_embeddings': original}
  needed, optional = _ROPE_KEYS[kind]
  missing = [key for key in needed if entry.get(key) is None]
  if missing:
    raise settings.UserError(f'rope scaling {kind!r} lacks {", ".join(missing)}: {entry}')
  pairs = {'rope_type': kind}
  for key in needed + optional:
    if key == 'original_max_position_embeddings':
      pairs[key] = _integer(entry, key)
    elif key == 'truncate' and entry.get(key) is not None:
      pairs[key] = bool(entry[key])
    elif entry.get(key) is not None:
      pairs[key] = _number(entry, key)
  return theta, tuple(sorted(pairs.items()))


def _number(raw, key, optional=False):
  """Returns a float, so that 8 and 8.0 in a file make equal configs."""
  value = raw.get(key)
  if optional and value is None:
    return None
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise settings.UserError(f'{key} is {value!r}; a number is needed')
  return float(value)


def _integer(raw, key):
  value = raw.get(key)
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    found = 'is absent' if value is None else f'is {value!r}'
    raise settings.UserError(f'{key} {found}; a positive whole number is needed')
  return value


def _divide(total, parts, total_name, parts_name):
  if total % parts:
    raise settings.UserError(
        f'{total_name}={total} does not divide into {parts_name}={parts} parts')
  return total // parts


def _activation(raw, key):
  if raw[key] not in _ACTIVATIONS:
    raise settings.UserError(
        f'{key}={raw[key]!r} is not supported; supported: {", ".join(_ACTIVATIONS)}')
  return _ACTIVATIONS[raw[key]]


def _dtype(raw):
  dtype = raw.get('dtype') or raw.get('torch_dtype') or 'float32'
  if dtype not in _DTYPES:
    raise settings.UserError(f'dtype {dtype!r} is not supported; supported: {", ".join(_DTYPES)}')
  return dtype
