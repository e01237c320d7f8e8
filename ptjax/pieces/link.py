"""How a gap becomes a penalty: logits h [B] in, losses [B] out, before any mean over pairs.

h is a scaled preference gap, normally beta times the chosen minus the rejected score. Every link
falls where the pair is still wrong; a loss's weight on a pair is minus the slope of its link.
"""

import jax
import jax.numpy as jnp

from ptjax.pieces import bounds
from ptjax.pieces import masking

MAX_EXPONENT = 80.0  # e^80 is still a float32


def _capped_exp(x):
  """exp(x), flat and without gradient past x = MAX_EXPONENT."""
  return jnp.exp(jnp.where(x <= MAX_EXPONENT, x, MAX_EXPONENT))


def logistic(h, label_smoothing=0.0):
  """-(1 - ε) log σ(h) - ε log σ(-h): DPO's link, with ε the fraction of flipped labels (cDPO)."""
  bounds.within(0, 0.5, label_smoothing=label_smoothing)
  if label_smoothing == 0:
    return -jax.nn.log_sigmoid(h)
  return (-(1.0 - label_smoothing) * jax.nn.log_sigmoid(h)
          - label_smoothing * jax.nn.log_sigmoid(-h))


def robust(h, label_smoothing):
  """-[(1 - ε) log σ(h) - ε log σ(-h)] / (1 - 2ε): unbiased when a fraction ε is flipped."""
  bounds.within(0, 0.5, label_smoothing=label_smoothing)
  return (-(1.0 - label_smoothing) * jax.nn.log_sigmoid(h)
          + label_smoothing * jax.nn.log_sigmoid(-h)) / (1.0 - 2.0 * label_smoothing)


def hinge(h):
  """max(0, 1 - h); no gradient at the kink."""
  return jax.nn.relu(1.0 - h)


def exponential(h):
  """exp(-h), flat past h = -80."""
  return _capped_exp(-h)


def squared(h):
  """(1 - h)²."""
  return jnp.square(1.0 - h)


def truncated_quadratic(h):
  """max(0, 1 - h)²."""
  return jnp.square(jax.nn.relu(1.0 - h))


def savage(h):
  """σ(-h)²."""
  return jnp.square(jax.nn.sigmoid(-h))


def reverse_kl(h, label_smoothing):
  """KL(Bernoulli(σ(h)) || Bernoulli(1 - ε)), 0 at h = log((1 - ε) / ε) (EXO)."""
  bounds.within(None, 0.5, label_smoothing=label_smoothing)
  probability = jnp.asarray(label_smoothing, h.dtype)
  return (jax.nn.sigmoid(h) * (jax.nn.log_sigmoid(h) - jnp.log1p(-probability))
          + jax.nn.sigmoid(-h) * (jax.nn.log_sigmoid(-h) - jnp.log(probability)))


def logistic_exponential(h, temperature):
  """(1 - m)·logistic + m·exponential with m = σ(h / temperature) (DiscoPOP).

  m·exp(-h) is formed in log space, so that it is 0 and not 0·inf for a very wrong pair.
  """
  bounds.positive(temperature=temperature)
  return (-jax.nn.sigmoid(-h / temperature) * jax.nn.log_sigmoid(h)
          + _capped_exp(jax.nn.log_sigmoid(h / temperature) - h))


def focal(h, exponent):
  """-σ(h)^γ log σ(h): down-weighs pairs that are ranked wrongly (FocalPO)."""
  masking.non_negative(exponent=exponent)
  log_probability = jax.nn.log_sigmoid(h)
  return -jnp.exp(exponent * log_probability) * log_probability


def probability(h):
  """σ(h), whose slope stays precise in both tails: that of jax.nn.sigmoid is 0 above h = 17."""
  return jnp.exp(jax.nn.log_sigmoid(h))


def squared_error(gap, target):
  """(gap - target)², `target` in the units of the gap (IPO)."""
  return jnp.square(gap - target)


def silu(h):
  """-h σ(-h): falls to its minimum -0.2785 at h = 1.2785, then rises to 0 (SPO)."""
  return jax.nn.silu(-h)
