"""The whole update on eight devices: none does another's work, and no activations are gathered.

What XLA counts and what stands in the compiled text; a loop's body counts once on any mesh.
"""

import functools

import jax
import numpy as np
import optax
import pytest

from ptjax import sharding
from ptjax import types
from ptjax.losses import policy_gradient
from ptjax.models import hub
from ptjax.models import presets
from ptjax.plan import collectives
from ptjax.plan import dry_run
from ptjax.training import forward as training_forward
from ptjax.training import state as training_state
from ptjax.training import step as training_step

# Sizes that no two things share, so that a shape says what it is.
MODEL = presets.get('tiny', width=64, num_layers=1, num_heads=4, num_kv_heads=2, mlp_width=192,
                    vocab_size=512)
# 512 positions are one chunk of the head on any mesh.
PROMPTS, PROMPT_TOKENS, GROUP, TOKENS = 16, 16, 2, 16


def batch_shapes():
  of = lambda *shape, dtype=np.float32: jax.ShapeDtypeStruct(shape, dtype)
  rows = PROMPTS * GROUP
  return types.TokenBatch(
      prompt_tokens=of(PROMPTS, PROMPT_TOKENS, dtype=np.int32),
      prompt_lengths=of(PROMPTS, dtype=np.int32), tokens=of(rows, TOKENS, dtype=np.int32),
      loss_mask=of(rows, TOKENS, dtype=bool), on_policy=of(dtype=bool),
      inputs={'advantages': of(rows), 'rollout_log_probs': of(rows, TOKENS)})


@functools.cache
def compiled(text, devices, micro_batches):
  """The GRPO update for a mesh."""
  mesh = sharding.make_mesh(text, jax.devices()[:devices])
  params, optimizer = hub.param_shapes(MODEL), optax.adamw(1e-3)
  shardings = training_state.shardings(mesh, params, optimizer)
  state = jax.tree.map(
      lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
      jax.eval_shape(lambda p: training_state.init(p, optimizer), params), shardings)
  step = training_step.make_train_step(
      training_forward.make_forward(MODEL, remat='dots'), policy_gradient.grpo_loss, optimizer,
      mesh=mesh, state_sharding=shardings, micro_batches=micro_batches)
  with sharding.use(mesh):
    return step.lower(state, dry_run.place(batch_shapes(), mesh), {}).compile()


@pytest.mark.slow
@pytest.mark.parametrize('text, micro_batches', [
    ('data=8', 1), ('fsdp=8', 1), ('fsdp=8', 2), ('fsdp=4,tensor=2', 1)])
def test_eight_devices_share_the_update(text, micro_batches):
  alone, split = compiled('', 1, micro_batches), compiled(text, 8, micro_batches)
  flops = 8 * split.cost_analysis()['flops'] / alone.cost_analysis()['flops']
  assert flops <= 1.1, flops
  # What is gathered are weights: whole, or the part of one that tensor parallelism leaves a device.
  tensor = 2 if 'tensor' in text else 1
  weights = {leaf.shape[-2:] for leaf in jax.tree.leaves(hub.param_shapes(MODEL)) if leaf.ndim > 1}
  weights |= {(rows // tensor, columns) for rows, columns in weights} | {
      (rows, columns // tensor) for rows, columns in weights}
  gathered = set(collectives.shapes(split.as_text(), 'all-gather'))
  assert gathered <= weights, gathered - weights
  assert bool(gathered) == ('fsdp' in text)
