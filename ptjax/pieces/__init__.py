"""Array mathematics without opinions: `[B, T]` in, `[B, T]` out. Loads with jax and chex alone."""

from ptjax.pieces import advantage
from ptjax.pieces import bounds
from ptjax.pieces import denominator
from ptjax.pieces import divergence
from ptjax.pieces import following
from ptjax.pieces import likelihood
from ptjax.pieces import link
from ptjax.pieces import masking
from ptjax.pieces import reduction
from ptjax.pieces import returns
from ptjax.pieces import running
from ptjax.pieces import score
from ptjax.pieces import stabilization
