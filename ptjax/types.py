"""The parcels that cross rooms.

Letters: P prompts, G completions per prompt (the group), B = P * G completions in prompt-major
order, S prompt tokens, T completion tokens.

Alignment: `[B, T]` arrays are indexed by completion token, so `log_probs[b, t]` scores
`tokens[b, t]`. The one shift between hidden states and targets lives in `models/policy.py`;
nobody else shifts.
"""

from typing import Any

from flax import struct


@struct.dataclass
class Prompts:
  """Prompts ready for the device, padded on the right."""
  tokens: Any  # [P, S] int32; what stands past `lengths` is never read
  lengths: Any  # [P] int32, at least 1
  ids: Any  # [P] int32; the row in the data set, which (with the sample number) seeds sampling
  sample_ids: Any  # [P, G] int32; the sample number of each completion, normally 0..G-1


@struct.dataclass
class Rollouts:
  """What the sampler returns; completions hold their stop token."""
  tokens: Any  # [B, T] int32; completion tokens
  loss_mask: Any  # [B, T] bool; True for generated tokens, the stop token included
  log_probs: Any  # [B, T] float32, nats; of the sampling temperature's full softmax, 0 off the mask
  truncated: Any  # [B] bool; True where max_tokens ended the completion, not a stop


@struct.dataclass
class Packing:
  """Several whole sequences in one row, one behind the other.

  With it `prompt_tokens` [B, S] are whole rows, `prompt_lengths` [B] says how much of each is used,
  P = B, and `tokens` [B, T] are a row's trained targets alone, in order. Of one prompt a row may
  hold several completions: branches of its segment, which see the prompt and themselves.
  """
  segments: Any  # [B, S] int32; which sequence of the row, from 1; 0 on padding
  positions: Any  # [B, S] int32; each token's place in its own sequence
  predictors: Any  # [B, T] int32; the place in the row of the token that predicts tokens[b, t]
  branches: Any = None  # [B, S] int32; 0 in prompts, else which completion; None: one each


@struct.dataclass
class PackedRows:
  """The tokens of a batch, laid out anew for the forward pass: R rows of W tokens."""
  rows: Any  # TokenBatch with `packing`; its [R, M] targets are the batch's trained tokens
  places: Any  # [R, M] int32; where in the flat [B * T] each target stands; past it: nowhere


@struct.dataclass
class TokenBatch:
  """Everything one optimizer step sees. To the right of it nobody asks where the tokens came from.

  `inputs` holds the arrays a loss asks for by argument name (advantages [B] or [B, T],
  old_log_probs [B, T], reference_log_probs [B, T], ...); each has leading dimension B or P.
  prompt_tokens and tokens are None where `packed` holds them in their place.
  """
  prompt_tokens: Any  # [P, S] int32
  prompt_lengths: Any  # [P] int32
  tokens: Any  # [B, T] int32; completion tokens, the targets
  loss_mask: Any  # [B, T] bool; True where the target counts
  on_policy: Any  # [] bool; True while the policy has not moved since it drew these tokens
  inputs: dict  # name -> array
  packing: Any = None  # Packing, or None: each row is a prompt and its completions
  packed: Any = None  # PackedRows, which the forward pass then runs on


@struct.dataclass
class PairLogProbs:
  """Log-probs of preference pairs, for the preference losses."""
  chosen: Any  # SideLogProbs
  rejected: Any  # SideLogProbs


@struct.dataclass
class SideLogProbs:
  """One side of a pair: its tokens' log-probs under policy and, where needed, reference."""
  log_probs: Any  # [B, T] float32, nats
  loss_mask: Any  # [B, T] bool
  reference_log_probs: Any = None  # [B, T] float32, nats, or None for reference-free losses
