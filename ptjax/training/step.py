"""Batch -> gradient -> update: one compiled step for every method.

A loss touches the model only through its outputs (`log_probs`, `entropy`). Where its derivative by
a token's outputs needs no other token's, which per_token.py finds out, the model's head is told it
and makes the gradient as it goes, micro-batch by micro-batch. Any other loss is exact too: first
the outputs of all micro-batches, then the loss's gradient with respect to them, then that gradient
fed back micro-batch by micro-batch.

A loss says what it needs by the names of its arguments: model outputs, arrays of the batch, `pair`
or `side` (types.PairLogProbs, types.SideLogProbs: preference losses), `loss_state` (a running
statistic; it then returns the new one as a third value) and `key` (a fresh PRNG key). `call` says
which rows of the batch each name means.
"""

import contextlib
import functools
import inspect

import jax
import jax.numpy as jnp
import optax

from ptjax import keys
from ptjax import process
from ptjax import sharding
from ptjax import types
from ptjax.models import head
from ptjax.training import layout
from ptjax.training import per_token

# Model output -> the arguments of a loss that read it; each output has leading dimension B.
MODEL_OUTPUTS = {
    'log_probs': ('log_probs', 'pair', 'side', 'mismatched_log_probs', 'demonstration_log_probs'),
    'entropy': ('entropy',),  # [B, T] nats
    'sum_squares': ('chosen_sum_squares', 'rejected_sum_squares'),  # [B, T], log of Σ π²
    'divergence': ('divergence',),  # [B, T] nats, between policy and teacher
    'values': ('values',),  # [B, T], of a critic
    'scores': ('chosen_rewards', 'rejected_rewards', 'preference_logits'),  # [B], of a reward head
    'step_logits': ('step_logits',),  # [B, T, 2], of a process reward head
}


def required_inputs(loss):
  """Names of the arrays a loss cannot do without."""
  return tuple(name for name, p in inspect.signature(loss).parameters.items()
               if p.default is inspect.Parameter.empty)


def initial_loss_state(loss):
  """The running statistics a loss starts with: its own default, {} if it has none."""
  parameter = inspect.signature(loss).parameters.get('loss_state')
  return {} if parameter is None else jax.tree.map(jnp.asarray, parameter.default)


def model_outputs(loss):
  """The model outputs a loss reads, and differentiates."""
  names = set(inspect.signature(loss).parameters)
  found = {output for output, arguments in MODEL_OUTPUTS.items() if names & set(arguments)}
  if 'rewards' in names and 'log_probs' not in found:  # a reward model's, not the environment's
    found.add('scores')
  return tuple(output for output in MODEL_OUTPUTS if output in found)


def completions_per_prompt(loss, given=()):
  """How many rows of each prompt the loss tells apart: pairs, mismatched, triples; else 1.

  Args:
    loss: the loss.
    given: names of arrays the batch holds by themselves, for which no rows are needed.
  """
  names = set(inspect.signature(loss).parameters) - set(given)
  if 'demonstration_log_probs' in names:
    return 3
  return 2 if names & {'pair', 'chosen_rewards', 'mismatched_log_probs'} else 1


