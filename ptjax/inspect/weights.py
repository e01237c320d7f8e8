"""What a loss does to each token: w = -∂loss/∂log_probs, split into the pieces it is made of."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptjax.inspect import bound as bounds
from ptjax.pieces import advantage
from ptjax.pieces import denominator
from ptjax.pieces import likelihood
from ptjax.pieces import masking
from ptjax.pieces import reduction

# Outputs of a model beside the log-probs of tokens; a gradient there is no policy gradient.
NO_POLICY_GRADIENT = {
    **dict.fromkeys(('divergence', 'logits'), 'a term over the whole vocabulary'),
    'entropy': 'an entropy term, over the whole vocabulary',
    'values': "the critic's regression",
    **dict.fromkeys(('rewards', 'chosen_rewards', 'rejected_rewards'), "a reward model's head"),
    'preference_logits': "a judge's head", 'step_logits': "a step verifier's head"}

# How the split was found.
COMPOSED = 'composed of pieces'  # exactly, from the loss's own `weighted_loss` calls
PER_RESPONSE = 'one coefficient per response'  # pairs or labels: ratio 1, advantage ±A
INFERRED = 'no composition; these pieces explain its weights'
UNEXPLAINED = 'no composition, and no pieces explain its weights'
NONE = 'not a policy gradient'

REDUCTIONS = {'token_mean': reduction.token_mean, 'sequence_mean': reduction.sequence_mean,
              'fixed_length_mean': reduction.fixed_length_mean,
              'sequence_sum': reduction.sequence_sum}


@dataclasses.dataclass(frozen=True)
class Part:
  """One term of a loss; the product of its arrays is its weight on every token. All [R, T]."""
  stable: Any  # stabilization mask, or a soft gate
  ratio: Any  # policy over denominator
  advantages: Any
  reduction: Any  # the factor of the reduction, coefficients included; 0 off the part's tokens

  @property
  def weights(self):
    return self.stable * self.ratio * self.advantages * self.reduction

  @property
  def tokens(self):
    """[R, T] bool; the tokens this part is about."""
    return self.reduction != 0


@dataclasses.dataclass(frozen=True)
class Inspection:
  """What `inspect_loss` found. Rows R are completions; of pairs, all chosen, then all rejected.

  Attributes:
    name: of the algorithm or function.
    split: how the pieces were found; one of the module's constants.
    loss: the loss's value.
    sides: [R] strings, which of the model's outputs each row is: log_probs, chosen, ...
    log_probs: [R, T] nats; 0 off the mask.
    loss_mask: [R, T] bool.
    weights: [R, T], -∂loss/∂log_probs.
    parts: name -> Part. Their weights add up to `weights`.
    others: output of the model -> why the gradient through it is no policy gradient.
    gradients: output of the model -> ∂loss/∂output, all of them.
    summary: name -> number, as `table` prints it.
    tokens: [R] lists of the tokens' text, or None.
    bound: bound.Bound; the loss as a function of the model's outputs.
  """
  name: str
  split: str
  loss: float
  sides: tuple
  log_probs: Any
  loss_mask: Any
  weights: Any
  parts: dict
  others: dict
  gradients: dict
  summary: dict
  tokens: Any
  bound: Any

  def table(self, heaviest=8):
    """The summary and `heaviest` tokens, one per row, as text for a terminal."""
    lines = [f'{self.name}: {self.split}']
    lines += [f'  gradient through {name}: {why}' for name, why in self.others.items()]
    lines += [f'  {name:<42} {value:>12.5g}' for name, value in self.summary.items()]
    rows = [('row', 'token', 'part', 'log prob', 'mask', 'ratio', 'advantage', 'reduction',
             'weight')]
    sizes = np.abs(self.weights).max(axis=1, initial=0.0)
    for i in np.argsort(-sizes, kind='stable')[:heaviest]:
      if not sizes[i]:
        break
      t = np.abs(self.weights[i]).argmax()
      side = self.sides[i]
      row = f'{side.removesuffix("log_probs").rstrip("_")} {i - self.sides.index(side)}'
      text = f'{t} {self.tokens[i][t]!r}' if self.tokens else f'{t}'
      rows += [(row.strip(), text, name, *(f'{x[i, t]:.4g}' for x in (
          self.log_probs, part.stable, part.ratio, part.advantages, part.reduction, part.weights)))
               for name, part in self.parts.items() if part.weights[i, t]]
    if len(rows) > 1:
      widths = [max(map(len, column)) for column in zip(*rows)]
      lines.append('  the heaviest token of each of the heaviest rows:')
      lines += ['  '.join(['', *(cell.ljust(width) if i < 3 else cell.rjust(width) for i, (
          cell, width) in enumerate(zip(row, widths)))]) for row in rows]
    return '\n'.join(lines)


def inspect_loss(loss, batch, *, tokens=None, pull_back=None, **hyperparameters):
  """Takes a loss apart at a batch.

  Args:
    loss: a name of the table, modifiers allowed (`grpo+tis`), `file.py:function`, a row
      (algorithms.Algorithm), or any function `loss(log_probs, *, arrays, hyperparameters)` that
      returns a scalar or a tuple that begins with one.
    batch: dict of arrays by argument name, or a types.TokenBatch whose `inputs` hold `log_probs`.
      Advantages that are missing are estimated from `rewards` and `group_size` as the row says.
    tokens: {output of the model, such as log_probs or chosen: lists of strings}, the text of the
      tokens of each row, for the table and the picture.
    pull_back: None, or a function from {output of the model: gradient} to one flat gradient by the
      model's parameters, such as the transpose of `jax.vjp`; cosines between parts are then those
      of what the parts do to the parameters. Without it they compare weights on tokens, where
      parts on different rows are orthogonal.
    **hyperparameters: of the loss and its advantage estimator.
  Returns:
    An Inspection.
  Raises:
    UserError: no such algorithm or hyperparameter, or an array is missing.
  """
  bound = bounds.bind(loss, batch, hyperparameters)
  value, gradients = jax.value_and_grad(bound)(bound.outputs)
  gradients = {name: np.asarray(x) for name, x in gradients.items()}
  masks = bound.masks()
  loss_mask = _stack(masks, masks) != 0
  weights = -_stack(gradients, masks)
  split, parts = _split(bound, weights, loss_mask)
  sides = tuple(name for name, mask in masks.items() for _ in mask)
  inspection = Inspection(
      name=bound.row.name, split=split, loss=float(value), sides=sides, bound=bound,
      log_probs=_stack(bound.outputs, masks), loss_mask=loss_mask, weights=weights, parts=parts,
      gradients=gradients, summary={},
      others={name: NO_POLICY_GRADIENT.get(name, 'an output that no one has declared')
              for name, gradient in gradients.items() if name not in masks and gradient.any()},
      tokens=None if tokens is None or not masks else [row for n in masks for row in tokens[n]])
  return dataclasses.replace(inspection, summary=_summary(inspection, pull_back))


def _stack(arrays, masks):
  """The token outputs among `arrays` as one [R, T] array, 0 off the mask."""
  if not masks:
    return np.zeros((0, 0))
  width = max(mask.shape[1] for mask in masks.values())
  return np.concatenate([
      np.pad(np.where(mask, np.asarray(arrays[name]), 0), ((0, 0), (0, width - mask.shape[1])))
      for name, mask in masks.items()])


def _split(bound, weights, loss_mask):
  """How the weights fall into parts: (one of the constants, {name: Part})."""
  if 'log_probs' not in bound.outputs:
    counts = [np.full(len(mask), len(mask)) for mask in bound.masks().values()]
    if not counts:
      return NONE, {}
    return PER_RESPONSE, {'policy': _per_response(weights, loss_mask, np.concatenate(counts))}
  one = np.ones_like(weights)
  parts = {name: Part(**{key: np.asarray(pieces.get(key, one)) for key in (
      'stable', 'ratio', 'advantages', 'reduction')})
           for name, pieces in likelihood.pieces_of(bound, bound.outputs).items()}
  parts = {name: part for name, part in parts.items() if part.tokens.any()}
  split = COMPOSED
  if not parts and not weights.any():
    return NONE, {}
  if not parts:
    split, part = _inferred(bound, weights, loss_mask)
    parts = {'policy': part}
  rest = weights - sum(part.weights for part in parts.values())
  if np.abs(rest).max() > 100 * np.finfo(weights.dtype).eps * np.abs(weights).max():
    parts['rest'] = Part(stable=one, ratio=one, advantages=rest, reduction=loss_mask.astype(float))
  return split, parts


def _per_response(weights, loss_mask, counts):
  """Weights as one advantage per row, ratio 1, and a mask of how much of it each token gets."""
  strongest = np.take_along_axis(
      weights, np.argmax(np.abs(weights), axis=1)[:, None], axis=1)  # [R, 1]
  gate = np.divide(weights, strongest, out=np.zeros_like(weights), where=strongest != 0)
  spread = lambda x: np.where(loss_mask, x, 0.0)
  return Part(stable=gate, ratio=np.ones_like(weights),
              advantages=spread(strongest * counts[:, None]),
              reduction=spread(1.0 / counts[:, None]))


def _inferred(bound, weights, loss_mask):
  """Tries each reduction on a loss that is no composition.

  The ratio is that to `old_log_probs` where the loss takes them, the advantages are those it takes.
  With the right reduction most weights are ratio · advantage · reduction exactly, and what differs
  is the mask.
  """
  arguments = bound.arguments
  log_probs = masking.clean(loss_mask, log_probs=arguments['log_probs'])
  ratio = advantages = jnp.ones_like(log_probs)
  if 'old_log_probs' in arguments:
    ratio = denominator.old(log_probs, masking.clean(
        loss_mask, old_log_probs=arguments['old_log_probs']))
  if 'advantages' in arguments:
    advantages = advantage.per_token(arguments['advantages'], loss_mask, log_probs.dtype)
  ratio, advantages = np.asarray(ratio), np.asarray(advantages)
  best, explained = None, 0.5
  for reduce in REDUCTIONS.values():
    factor = np.asarray(jax.grad(reduce)(jnp.zeros_like(log_probs), loss_mask))
    push = ratio * advantages * factor
    gate = np.divide(weights, push, out=np.zeros_like(weights), where=push != 0)
    right = np.isclose(gate, 1.0, rtol=1e3 * np.finfo(weights.dtype).eps)[weights != 0].mean()
    if right > explained:
      best, explained = Part(gate, ratio, advantages, factor), right
  if best is not None:
    return INFERRED, best
  one = np.ones_like(weights)
  return UNEXPLAINED, Part(one, one, weights * loss_mask.sum(), loss_mask / loss_mask.sum())


def _summary(found, pull_back):
  """The numbers of an inspection, by name."""
  numbers = {'loss': found.loss}
  if found.parts:
    on = found.weights[found.loss_mask]
    numbers.update({
        'tokens': on.size, 'weights/abs_mean': np.abs(on).mean(),
        'weights/encouraged_fraction': (on > 0).mean(),
        'weights/zero_fraction': (on == 0).mean(),
        'weights/effective_sample_size': effective_sample_size(on)})
  total = sum(np.abs(part.weights).sum() for part in found.parts.values())
  for name, part in found.parts.items():
    on = part.tokens
    values = {'tokens': on.sum(), 'share': np.abs(part.weights).sum() / (total or 1.0),
              'masked_fraction': (part.stable[on] == 0).mean(),
              'stable_mean': part.stable[on].mean(),
              'advantage_abs_mean': np.abs(part.advantages[on]).mean()}
    if (part.ratio[on] != 1).any():
      values.update({'ratio_min': part.ratio[on].min(), 'ratio_mean': part.ratio[on].mean(),
                     'ratio_max': part.ratio[on].max(),
                     'ratio_effective_sample_size': effective_sample_size(part.ratio[on])})
    numbers.update({f'{name}/{key}': value for key, value in values.items()})
  numbers.update({f'gradient_norm/{name}': np.linalg.norm(found.gradients[name])
                  for name in found.others})
  numbers.update(_cosines(found, pull_back))
  return {name: float(x) for name, x in numbers.items()}


def effective_sample_size(weights):
  """(Σ|w|)² / (n Σw²), a fraction: 1 when all n weigh the same, 1 / n when one has it all."""
  squares = np.square(weights).sum()
  return np.square(np.abs(weights).sum()) / (weights.size * squares) if squares else 0.0


def cosine(first, second):
  """Cosine of the angle between two arrays of one shape; 0 if either is 0."""
  size = np.linalg.norm(first) * np.linalg.norm(second)
  return float(np.vdot(first, second) / size) if size else 0.0


def _cosines(found, pull_back):
  """cosine/<a>,<b> between the terms of a loss: parts and others, or the sides of a pair."""
  terms = {name: {name: gradient} for name, gradient in found.gradients.items() if gradient.any()}
  if 'log_probs' in found.gradients:
    terms.pop('log_probs', None)
    terms = {**{name: {'log_probs': -part.weights} for name, part in found.parts.items()}, **terms}
  if pull_back is not None:
    vectors = {name: pull_back(gradients) for name, gradients in terms.items()}
  else:
    vectors = {name: gradients['log_probs'] for name, gradients in terms.items()
               if 'log_probs' in gradients}
  return {f'cosine/{a},{b}': cosine(vectors[a], vectors[b])
          for a, b in itertools.combinations(vectors, 2)}
