"""What passes through the model cost, counted from shapes: FLOPs (a multiply-add is two).

Only matrix products count; everything else is around one per cent of a model's work. Counted is
what the programs execute: masked positions cost too, except those above the diagonal that
`attention.causal_blocks` leaves out, and what the backward pass recomputes costs again. Not counted
is what a sliding window leaves out. (XLA's own count takes a loop's body once, however often it
runs.)
"""

from typing import NamedTuple

from ptjax.models import attention


class Rows(NamedTuple):
  """Padded sizes of a batch."""
  prompts: int  # P
  prompt_tokens: int  # S
  group_size: int  # G
  completion_tokens: int  # T
  packed: bool = False  # whether prompt_tokens are whole rows, their T targets among them

  @property
  def completions(self):
    return self.prompts * self.group_size


def layer_weights(config):
  """Weights of one layer's products: (all, those of the last one, `down`)."""
  heads = config.num_heads * config.head_dim
  key_values = 2 * config.num_kv_heads * config.head_dim
  down = config.width * config.mlp_width
  attention = config.width * (2 * heads + key_values)
  return attention + (3 if config.gated_mlp else 2) * down, down


def product_weights(config):
  """Weights that a forward pass multiplies with: all layers' and the head's."""
  return config.num_layers * layer_weights(config)[0] + config.width * (
      config.num_labels or config.vocab_size)


def log_prob_flops(config, rows):
  """FLOPs of `policy.log_probs`, each prompt run once for its group, or rows packed."""
  return sum(_layers(config, rows)) + head_flops(config, rows.completions * rows.completion_tokens)


def update_flops(config, rows, *, remat='none', micro_batches=1, adapters=0, per_token=False):
  """FLOPs of a batch's gradient.

  Args:
    config: TransformerConfig.
    rows: Rows of the whole batch.
    remat: as in `transformer.forward`.
    micro_batches: from two on, outputs are computed beforehand where the loss must see all of them.
    adapters: weights of one layer's adapters, where only those train; 0: all weights train.
    per_token: whether the loss's derivative by a token's outputs needs no other token's.
  """
  weights, attention = _layers(config, rows)
  head = head_flops(config, rows.completions * rows.completion_tokens)
  every, down = layer_weights(config)
  beside = weights * adapters / every
  # Backward is twice forward: once for activations, once for weights if they train. The head
  # recomputes its logits chunk by chunk, but where it knows beforehand what comes back.
  passes = 2 if adapters else 3
  recomputed = 0 if per_token or micro_batches > 1 else head
  total = passes * (weights + head) + recomputed + 3 * beside + 3 * attention
  if remat in ('dots', 'full'):
    total += attention
  if remat == 'full':
    total += weights * (every - down) / every + beside  # a layer's output is not recomputed
  if micro_batches > 1 and not per_token:
    total += log_prob_flops(config, rows) + beside
  return total


def prefill_flops(config, rows):
  """FLOPs of running each prompt once and drawing from its last position."""
  tokens = rows.prompts * rows.prompt_tokens
  return (2 * tokens * config.num_layers * layer_weights(config)[0]
          + attention_flops(config, rows.prompts * causal_pairs(rows.prompt_tokens))
          + head_flops(config, rows.prompts))


def decode_flops(config, rows, window):
  """FLOPs of one decode step of all completions, own caches being `window` tokens wide."""
  return (2 * rows.completions * config.num_layers * layer_weights(config)[0]
          + attention_flops(config, rows.completions * (rows.prompt_tokens + window))
          + head_flops(config, rows.completions))


def attention_flops(config, pairs):
  """FLOPs of scores and weighted values of all layers, for so many (query, key) pairs."""
  return 4 * pairs * config.num_layers * config.num_heads * config.head_dim


def head_flops(config, positions):
  return 2 * positions * config.width * (config.num_labels or config.vocab_size)


def causal_pairs(length):
  """(query, key) pairs that causal attention over `length` tokens multiplies."""
  return sum((stop - start) * stop for start, stop in attention.causal_blocks(length))


def _layers(config, rows):
  """FLOPs of a forward pass over rows [P, S + G * T], or packed [P, S]: (weights, attention)."""
  p, s, g, t, packed = rows
  tokens = s if packed else s + g * t
  pairs = causal_pairs(s) + (0 if packed else g * (causal_pairs(t) + t * s))
  weights = 2 * p * tokens * config.num_layers * layer_weights(config)[0]
  return weights, attention_flops(config, p * pairs)
