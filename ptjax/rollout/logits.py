"""From logits to one token per row, without a random number or a sort per vocabulary entry.

A row draws with its own key, so what it draws does not depend on the batch it stands in.
"""

import jax
import jax.numpy as jnp

_BLOCK = 128  # vocabulary entries per block of the two-level draw


def sample(logits, keys, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
  """Draws a token per row from the tempered and truncated softmax.

  The filters apply in the order of Hugging Face transformers: temperature, top-k, top-p, min-p,
  each to the renormalised rest of the one before. Tokens of equal logit stay or go together, so
  ties at a boundary keep more than `top_k` tokens. The likeliest token always stays.

  Args:
    logits: [B, V] float32; -inf excludes a token.
    keys: [B] PRNG keys, one per row and position; consumed.
    temperature: positive, or 0 for the argmax (lowest id among equals; the filters are moot).
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: keep the likeliest tokens until their mass reaches top_p; 1 keeps all.
    min_p: keep tokens at least min_p times as likely as the likeliest; 0 keeps all.
  Returns:
    tokens: [B] int32.
    log_probs: [B] float32, nats; of the token under the FULL softmax at `temperature` (at 1 for
      temperature 0). That is the policy the losses assume; top-k, top-p and min-p make the
      distribution drawn from a narrower one, and these numbers do not follow it.
  """
  if temperature == 0:
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return tokens, _at(logits, tokens) - jax.nn.logsumexp(logits, axis=-1)
  # Subtracting the maximum first keeps a small temperature from overflowing.
  scaled = (logits - logits.max(-1, keepdims=True)) / temperature  # [B, V], maximum 0
  weights = jnp.exp(scaled)
  if top_k >= logits.shape[-1]:
    top_k = 0
  if not (top_k or top_p < 1 or min_p):
    tokens, total = pick(weights, _uniform(keys, 0))
    return tokens, _at(scaled, tokens) - jnp.log(total)
  if top_k:
    # A token survives top-k when it is no less likely than the k-th.
    among_top_k = scaled >= jax.lax.top_k(scaled, top_k)[0][:, -1:]
  else:
    among_top_k = jnp.ones(scaled.shape, bool)
  kept = jnp.where(among_top_k & (weights >= min_p), weights, 0.0)
  if top_p < 1:
    # min-p comes after top-p, so the nucleus is measured on what top-k left.
    budget = top_p * jnp.sum(weights, axis=-1, where=among_top_k)  # [B]
    tokens = _draw_nucleus(scaled, kept, budget, keys)
  else:
    tokens, _ = pick(kept, _uniform(keys, 0))
  return tokens, _at(scaled, tokens) - jnp.log(weights.sum(-1))


def pick(weights, uniform, block=_BLOCK):
  """Draws an index per row in proportion to its weights: an inverse CDF in two levels.

  One pass sums blocks and draws one of them, a second draw looks at that block alone. Either takes
  the last entry of positive weight whose cumulative weight before it does not pass the target; so
  rounding never leaves the support. Two numbers resolve what the 2^23 values of one would not, and
  what is drawn depends on the rounding of V / block + block sums instead of V.

  Args:
    weights: [B, V] float32, not negative, with a positive sum.
    uniform: [B, 2] float32 in [0, 1); for the block, and within it.
    block: entries per block; V need not be a multiple.
  Returns:
    index: [B] int32.
    total: [B] float32; the sum of the row's weights.
  """
  rows, size = weights.shape
  if size % block:
    weights = jnp.pad(weights, ((0, 0), (0, -size % block)))
  blocks = weights.reshape(rows, -1, block)  # [B, V / block, block]
  sums = blocks.sum(-1)  # [B, V / block]
  ends = jnp.cumsum(sums, axis=-1)
  total = ends[:, -1]
  outer = _last_start(sums, ends, uniform[:, 0] * total)
  row = jnp.take_along_axis(blocks, outer[:, None, None], axis=1)[:, 0]  # [B, block]
  inner_ends = jnp.cumsum(row, axis=-1)
  inner = _last_start(row, inner_ends, uniform[:, 1] * inner_ends[:, -1])
  return outer * block + inner, total


def _last_start(weights, ends, target):
  """The last entry of positive weight that starts at or before target."""
  starts = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))  # [B, n]
  reached = (weights > 0) & (starts <= target[:, None])
  return jnp.where(reached, jnp.arange(weights.shape[1])[None, :], 0).max(-1).astype(jnp.int32)


def _draw_nucleus(scaled, kept, budget, keys):
  """Exact top-p by rejection, in a few passes instead of a sort.

  Draw; accept when the mass strictly above the drawn token is below the budget, which is what
  being in the nucleus means; else draw again among the tokens above it, since it and all below
  are outside. What is accepted is distributed as the nucleus is.

  Args:
    scaled: [B, V] float32; tempered logits, maximum 0.
    kept: [B, V] float32; weights to draw from, 0 where another filter dropped the token.
    budget: [B] float32; the nucleus's mass.
    keys: [B]; one pair of uniform numbers per round is made from each, whatever the other rows do.
  Returns:
    [B] int32.
  """
  def again(state):
    return ~jnp.all(state[3])

  def attempt(state):
    turn, tokens, bound, accepted = state
    drawn, _ = pick(jnp.where(scaled > bound[:, None], kept, 0.0), _uniform(keys, turn))
    level = _at(scaled, drawn)  # [B]
    above = jnp.sum(kept, axis=-1, where=scaled > level[:, None])  # [B]
    # Nothing above: the likeliest token, or a row of NaN, which must not loop for ever.
    inside = (above < budget) | (above == 0)
    return (turn + 1, jnp.where(accepted, tokens, drawn), jnp.where(accepted, bound, level),
            accepted | inside)

  start = (jnp.int32(0), jnp.zeros(keys.shape, jnp.int32),
           jnp.full(keys.shape, -jnp.inf, scaled.dtype), jnp.zeros(keys.shape, bool))
  return jax.lax.while_loop(again, attempt, start)[1]


def _uniform(keys, turn):
  """[B, 2] uniform numbers in [0, 1), the `turn`-th pair of each key."""
  return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, turn), (2,)))(keys)


def _at(values, index):
  """values[b, index[b]]."""
  return jnp.take_along_axis(values, index[:, None], axis=-1)[:, 0]
