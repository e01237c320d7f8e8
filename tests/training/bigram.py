"""A bigram model for tests of the train step: enough to have log-probs, entropy and a gradient."""

import jax
import jax.numpy as jnp


def previous_tokens(prompt_tokens, prompt_lengths, tokens):
  """The token before each completion token, [B, T]."""
  last = jnp.take_along_axis(prompt_tokens, prompt_lengths[:, None] - 1, 1)  # [P, 1]
  last = jnp.repeat(last, tokens.shape[0] // last.shape[0], 0)  # [B, 1]
  return jnp.concatenate([last, tokens[:, :-1]], 1)


def outputs(logits, tokens):
  """The model outputs of logits [..., T, V] for tokens [..., T]."""
  log_softmax = jax.nn.log_softmax(logits)
  return {'log_probs': jnp.take_along_axis(log_softmax, tokens[..., None], -1)[..., 0],
          'entropy': -(jnp.exp(log_softmax) * log_softmax).sum(-1)}


def forward(params, frozen, batch):
  del frozen
  previous = previous_tokens(batch.prompt_tokens, batch.prompt_lengths, batch.tokens)
  return outputs(params['embed']['embedding'][previous], batch.tokens)
