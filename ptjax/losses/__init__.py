"""Losses: the pieces composed under published names. Loads with jax and chex alone."""

from ptjax.losses import distillation
from ptjax.losses import hybrid
from ptjax.losses import imitation
from ptjax.losses import modifiers
from ptjax.losses import online_preference
from ptjax.losses import policy_gradient
from ptjax.losses import policy_gradient_sequence
from ptjax.losses import preference_anchor
from ptjax.losses import preference_gap
from ptjax.losses import preference_link
from ptjax.losses import preference_score
from ptjax.losses import reward_model
from ptjax.losses import terms
from ptjax.losses import unpaired