def offered_arguments(loss, outputs, batch):
  """Everything a loss can name, but for `loss_state` and `key`.

  Preference rows come prompt by prompt: chosen, rejected (and the demonstration of a triple).
  Ranked completions come prompt by prompt too, and their `ranks` and scores go out as [P, K].
  Unpaired rows that have a mismatched completion come as own, mismatched. An array of the batch's
  `inputs` wins over what its rows would give.
  """
  names = inspect.signature(loss).parameters
  step = completions_per_prompt(loss, batch.inputs)
  of_row = lambda tree, row: jax.tree.map(lambda x: x[row::step], tree)
  side = types.SideLogProbs(log_probs=outputs.get('log_probs'), loss_mask=batch.loss_mask,
                            reference_log_probs=batch.inputs.get('reference_log_probs'))
  offered = {'loss_mask': batch.loss_mask, **outputs}
  if 'pair' in names:
    offered['pair'] = types.PairLogProbs(chosen=of_row(side, 0), rejected=of_row(side, 1))
  if 'side' in names:
    offered['side'] = of_row(side, 0)
  for prefix, row in (('mismatched', 1), ('demonstration', 2)):
    if f'{prefix}_log_probs' in names and step > row:
      other = of_row(side, row)
      offered.update({f'{prefix}_log_probs': other.log_probs,
                      f'{prefix}_loss_mask': other.loss_mask,
                      f'{prefix}_reference_log_probs': other.reference_log_probs})
  if 'sum_squares' in outputs:
    offered['chosen_sum_squares'], offered['rejected_sum_squares'] = (
        of_row(outputs['sum_squares'], row) for row in (0, 1))
  if 'scores' in outputs:
    scores = outputs['scores']
    offered.update(rewards=scores, preference_logits=scores)
    if 'chosen_rewards' in names:
      offered['chosen_rewards'], offered['rejected_rewards'] = of_row(scores, 0), of_row(scores, 1)
  offered.update(batch.inputs)
  if 'scores' in outputs and 'ranks' in offered:
    by_prompt = (batch.prompt_lengths.shape[0], -1)
    offered.update({name: offered[name].reshape(by_prompt) for name in ('rewards', 'ranks')})
  return offered


def call(loss, outputs, batch, *, loss_state=None, key=None):
  """Calls `loss` with each argument it names.

  Args:
    loss: `loss(log_probs, *, arrays..., hyperparameters...) -> (scalar, metrics[, loss_state])`.
    outputs: dict of MODEL_OUTPUTS.
    batch: types.TokenBatch, rows in the order of `offered_arguments`.
    loss_state: running statistics, None for the loss's initial ones.
    key: PRNG key, needed by losses that draw.
  Returns:
    (scalar, metrics, loss_state).
  Raises:
    ValueError: the loss names an array that is not there.
  """
  names = inspect.signature(loss).parameters
  offered = offered_arguments(loss, outputs, batch)
  if loss_state is not None and 'loss_state' in names:
    offered['loss_state'] = loss_state
  if key is not None:
    offered['key'] = key
  bound = loss.keywords if isinstance(loss, functools.partial) else {}
  missing = [n for n in required_inputs(loss) if offered.get(n) is None]
  if missing:
    raise ValueError(f'the loss needs {", ".join(missing)}, but the batch offers only '
                     f'{", ".join(sorted(k for k, v in offered.items() if v is not None))}')
  result = loss(**{n: offered[n] for n in names if n in offered and n not in bound})
  return result if len(result) == 3 else (*result, loss_state)


def outputs_of_head(loss):
  """The model outputs a loss differentiates that come of the language head."""
  return tuple(name for name in model_outputs(loss) if name in head.DIFFERENTIABLE)


def head_slope(loss, batch, *, loss_state=None, key=None):
  """The loss's derivative by the head's outputs where each token's needs no other token, else None.

  Args:
    loss, batch, loss_state, key: as for `call`.
  Returns:
    A per_token.PerToken in the order of the rows that the forward pass runs on, or None.
  """
  attached, by_head = model_outputs(loss), outputs_of_head(loss)
  if not by_head or not set(attached) <= {*by_head, 'values'}:
    return None
  def derivative(values):
    def value(own):
      return call(loss, {**values, **own}, with_old_log_probs(batch, values),
                  loss_state=loss_state, key=key)[0]
    return jax.grad(value)({name: values[name] for name in by_head})
  shape = jax.ShapeDtypeStruct(batch.loss_mask.shape, jnp.float32)
  found = per_token.split(
      derivative, dict.fromkeys(attached, shape), mixed=set(attached) - set(by_head))
  return found and layout.of_rows(found, batch)


