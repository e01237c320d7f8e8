"""Array mathematics without opinions: `[B, T]` in, `[B, T]` out. Loads with jax and chex alone."""

from ptjax.pieces import advantage
from ptjax.pieces import denominator
from ptjax.pieces import divergence
from ptjax.pieces import likelihood
from ptjax.pieces import masking
from ptjax.pieces import reduction
from ptjax.pieces import stabilization
