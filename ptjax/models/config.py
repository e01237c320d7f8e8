"""The shape of a decoder: every difference between the supported families is a field here."""

import dataclasses

from ptjax import config as settings

ACTIVATIONS = ('silu', 'gelu_tanh', 'gelu')
NORMS = ('rms', 'layer')
POSITIONS = ('rope', 'learned')
DTYPES = ('float32', 'bfloat16', 'float16')
ATTENTIONS = ('xla', 'cudnn')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """A decoder-only transformer, hashable, so that it can be a static argument of `jax.jit`.

  `None` for head_dim, query_scale and layer_windows means the usual value (width / heads,
  1 / sqrt(head_dim), all layers global), which replaces it on construction.
  """
  family: str  # Hugging Face's model_type, e.g. 'qwen2'; needed again on export
  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  mlp_width: int
  max_length: int  # tokens; the longest sequence the positions were made for
  head_dim: int | None = None
  activation: str = 'silu'
  gated_mlp: bool = True
  norm: str = 'rms'
  norm_epsilon: float = 1e-6
  norm_offset: float = 0.0  # added to every RMSNorm scale; 1.0 in Gemma, which stores scale - 1
  position: str = 'rope'
  rope_theta: float = 10000.0
  rope_scaling: tuple | None = None  # sorted (key, value) pairs, with 'rope_type'
  local_rope_theta: float | None = None  # Gemma 3: base for the sliding layers, never scaled
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  norm_bias: bool = False
  qk_norm: bool = False  # RMSNorm of every query and key head, before rope
  post_norms: bool = False  # Gemma: a norm also after attention and after the MLP
  layer_windows: tuple | None = None  # tokens, one per layer; 0 = global
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  query_scale: float | None = None  # multiplies query · key
  embedding_scale: float = 1.0  # multiplies embeddings, rounded to the compute dtype
  tie_embeddings: bool = True
  num_labels: int = 0  # outputs of a score head in the place of the vocabulary's; 0 = none
  score_bias: bool = False  # that head has a bias: token classifiers have, reward models have not
  dtype: str = 'float32'  # compute
  param_dtype: str = 'float32'  # storage
  # Who attends outside decoding: 'xla' is attention.py, 'cudnn' a fused kernel for GPUs (flash.py).
  attention: str = 'xla'

  def __post_init__(self):
    def default(name, value):
      if getattr(self, name) is None:
        object.__setattr__(self, name, value)
    default('head_dim', self.width // self.num_heads)
    default('query_scale', self.head_dim**-0.5)
    default('layer_windows', (0,) * self.num_layers)
    for name, allowed in (('activation', ACTIVATIONS), ('norm', NORMS), ('position', POSITIONS),
                          ('dtype', DTYPES), ('param_dtype', DTYPES),
                          ('attention', ATTENTIONS)):
      if getattr(self, name) not in allowed:
        raise settings.UserError(
            f'model {name} is {getattr(self, name)!r}; expected one of {", ".join(allowed)}')
    if self.num_heads % self.num_kv_heads:
      raise settings.UserError(
          f'{self.num_heads} attention heads do not split over {self.num_kv_heads} key/value heads')
    if len(self.layer_windows) != self.num_layers or min(self.layer_windows) < 0:
      raise settings.UserError(
          f'layer_windows is {self.layer_windows}; expected one window (tokens, 0 = global) '
          f'for each of the {self.num_layers} layers')
