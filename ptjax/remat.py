"""What the backward pass recomputes, chosen from shapes and a device's memory.

`dots` keeps the results of products with weights: measured fastest on CPU (a whole update in 2.13
CPU seconds, 2.25 keeping all, 2.30 keeping the layers' inputs alone). `full` keeps those inputs
alone, in a tenth of the memory, and is for updates that would not fit otherwise.
"""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp

from ptjax import sharding
from ptjax.models import hub

_ROOM = 0.92  # of a device's memory, that a run may fill
# Times what the layers keep, that an update's activations take: one layer's own, the head's, and
# what the compiler keeps twice (tests/remat_test.py: 1.0 to 1.5).
_WORKING = 1.4


def settled(plan, policies, door, mesh, *, memory=None):
  """The plan of a stage with `model_settings.remat` chosen, where that is left to us.

  Args:
    plan: stages.StagePlan.
    policies: role -> assembly.Policy.
    door: the stage's, whose widest batch counts.
    mesh: the mesh.
    memory: GiB of a device; None: of the devices there are.
  """
  options = plan.config.model_settings
  if options.remat != 'auto':
    return plan
  memory = device_memory(mesh) if memory is None else memory * 2**30
  tokens = _tokens(plan, door) / sharding.batch_size(mesh) / plan.config.training.micro_batches
  found = choose(policies['policy'].config, tokens, held=_held(plan, policies, mesh), memory=memory,
                 tensor=mesh.shape['tensor'])
  return dataclasses.replace(plan, config=dataclasses.replace(
      plan.config, model_settings=dataclasses.replace(options, remat=found)))


def choose(model, tokens, *, held, memory, tensor=1):
  """Returns 'dots' where what that keeps fits beside all else, 'full' where it does not.

  Args:
    model: TransformerConfig.
    tokens: that a device runs in one micro-batch.
    held: bytes there all the while: weights, gradients, optimizer state, other models.
    memory: bytes of a device; None: not known, and then `dots`.
    tensor: devices that share heads and MLP.
  """
  fits = memory is None or held + _WORKING * kept_bytes(model, tokens, tensor) <= _ROOM * memory
  return 'dots' if fits else 'full'


def kept_bytes(model, tokens, tensor=1):
  """Bytes that all layers keep for the backward pass under `dots`: products and inputs, float32."""
  heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
  mlp = (2 if model.gated_mlp else 1) * model.mlp_width
  each = (heads + mlp) / tensor + 3 * model.width
  return 4 * tokens * model.num_layers * each


def device_memory(mesh):
  """Bytes of a device of the mesh, or None where nobody says."""
  device = mesh.local_devices[0]
  if device.platform == 'cpu':  # of which there may be several virtual ones
    try:
      whole = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, OSError, ValueError):
      return None
    return whole / len(mesh.local_devices)
  return (device.memory_stats() or {}).get('bytes_limit')


def _tokens(plan, door):
  """Tokens of an update's widest batch."""
  batch, training, rollout = door.widest(), plan.config.training, plan.config.rollout
  if plan.online:
    prompts = rollout.num_prompts // training.mini_batches
    return prompts * (batch.tokens.shape[1] + rollout.group_size * rollout.max_completion_tokens)
  if plan.packs_completions:  # in rows with hardly any padding
    return int(batch.prompt_lengths.sum() + batch.loss_mask.sum())
  whole = batch.prompt_tokens.size  # of packed examples, their targets among them
  return whole + (batch.tokens.size if batch.packing is None else 0)


def _held(plan, policies, mesh):
  """Bytes on a device beside activations: weights, gradients and two moments of what trains."""
  def size(model):
    shapes = hub.param_shapes(model)
    return sum(
        math.prod(place.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf, place in zip(jax.tree.leaves(shapes),
                               jax.tree.leaves(sharding.tree_sharding(mesh, shapes))))
  policy = size(policies['policy'].config)
  adapted = plan.config.lora.rank > 0  # adapters themselves are small
  copies = 1 if adapted else 4 + (plan.online and plan.bind().needs_reference)
  found = copies * policy
  if plan.config.critic == 'model':
    found += 4 * policy
  if 'teacher' in policies and 'teacher' in plan.row.models:
    found += size(policies['teacher'].config)
  return found
