"""How a reference model follows the policy that is held against it."""

import jax

from ptjax.pieces import bounds


def synchronised(reference, params, step, *, reference_mixup=0.6, reference_sync_steps=512):
  """Every k steps the reference moves towards the policy: π₀ ← a θ + (1 - a) π₀.

  Args:
    reference: parameter tree.
    params: the policy's tree after the step, of the same structure.
    step: [] int; steps taken, this one included.
    reference_mixup: a in (0, 1]; 1 is the hard update, which replaces the reference.
    reference_sync_steps: k, at least 1.
  Returns:
    The reference of the next step. Source: arXiv:2404.09656, eqs. 4 and 5; a 0.6 and k 512 are
    TRL's.
  """
  bounds.positive(reference_mixup=reference_mixup, reference_sync_steps=reference_sync_steps)
  bounds.fraction(reference_mixup=reference_mixup)
  move = lambda: jax.tree.map(
      lambda old, new: (reference_mixup * new + (1.0 - reference_mixup) * old).astype(old.dtype),
      reference, params)
  return jax.lax.cond(step % reference_sync_steps == 0, move, lambda: reference)
