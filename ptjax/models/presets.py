"""Model shapes by name, for training from scratch and for planning runs."""

from ptjax import config as settings
from ptjax.models import config as config_lib

_QWEN2 = dict(family='qwen2', qkv_bias=True, norm_epsilon=1e-6)

# Fields of TransformerConfig: those of the published config.json files; `tiny` is ours, for a
# laptop.
_PRESETS = {
    'tiny': dict(
        **_QWEN2, vocab_size=256, width=128, num_layers=4, num_heads=4, num_kv_heads=2,
        mlp_width=384, max_length=1024),
    'gpt2': dict(
        family='gpt2', vocab_size=50257, width=768, num_layers=12, num_heads=12, num_kv_heads=12,
        mlp_width=3072, max_length=1024, activation='gelu_tanh', gated_mlp=False, norm='layer',
        norm_epsilon=1e-5, position='learned', qkv_bias=True, out_bias=True, mlp_bias=True,
        norm_bias=True),
    'qwen2.5-0.5b': dict(
        **_QWEN2, vocab_size=151936, width=896, num_layers=24, num_heads=14, num_kv_heads=2,
        mlp_width=4864, max_length=32768, rope_theta=1e6),
    'qwen2.5-1.5b': dict(
        **_QWEN2, vocab_size=151936, width=1536, num_layers=28, num_heads=12, num_kv_heads=2,
        mlp_width=8960, max_length=131072, rope_theta=1e6),
    'qwen2.5-7b': dict(
        **_QWEN2, vocab_size=152064, width=3584, num_layers=28, num_heads=28, num_kv_heads=4,
        mlp_width=18944, max_length=131072, rope_theta=1e6, tie_embeddings=False),
}


def names():
  """The names `get` knows."""
  return sorted(_PRESETS)


def get(name, **changes):
  """Returns the configuration called `name`, with fields replaced.

  Args:
    name: one of `names()`.
    **changes: fields of TransformerConfig, e.g. `vocab_size=len(tokenizer)`.
  Raises:
    UserError: no such preset; the message lists the nearest names.
  """
  if name not in _PRESETS:
    raise settings.UserError(f'no model preset {name!r}' + settings.near_names(name, _PRESETS))
  return config_lib.TransformerConfig(**{**_PRESETS[name], **changes})