def make_train_step(forward, loss, optimizer, *, schedule=None, micro_batches=1, seed=0,
                    part_tokens=None, follow=None, mesh=None, state_sharding=None):
  """Returns a compiled `(state, batch, frozen={}) -> (state, metrics)`; `state` is donated.

  Args:
    forward: `forward(params, frozen, batch) -> outputs`, a dict with the MODEL_OUTPUTS that the
      loss names; `frozen` holds trees that take part without training (see forward.py).
    loss: a pure loss (see `call`).
    optimizer: optax transformation.
    schedule: `step -> learning rate`, for the metrics alone.
    micro_batches: into how many parts the batch is split along prompts, or its packed rows along
      those; the gradient does not depend on it.
    seed: of the keys of losses that draw.
    part_tokens: where parts cost nothing, as the loss is one of single tokens, into how many tokens
      a part the batch is split further, if its rows come out even; None: no further.
    follow: `follow(reference, params, step) -> reference` where `state.reference` moves; its
      log-probs are then computed anew in each step.
    mesh, state_sharding: where the state lies; batches are split over data and fsdp. Both None
      runs on the default device.
  Returns:
    The step. A loss or gradient that is not finite leaves parameters and optimizer untouched and
    counts in `state.bad_steps`.
  """
  attached = model_outputs(loss)
  by_head = outputs_of_head(loss)
  draws = 'key' in inspect.signature(loss).parameters
  takes_slope = 'slope' in inspect.signature(forward).parameters

  def run(params, frozen, laid, slope):
    return forward(params, frozen, laid, **({'slope': slope} if takes_slope else {}))

  def whole_loss(attached_values, outputs, batch, loss_state, key):
    batch = with_old_log_probs(batch, outputs)
    value, metrics, loss_state = call(
        loss, {**outputs, **attached_values}, batch, loss_state=loss_state, key=key)
    return value, (metrics, loss_state)

  def joined(outputs, batch):
    laid = layout.rows_of(batch)
    return layout.put_back(jax.tree.map(lambda x: layout.join(x, laid), outputs), batch)

  def in_parts(params, frozen, batch):
    _, outputs = jax.lax.scan(lambda _, part: (None, run(params, frozen, part, None)), None,
                              layout.split(layout.rows_of(batch), micro_batches))
    return joined(outputs, batch)

  def gradients(params, frozen, batch, loss_state, key):
    laid, slope = layout.rows_of(batch), None
    if takes_slope:
      slope = head_slope(loss, batch, loss_state=loss_state, key=key)
    in_one_pass, parts = slope is not None and attached == by_head, micro_batches
    if in_one_pass and part_tokens is not None:
      parts = layout.even_parts(laid, micro_batches, part_tokens)
    if parts == 1:
      def objective(params):
        outputs = layout.put_back(run(params, frozen, laid, slope), batch)
        value, aux = whole_loss({}, outputs, batch, loss_state, key)
        return value, (*aux, outputs)
      (value, (metrics, loss_state, outputs)), grads = jax.value_and_grad(
          objective, has_aux=True)(params)
      return value, metrics, loss_state, outputs, grads

    names = by_head
    if not in_one_pass:
      outputs = in_parts(params, frozen, batch)
      (value, (metrics, loss_state)), cotangents = jax.value_and_grad(whole_loss, has_aux=True)(
          {n: outputs[n] for n in attached if n in outputs}, outputs, batch, loss_state, key)
      slope = per_token.constant(layout.taken_from(cotangents, batch))
      names = tuple(cotangents)

    def accumulate(grads, item):
      part, slope_here = item[0], slope._replace(arrays=item[1])
      def outputs_of(params):
        outputs = run(params, frozen, part, slope_here)
        return {n: outputs[n] for n in names}, outputs
      values, pull_back, outputs = jax.vjp(outputs_of, params, has_aux=True)
      grads = jax.tree.map(jnp.add, grads, pull_back(slope_here(values))[0])
      return grads, outputs if in_one_pass else None
    arrays = layout.split_arrays(slope.arrays, parts, laid.prompt_lengths.shape[0])
    grads, of_parts = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params),
                                   (layout.split(laid, parts), arrays))
    if in_one_pass:
      outputs = joined(of_parts, batch)
      value, (metrics, loss_state) = whole_loss({}, outputs, batch, loss_state, key)
    return value, metrics, loss_state, outputs, grads

  def train_step(state, batch, frozen):
    key = keys.stream(seed, 'loss', state.step) if draws else None
    if follow is not None:
      seen = in_parts(state.reference, frozen, batch)['log_probs']
      batch = batch.replace(inputs={**batch.inputs, 'reference_log_probs': seen})
    value, metrics, loss_state, outputs, grads = gradients(
        state.params, frozen, batch, state.loss_state, key)
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
    if follow is not None:
      new_state = new_state.replace(
          reference=follow(state.reference, new_state.params, new_state.step))
    metrics = {**metrics, **batch_metrics(outputs, batch), 'loss': value,
               'grad_norm': grad_norm, 'bad_steps': new_state.bad_steps}
    if schedule is not None:
      metrics['learning_rate'] = schedule(state.step)
    return new_state, metrics

  compiled = functools.partial(
      jax.jit, donate_argnames='state', compiler_options=process.frugal_compilation())
  if mesh is None:
    jitted = compiled(train_step)
  else:
    jitted = compiled(
        train_step,
        in_shardings=(state_sharding, None, None),  # batch and frozen trees come placed
        out_shardings=(state_sharding, sharding.replicated(mesh)))

  def placed_step(state, batch, frozen=None):
    with _within(mesh):
      return jitted(state, batch, frozen or {})
  placed_step.lower = jitted.lower
  return placed_step


