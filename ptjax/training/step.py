"""Batch -> gradient -> update: one compiled step for every method.

A loss touches the model only through its outputs (`log_probs`, `entropy`). That makes exact
micro-batching possible for any loss, also one that looks at the whole batch: first the outputs of
all micro-batches, then the loss's gradient with respect to them, then that gradient fed back
micro-batch by micro-batch.

A loss says what it needs by the names of its arguments: model outputs, arrays of the batch, `pair`
or `side` (types.PairLogProbs, types.SideLogProbs: preference losses), `loss_state` (a running
statistic; it then returns the new one as a third value) and `key` (a fresh PRNG key).
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import optax

from ptjax import keys
from ptjax import sharding
from ptjax import types

# What the policy's forward pass offers; a loss asks for one by naming a parameter so.
MODEL_OUTPUTS = ('log_probs', 'entropy')


def required_inputs(loss):
  """Names of the arrays a loss cannot do without."""
  return tuple(name for name, p in inspect.signature(loss).parameters.items()
               if p.default is inspect.Parameter.empty)


def initial_loss_state(loss):
  """The running statistics a loss starts with: its own default, {} if it has none."""
  parameter = inspect.signature(loss).parameters.get('loss_state')
  return {} if parameter is None else jax.tree.map(jnp.asarray, parameter.default)


def attached_outputs(loss):
  """The model outputs a loss differentiates."""
  names = set(inspect.signature(loss).parameters)
  if names & {'pair', 'side'}:
    names.add('log_probs')
  return tuple(n for n in MODEL_OUTPUTS if n in names)


def call(loss, outputs, batch, *, loss_state=None, key=None):
  """Calls `loss` with each argument it names.

  Args:
    loss: `loss(log_probs, *, arrays..., hyperparameters...) -> (scalar, metrics[, loss_state])`.
    outputs: dict of model outputs, [B, T] each.
    batch: types.TokenBatch; for `pair` its completions come as chosen, rejected, chosen, ...
    loss_state: running statistics, None for the loss's initial ones.
    key: PRNG key, needed by losses that draw.
  Returns:
    (scalar, metrics, loss_state).
  Raises:
    ValueError: the loss names an array that is not there.
  """
  names = inspect.signature(loss).parameters
  offered = {**batch.inputs, 'loss_mask': batch.loss_mask, **outputs}
  if loss_state is not None and 'loss_state' in names:
    offered['loss_state'] = loss_state
  if key is not None:
    offered['key'] = key
  side = types.SideLogProbs(log_probs=outputs.get('log_probs'), loss_mask=batch.loss_mask,
                            reference_log_probs=batch.inputs.get('reference_log_probs'))
  if 'pair' in names:
    offered['pair'] = types.PairLogProbs(
        chosen=jax.tree.map(lambda x: x[0::2], side),
        rejected=jax.tree.map(lambda x: x[1::2], side))
  if 'side' in names:
    offered['side'] = side
  bound = loss.keywords if isinstance(loss, functools.partial) else {}
  missing = [n for n in required_inputs(loss) if n not in offered]
  if missing:
    raise ValueError(f'the loss needs {", ".join(missing)}, but the batch offers only '
                     f'{", ".join(sorted(offered))}')
  result = loss(**{n: offered[n] for n in names if n in offered and n not in bound})
  return result if len(result) == 3 else (*result, loss_state)


def make_train_step(forward, loss, optimizer, *, schedule=None, micro_batches=1, seed=0,
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
    seed: of the keys of losses that draw.
    mesh, state_sharding: where the state lies; batches are split over data and fsdp. Both None
      runs on the default device.
  Returns:
    The step. A loss or gradient that is not finite leaves parameters and optimizer untouched and
    counts in `state.bad_steps`.
  """
  attached = attached_outputs(loss)
  draws = 'key' in inspect.signature(loss).parameters

  def outputs_of(params, batch):
    return forward(params, batch.prompt_tokens, batch.prompt_lengths, batch.tokens)

  def whole_loss(attached_values, outputs, batch, loss_state, key):
    batch = with_old_log_probs(batch, outputs)
    value, metrics, loss_state = call(
        loss, {**outputs, **attached_values}, batch, loss_state=loss_state, key=key)
    return value, (metrics, loss_state)

  def gradients(params, batch, loss_state, key):
    if micro_batches == 1:
      def objective(params):
        outputs = outputs_of(params, batch)
        value, aux = whole_loss({}, outputs, batch, loss_state, key)
        return value, (*aux, outputs)
      (value, (metrics, loss_state, outputs)), grads = jax.value_and_grad(
          objective, has_aux=True)(params)
      return value, metrics, loss_state, outputs, grads

    parts = split(batch, micro_batches)
    _, outputs = jax.lax.scan(lambda _, part: (None, outputs_of(params, part)), None, parts)
    outputs = jax.tree.map(lambda x: join(x, batch), outputs)
    (value, (metrics, loss_state)), cotangents = jax.value_and_grad(whole_loss, has_aux=True)(
        {n: outputs[n] for n in attached}, outputs, batch, loss_state, key)
    cotangents = split_arrays(cotangents, micro_batches, batch.prompt_lengths.shape[0])

    def accumulate(grads, item):
      part, cotangent = item
      _, pull_back = jax.vjp(
          lambda p: {n: outputs_of(p, part)[n] for n in attached}, params)
      return jax.tree.map(jnp.add, grads, pull_back(cotangent)[0]), None
    grads, _ = jax.lax.scan(
        accumulate, jax.tree.map(jnp.zeros_like, params), (parts, cotangents))
    return value, metrics, loss_state, outputs, grads

  def train_step(state, batch):
    key = keys.stream(seed, 'loss', state.step) if draws else None
    value, metrics, loss_state, outputs, grads = gradients(
        state.params, batch, state.loss_state, key)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jnp.where(finite, new, old)
    new_state = state.replace(
        step=state.step + 1,
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        loss_state=jax.tree.map(keep, loss_state, state.loss_state),
        bad_steps=jnp.where(finite, 0, state.bad_steps + 1))
    metrics = {**metrics, **batch_metrics(outputs, batch), 'loss': value,
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
  """Fills in `old_log_probs`.

  While the policy has not moved since the rollout they are its own, so the ratio is exactly 1 and
  no extra forward pass is paid. Afterwards they are those recomputed before the first update or,
  with `rollout.reuse_log_probs`, from the start, those of the sampler.
  """
  own = jax.lax.stop_gradient(outputs['log_probs'])
  recorded = batch.inputs.get('old_log_probs', batch.inputs.get('rollout_log_probs'))
  old = own if recorded is None else jnp.where(batch.on_policy, own, recorded)
  return batch.replace(inputs={**batch.inputs, 'old_log_probs': old})


def batch_metrics(outputs, batch):
  """Entropy; of demonstrations the accuracy; of rollouts how far sampler and trainer are apart.

  `mean_token_accuracy` is the fraction of tokens that are the policy's likeliest.
  `sampling/log_prob_gap_max` (nats) and `sampling/effective_sample_size` (a fraction, of the
  sequence weights trainer / sampler) compare the same weights on the first update of a rollout,
  and on later ones where old log-probs were recomputed before it. Without those the later numbers
  are of a moved policy, and `online.RolloutSource.complete` puts the first in their place.
  """
  mask = batch.loss_mask
  count = jnp.maximum(mask.sum(), 1)
  metrics = {'entropy': jnp.where(mask, outputs['entropy'], 0.0).sum() / count}
  rollout = batch.inputs.get('rollout_log_probs')
  if rollout is None and 'likeliest' in outputs:
    metrics['mean_token_accuracy'] = (mask & outputs['likeliest']).sum() / count
  if rollout is not None:
    trainer = outputs['log_probs']
    if 'old_log_probs' in batch.inputs:
      trainer = jnp.where(batch.on_policy, trainer, batch.inputs['old_log_probs'])
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
