"""Tiny base models, and adapters on them by PEFT and by us; needs torch (the `parity` extra)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from ptjax import config as settings
from ptjax.models import attention
from ptjax.models import hub
from ptjax.models import lora
from ptjax.models import transformer

torch = pytest.importorskip('torch', reason='parity needs torch: pip install -e ".[parity]"')
theirs = pytest.importorskip('peft', reason='parity needs peft: pip install -e ".[parity]"')

VOCAB, WIDTH, LENGTH, LAYERS = 64, 32, 12, 2
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH))

_QWEN2 = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
BASES = {
    'qwen2': lambda: transformers.Qwen2Config(**_QWEN2, tie_word_embeddings=True),
    'llama': lambda: transformers.LlamaConfig(**_QWEN2),
    'gpt2': lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_head=4, n_layer=LAYERS, n_positions=64),
}
VARIANTS = {'lora': {}, 'rslora': {'use_rslora': True}, 'dora': {'use_dora': True}}
ALL = {'qwen2': ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'],
       'gpt2': ['c_attn', 'attn.c_proj', 'c_fc', 'mlp.c_proj']}


def save_base(root, name):
  """Saves a random base model; returns its directory."""
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(BASES[name]())
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim > 1:
        parameter.normal_(0, 0.2)
  model.save_pretrained(root / name)
  return str(root / name)


def base_model(directory):
  return transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32, attn_implementation='eager').eval()


def noisy(model, seed=1):
  """Moves every adapter weight away from where it starts."""
  torch.manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if 'lora_' in name:
        parameter.add_(torch.randn(parameter.shape) * 0.1)
  return model


def torch_logits(model):
  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.float().numpy()


@functools.partial(jax.jit, static_argnums=0)
def our_hidden(config, params):
  rows, length = TOKENS.shape
  hidden, _ = transformer.forward(
      config, params, jnp.asarray(TOKENS).reshape(-1), jnp.tile(jnp.arange(length), rows),
      attention.prefill(config, jnp.full([rows], length), length))
  return hidden.reshape(rows, length, -1)


def our_logits(config, params):
  return transformer.logits(config, params, our_hidden(config, params))


def made_by_peft(directory, name, folder, **options):
  """Saves a noisy adapter of PEFT's own on a base of that name; returns its logits."""
  model = noisy(theirs.get_peft_model(base_model(directory), theirs.LoraConfig(
      **{'r': 4, 'lora_alpha': 6, 'task_type': 'CAUSAL_LM', 'target_modules': ALL[name],
         'fan_in_fan_out': name == 'gpt2', **options})))
  model.save_pretrained(folder)
  return torch_logits(model)


def made_by_us(directory, changes, seed=3):
  """(config, base params, adapters away from their start, settings)."""
  config = hub.load_config(directory)
  params = hub.load_params(directory, config)
  own = settings.LoraSettings(rank=4, alpha=6.0, **changes)
  random = np.random.default_rng(seed)
  adapters = jax.tree.map(
      lambda x: x + 0.1 * random.standard_normal(x.shape).astype(np.float32),
      lora.init(params, own, jax.random.key(0)))
  return config, params, adapters, own