def make_log_prob_step(forward, *, output='log_probs', parts=1, mesh=None):
  """Returns a compiled `(params, batch, frozen={}) -> [B, T]` of one output, without gradient.

  Args:
    forward: see `make_train_step`.
    output: one of MODEL_OUTPUTS.
    parts: into how many parts the batch is split as micro-batches are, which bounds activations;
      one that does not split so over the devices is taken whole.
    mesh: as for `make_train_step`.
  """
  devices = 1 if mesh is None else sharding.batch_size(mesh)

  def log_prob_step(params, batch, frozen):
    one = lambda part: forward(params, frozen, part)[output]
    laid = layout.rows_of(batch)
    if parts == 1 or laid.prompt_lengths.shape[0] % (parts * devices):
      return layout.put_back(one(laid), batch)
    return layout.put_back(layout.join(jax.lax.map(one, layout.split(laid, parts)), laid), batch)
  return _compiled(log_prob_step, mesh, None if mesh is None else sharding.batch(mesh))


def make_loss_step(forward, loss, *, mesh=None):
  """Returns a compiled `(params, batch, loss_state, frozen={}) -> metrics`, for held-out rows."""
  def loss_step(params, batch, loss_state, frozen):
    outputs = layout.put_back(forward(params, frozen, layout.rows_of(batch)), batch)
    key = keys.stream(0, 'held_out', 0) if 'key' in inspect.signature(loss).parameters else None
    value, metrics, _ = call(loss, outputs, with_old_log_probs(batch, outputs),
                             loss_state=loss_state, key=key)
    return {**metrics, **batch_metrics(outputs, batch), 'loss': value}
  return _compiled(loss_step, mesh, None if mesh is None else sharding.replicated(mesh))


def _compiled(function, mesh, out):
  jitted = jax.jit(function) if mesh is None else jax.jit(function, out_shardings=out)
  def run(params, batch, *arrays, frozen=None):
    with _within(mesh):
      return jitted(params, batch, *arrays, frozen or {})
  run.lower = jitted.lower
  return run


def _within(mesh):
  return contextlib.nullcontext() if mesh is None else sharding.use(mesh)


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
  if 'log_probs' not in outputs:  # a reward model's
    return batch
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
  metrics = {}
  if 'entropy' in outputs:
    metrics['entropy'] = jnp.where(mask, outputs['entropy'], 0.0).sum() / count
  rollout = batch.inputs.get('rollout_log_probs')
  if rollout is None and 'likeliest' in outputs:
    metrics['mean_token_accuracy'] = (mask & outputs['likeliest']).sum() / count
  if rollout is not None:
    trainer = outputs['log_probs']
    if 'old_log_probs' in batch.inputs:
      trainer = jnp.where(batch.on_policy, trainer, batch.inputs['old_log_probs'])
    for name in ('demonstration', 'rival'):  # no sampler drew those, or another model's
      if name in batch.inputs:
        mask &= ~batch.inputs[name][:, None]
    gap = jnp.where(mask, trainer - rollout, 0.0)  # [B, T]
    weights = jnp.exp(jnp.clip(gap.sum(-1), -20.0, 20.0))  # [B]
    metrics['sampling/log_prob_gap_max'] = jnp.abs(gap).max()
    metrics['sampling/effective_sample_size'] = (
        jnp.square(weights.sum()) / (weights.size * jnp.square(weights).sum()))
  return metrics
