"""Batch -> gradient -> update: one compiled step for every method.

A loss touches the model only through its outputs (`log_probs`, `entropy`). That makes exact
micro-batching possible for any loss, also one that looks at the whole batch: first the outputs of
all micro-batches, then the loss's gradient with respect to them, then that gradient fed back
micro-batch by micro-batch.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import optax

from ptjax import sharding

# What the policy's forward pass offers; a loss asks for one by naming a parameter so.
MODEL_OUTPUTS = ('log_probs', 'entropy')


def required_inputs(loss):
  """Names of the arrays a loss cannot do without."""
  return tuple(name for name, p in inspect.signature(loss).parameters.items()
               if p.default is inspect.Parameter.empty)


def call(loss, outputs, batch):
  """Calls `loss` with each array it names, from the model's outputs and the batch.

  Args:
    loss: `loss(log_probs, *, arrays..., hyperparameters...) -> (scalar, metrics)`.
    outputs: dict of model outputs, [B, T] each.
    batch: types.TokenBatch.
  Raises:
    ValueError: the loss names an array that neither offers.
  """
  offered = {**batch.inputs, 'loss_mask': batch.loss_mask, **outputs}
  bound = loss.keywords if isinstance(loss, functools.partial) else {}
  names = inspect.signature(loss).parameters
  missing = [n for n in required_inputs(loss) if n not in offered]
  if missing:
    raise ValueError(f'the loss needs {", ".join(missing)}, but the batch offers only '
                     f'{", ".join(sorted(offered))}')
  return loss(**{n: offered[n] for n in names if n in offered and n not in bound})


def make_train_step(forward, loss, optimizer, *, schedule=None, micro_batches=1,
                    mesh=None, state_sharding=None):
  """Returns a compiled `(state, batch) -> (state, metrics)`; `state` is donated.

  Args:
    forward: `forward(params, prompt_tokens, prompt_lengths, tokens) -> outputs`, a dict with
      the MODEL_OUTPUTS, [B, T] float32 each.
    loss: a pure loss (see `call`).
    optimizer: optax transformation.
    schedule: `step -> learning rate`, for the metrics alone.
    micro_batches: into how many parts the batch is split along prompts; the gradient does not
      depend on it.
    mesh, state_sharding: where the state lies; batches are split over data and fsdp. Both None
      runs on the default device.
  Returns:
    The step. A loss or gradient that is not finite leaves parameters and optimizer untouched and
    counts in `state.bad_steps`.
  """
  attached = tuple(n for n in MODEL_OUTPUTS if n in inspect.signature(loss).parameters)

  def outputs_of(params, batch):
    return forward(params, batch.prompt_tokens, batch.prompt_lengths, batch.tokens)

  def gradients(params, batch):
    if micro_batches == 1:
      def objective(params):
        outputs = outputs_of(params, batch)
        loss_value, metrics = call(loss, outputs, with_old_log_probs(batch, outputs))
        return loss_value, (metrics, outputs)
      (loss_value, (metrics, outputs)), grads = jax.value_and_grad(
          objective, has_aux=True)(params)
      return loss_value, metrics, outputs, grads

    parts = split(batch, micro_batches)
    _, outputs = jax.lax.scan(lambda _, part: (None, outputs_of(params, part)), None, parts)
    outputs = jax.tree.map(lambda x: join(x, batch), outputs)

    def whole(attached_outputs):
      return call(loss, {**outputs, **attached_outputs}, with_old_log_probs(batch, outputs))
    (loss_value, metrics), cotangents = jax.value_and_grad(whole, has_aux=True)(
        {n: outputs[n] for n in attached})
    cotangents = split_arrays(cotangents, micro_batches, batch.prompt_lengths.shape[0])

    def accumulate(grads, item):
      part, cotangent = item
      _, pull_back = jax.vjp(
          lambda p: {n: outputs_of(p, part)[n] for n in attached}, params)
      return jax.tree.map(jnp.add, grads, pull_back(cotangent)[0]), None
    grads, _ = jax.lax.scan(
        accumulate, jax.tree.map(jnp.zeros_like, params), (parts, cotangents))
    return loss_value, metrics, outputs, grads

  def train_step(state, batch):
    loss_value, metrics, outputs, grads = gradients(state.params, batch)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss_value) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jnp.where(finite, new, old)
    new_state = state.replace(
        step=state.step + 1,
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        bad_steps=jnp.where(finite, 0, state.bad_steps + 1))
    metrics = {**metrics, **batch_metrics(outputs, batch), 'loss': loss_value,
               'grad_norm': grad_norm, 'bad_steps': new_state.bad_steps}
    if schedule is not None:
      metrics['learning_rate'] = schedule(state.step)
    return new_state, metrics

  if mesh is None:
    return jax.jit(train_step, donate_argnames='state')
  jitted = jax.jit(
      train_step, donate_argnames='state',
      in_shardings=(state_sharding, None),  # the batch comes placed by `place`
      out_shardings=(state_sharding, sharding.replicated(mesh)))

  def placed_step(state, batch):
    with sharding.use(mesh):
      return jitted(state, batch)
  placed_step.lower = jitted.lower
  return placed_step


def make_log_prob_step(forward, *, mesh=None, params_sharding=None):
  """Returns a compiled `(params, batch) -> log_probs [B, T]`, for old and reference log-probs."""
  def log_prob_step(params, batch):
    return forward(params, batch.prompt_tokens, batch.prompt_lengths, batch.tokens)['log_probs']
  if mesh is None:
    return jax.jit(log_prob_step)
  jitted = jax.jit(log_prob_step, in_shardings=(params_sharding, None),
                   out_shardings=sharding.batch(mesh))

  def placed_step(params, batch):
    with sharding.use(mesh):
      return jitted(params, batch)
  placed_step.lower = jitted.lower
  return placed_step


def place(batch, mesh):
  """Puts a host batch on the mesh: leading dimensions over data and fsdp, scalars everywhere."""
  if mesh is None:
    return jax.tree.map(jnp.asarray, batch)
  return sharding.put(batch, jax.tree.map(
      lambda x: sharding.batch(mesh) if x.ndim else sharding.replicated(mesh), batch))


def with_old_log_probs(batch, outputs):
  """Fills in `old_log_probs` where the policy has not moved since the rollout.

  Then they are the policy's own log-probs, so the ratio is exactly 1 and no extra forward pass is
  paid. A batch whose old log-probs are the sampler's (`rollout.reuse_log_probs`) keeps them.
  """
  own = jax.lax.stop_gradient(outputs['log_probs'])
  recorded = batch.inputs.get('old_log_probs')
  old = own if recorded is None else jnp.where(batch.on_policy, own, recorded)
  return batch.replace(inputs={**batch.inputs, 'old_log_probs': old})


def batch_metrics(outputs, batch):
  """Entropy, and how far the sampler's log-probs are from the trainer's.

  `sampling/log_prob_gap_max` (nats) and `sampling/effective_sample_size` (a fraction, of the
  sequence weights trainer / sampler) compare the same weights on the first update of a rollout,
  and on later ones through the old log-probs recomputed before it. Without those, the later
  numbers compare a moved policy, and `online.RolloutSource.complete` puts the first in their place.
  """
  mask = batch.loss_mask
  count = jnp.maximum(mask.sum(), 1)
  metrics = {'entropy': jnp.where(mask, outputs['entropy'], 0.0).sum() / count}
  rollout = batch.inputs.get('rollout_log_probs')
  if rollout is not None:
    trainer = with_old_log_probs(batch, outputs).inputs['old_log_probs']
    gap = jnp.where(mask, trainer - rollout, 0.0)  # [B, T]
    weights = jnp.exp(jnp.clip(gap.sum(-1), -20.0, 20.0))  # [B]
    metrics['sampling/log_prob_gap_max'] = jnp.abs(gap).max()
    metrics['sampling/effective_sample_size'] = (
        jnp.square(weights.sum()) / (weights.size * jnp.square(weights).sum()))
  return metrics


def split(batch, parts):
  """Splits a batch along prompts into `parts` stacked parts, without moving rows across devices.

  Part i takes prompts i, i + parts, ...: with prompts lying on the devices in blocks, each device
  then holds its share of every part.
  """
  return split_arrays(batch, parts, batch.prompt_lengths.shape[0])


def split_arrays(tree, parts, num_prompts):
  def one(x):
    if x.ndim == 0:
      return jnp.broadcast_to(x, (parts,))
    group = x.shape[0] // num_prompts
    x = x.reshape(num_prompts // parts, parts, group, *x.shape[1:])
    return jnp.swapaxes(x, 0, 1).reshape(parts, num_prompts // parts * group, *x.shape[3:])
  return jax.tree.map(one, tree)


def join(x, batch):
  """Undoes `split_arrays` on one array [parts, B / parts, ...]."""
  num_prompts = batch.prompt_lengths.shape[0]
  parts, rows = x.shape[:2]
  group = parts * rows // num_prompts
  x = x.reshape(parts, num_prompts // parts, group, *x.shape[2:])
  return jnp.swapaxes(x, 0, 1).reshape(num_prompts * group, *x.shape[3:])
