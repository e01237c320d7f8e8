"""How a loss's weights move with the policy: against the ratio, the probability or the margin."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Curve:
  """A loss's weights as one number of the policy is moved for the whole batch at once.

  Attributes:
    label: what `x` is.
    x: [N] float.
    lines: name of a kind of token or response -> [N], its mean weight at each x.
    dots: the same names -> (x, y) of the batch as it is, [K] each; absent where it has none.
    unit: what the weights are measured in.
  """
  label: str
  x: np.ndarray
  lines: dict
  dots: dict
  unit: str


def curve(inspection, points=201, reach=None):
  """Moves the policy and takes the weights again; all else, advantages included, stays.

  A loss with `old_log_probs` is followed over the ratio, the same for all tokens; another loss of
  `log_probs` over the probability of the token. Weights are in units of the mean size of those at
  ratio 1, or at the batch's own probabilities. A loss of pairs is followed over their margin, and
  one of labels over the response's score: weights per response, before the mean over the batch.
  Margin and score are summed log-probs less the reference's, where the batch has those. To move a
  margin, the log-probs of one of the two responses are lowered, the same on each token.

  Args:
    inspection: weights.Inspection.
    points: how many values of x.
    reach: the largest ratio, or the largest margin or score either way; None chooses.
  Returns:
    Curve, or None where no token has a weight.
  """
  bound = inspection.bound
  if 'pair' in bound.arguments:
    return _over_margin(bound, points, reach)
  if 'side' in bound.arguments:
    return _over_score(bound, points, reach)
  if 'log_probs' not in bound.outputs or not inspection.weights.any():
    return None
  return _over_ratio(inspection, points, reach)


def _sweep(bound, moved, points):
  """The gradients by all outputs, with the outputs `moved(x)` in place, at each of the points."""
  gradient = jax.grad(lambda outputs: bound(outputs))
  found = jax.jit(lambda xs: jax.lax.map(
      lambda x: gradient({**bound.outputs, **moved(x)}), xs))(jnp.asarray(points))
  return {name: -np.asarray(x) for name, x in found.items()}


def _over_ratio(inspection, points, reach):
  bound = inspection.bound
  dtype = inspection.log_probs.dtype
  old = bound.arguments.get('old_log_probs')
  if old is not None:
    x = np.linspace(0.02, reach or 4.0, points).astype(dtype)
    label = 'ratio π / π_old'
    moved = lambda ratio: {'log_probs': old + jnp.log(ratio)}
    unit = 'weight / mean size at ratio 1'
    start = -np.asarray(jax.grad(bound)({**bound.outputs, **moved(jnp.ones((), dtype))})[
        'log_probs'])
  else:
    x = np.linspace(0.01, 1.0, points).astype(dtype)
    label = 'probability π of the token'
    moved = lambda probability: {'log_probs': jnp.full_like(
        bound.outputs['log_probs'], jnp.log(probability))}
    unit = 'weight / mean size in the batch'
    start = inspection.weights
  here = inspection.loss_mask
  if 'demonstration' in bound.arguments:  # whose tokens the old policy did not draw
    here = here & ~np.asarray(bound.arguments['demonstration'])[:, None]
  swept = _sweep(bound, moved, x)['log_probs']
  lines, dots = {}, {}
  for name, kind in (('encouraged', here & (start > 0)), ('discouraged', here & (start < 0))):
    if not kind.any():
      continue
    size = np.abs(start[kind]).mean()
    lines[name] = swept[:, kind].mean(1) / size
    at = inspection.log_probs
    at = np.exp(at - np.where(here, np.asarray(old), 0.0)) if old is not None else np.exp(at)
    # A token's own weight at ratio 1 is its unit: what is left is how far the ratio changed it.
    own = np.abs(start[kind]) if old is not None else size
    dots[name] = at[kind], inspection.weights[kind] / own
  return Curve(label, x, lines, dots, unit)


def _scores(side):
  """[B] nats: the summed log-probs less the reference's, and the tokens of each response."""
  log_probs = np.asarray(side.log_probs)
  if side.reference_log_probs is not None:
    log_probs = log_probs - np.asarray(side.reference_log_probs)
  mask = np.asarray(side.loss_mask)
  return np.where(mask, log_probs, 0.0).sum(1), np.maximum(mask.sum(1), 1)


def _shifted(side, change, lengths):
  """Log-probs of a side with `change` [B] nats spread over each response's tokens."""
  return side.log_probs + (change / lengths)[:, None]


def _over_margin(bound, points, reach):
  chosen, rejected = (getattr(bound.arguments['pair'], name) for name in ('chosen', 'rejected'))
  (score, lengths), (other, other_lengths) = _scores(chosen), _scores(rejected)
  margins = score - other
  reach = reach or max(10.0, 1.2 * np.abs(margins).max())
  x = np.linspace(-reach, reach, points).astype(margins.dtype)
  swept = _sweep(bound, lambda margin: {
      'chosen': _shifted(chosen, jnp.minimum(margin - margins, 0.0), lengths),
      'rejected': _shifted(rejected, jnp.minimum(margins - margin, 0.0), other_lengths)}, x)
  now = jax.grad(bound)(bound.outputs)
  lines, dots = {}, {}
  for name, side in (('chosen', chosen), ('rejected', rejected)):
    lines[name] = _per_response(swept[name], side).mean(1)
    dots[name] = margins, _per_response(-np.asarray(now[name])[None], side)[0]
  return Curve('margin of the pair, nats', x, lines, dots, 'weight per response')


def _over_score(bound, points, reach):
  side, labels = bound.arguments['side'], np.asarray(bound.arguments['labels'])
  scores, lengths = _scores(side)
  reach = reach or max(10.0, 1.2 * np.abs(scores).max())
  x = np.linspace(-reach, reach, points).astype(scores.dtype)
  swept = _per_response(_sweep(bound, lambda score: {
      'responses': _shifted(side, score - scores, lengths)}, x)['responses'], side)
  now = _per_response(-np.asarray(jax.grad(bound)(bound.outputs)['responses'])[None], side)[0]
  kinds = {'desirable': labels, 'undesirable': ~labels}
  return Curve('score of the response, nats', x,
               {name: swept[:, kind].mean(1) for name, kind in kinds.items() if kind.any()},
               {name: (scores[kind], now[kind]) for name, kind in kinds.items() if kind.any()},
               'weight per response')


def _per_response(weights, side):
  """[N, B, T] weights on tokens -> [N, B], the mean over a response's tokens, times B."""
  mask = np.asarray(side.loss_mask)
  total = np.where(mask, weights, 0.0).sum(-1) / np.maximum(mask.sum(1), 1)
  return total * mask.shape[0]
