"""Losses: the pieces composed under published names. Loads with jax and chex alone."""

from ptjax.losses import imitation
from ptjax.losses import policy_gradient
from ptjax.losses import policy_gradient_sequence
