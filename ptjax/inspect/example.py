"""A small built-in batch on which every row of the algorithm table can be inspected.

Four prompts, five rollouts and a demonstration of each, up to eight tokens of a vocabulary of
twelve: 24 completions in all, of ragged lengths. A linear policy reads the token before, the
position and the prompt. Its older self drew the rollouts, a teacher wrote the demonstrations, and
pairs are taken from the same 24 completions. So what any algorithm does to the batch ends in the
same few parameters, where two algorithms, or two parts of one, can be compared: see `pull_back`.
"""

import functools
import inspect

import jax
from jax import flatten_util
import jax.numpy as jnp
import numpy as np

from ptjax import types

VOCABULARY = '0123456789+='
P, G, T, V = 4, 6, 8, len(VOCABULARY)
B = P * G
F = V + T + P  # features: one-hot token before, position, prompt

LENGTHS = np.array([3, 8, 5, 4, 6, 5, 7, 2, 8, 5, 4, 6, 8, 3, 6, 1, 5, 7, 4, 6, 2, 8, 5, 4])
DEMONSTRATION = np.arange(B) % G == G - 1
# Correct answers of 1 and a little for form: no success on the first prompt, one in five on the
# second, three on the third, and a fourth prompt whose rewards are all equal.
REWARDS = np.array([0., .1, 0., .2, 0., 1., 1., 0., .1, 0., .2, 1.1,
                    .1, 1., .9, 0., .7, 1.2, 1., 1., 1., 1., 1., 1.])
CHOSEN = np.array([5, 3, 6, 10, 17, 13, 18, 20])  # rows of the chosen side of eight pairs
REJECTED = np.array([0, 2, 7, 9, 15, 12, 19, 21])


def batch(loss=None):
  """Returns the arrays of the batch by argument name, float64.

  Args:
    loss: the loss they are for, or None. A reward model's `rewards` are what its head says, and
      every other loss's are what the completions earned.
  """
  arrays = dict(_arrays())
  names = list(inspect.signature(loss).parameters) if loss is not None else []
  if names[:1] == ['rewards']:
    shape = (P, G) if 'ranks' in names else (B,)
    arrays['rewards'] = arrays['head_rewards'].reshape(shape)
  if names[:1] == ['preference_logits']:
    arrays['labels'] = arrays['first_is_better']
  return arrays


def tokens():
  """The text of the tokens: {output of the model: lists of strings, one list per row}."""
  rows = [[VOCABULARY[i] for i in row[:n]] for row, n in zip(_tokens(), LENGTHS)]
  pick = lambda indices: [rows[i] for i in indices]
  return {'log_probs': rows, 'responses': rows, 'chosen': pick(CHOSEN), 'rejected': pick(REJECTED),
          'demonstration_log_probs': pick(_gold()), 'corrupted_log_probs': pick(CHOSEN)}


def pull_back(gradients):
  """Gradients by outputs of the model -> one gradient by all its parameters.

  Args:
    gradients: {name of an output: array}, as `Inspection.gradients`.
  Returns:
    [N] float64: policy, critic and reward head, one after the other.
  """
  shapes, transpose = _transpose()
  cotangents = {name: np.zeros(shape) for name, shape in shapes.items()}
  for name, gradient in gradients.items():
    name = 'head_rewards' if name == 'rewards' else name
    cotangents[name] = np.asarray(gradient, float).reshape(shapes[name])
  with jax.enable_x64(True):
    return np.asarray(transpose(cotangents))


@functools.lru_cache(None)
def _transpose():
  """The outputs' shapes, and the function from their cotangents to all parameters', flat."""
  with jax.enable_x64(True):
    now, transpose = jax.vjp(outputs, parameters())
  return ({name: x.shape for name, x in now.items()},
          jax.jit(lambda cotangents: flatten_util.ravel_pytree(transpose(cotangents)[0])[0]))


@functools.lru_cache(None)
def _arrays():
  rng = np.random.default_rng(1)
  with jax.enable_x64(True):
    now, reference, teacher = (
        outputs(parameters(noise)) for noise in (0.0, 0.5, 1.0))
    old = outputs(parameters(0.4))
    arrays = {name: np.asarray(x) for name, x in now.items()}
    reference, teacher, old = (
        {name: np.asarray(x) for name, x in other.items()} for other in (reference, teacher, old))
  mask = np.arange(T) < LENGTHS[:, None]
  after = np.roll(np.arange(B), -G)  # a completion that answers another prompt
  def side(name, rows):
    return types.SideLogProbs(log_probs=arrays[name], loss_mask=mask[rows],
                              reference_log_probs=reference[name])
  ranks = -np.sort(-REWARDS.reshape(P, G), axis=1)
  return {
      **arrays,
      'loss_mask': mask, 'old_log_probs': old['log_probs'],
      'rollout_log_probs': old['log_probs'] + rng.normal(0.0, 0.1, (B, T)),
      'reference_log_probs': reference['log_probs'],
      'teacher_log_probs': teacher['log_probs'], 'teacher_logits': teacher['logits'],
      'old_values': old['values'], 'truncated': LENGTHS == T,
      'rewards': REWARDS, 'group_size': G, 'demonstration': DEMONSTRATION,
      'reward_components': np.stack([(REWARDS >= 0.5).astype(float), rng.normal(size=B)], 1),
      'greedy_rewards': np.repeat([0.0, 0.1, 1.0, 1.0], G),
      'optimal_values': np.repeat([0.3, 0.5, 0.8, 1.0], G),
      'pair': types.PairLogProbs(
          chosen=side('chosen', CHOSEN), rejected=side('rejected', REJECTED)),
      'side': side('responses', np.arange(B)), 'labels': REWARDS >= 0.5,
      'chosen_scores': REWARDS[CHOSEN], 'rejected_scores': REWARDS[REJECTED],
      'chosen_win_probabilities': rng.uniform(0.4, 1.0, CHOSEN.size),
      'rejected_win_probabilities': rng.uniform(0.0, 0.6, CHOSEN.size),
      'chosen_sum_squares': arrays['sum_squares'][CHOSEN],
      'rejected_sum_squares': arrays['sum_squares'][REJECTED],
      'reference_drew_chosen': np.arange(CHOSEN.size) % 3 == 0,
      'demonstration_loss_mask': mask[_gold()],
      'corrupted_reference_log_probs': reference['corrupted_log_probs'],
      'mismatched_log_probs': arrays['mismatched_log_probs'],
      'mismatched_reference_log_probs': reference['mismatched_log_probs'],
      'mismatched_loss_mask': mask[after],
      'margins': rng.uniform(0.0, 1.0, CHOSEN.size),
      'ranks': np.array([np.searchsorted(-row, -REWARDS.reshape(P, G)[p])
                         for p, row in enumerate(ranks)]),
      'first_is_better': REWARDS > REWARDS[np.arange(B) ^ 1],
      'step_labels': np.repeat((REWARDS >= 0.5)[:, None], T, 1) | (np.arange(T) < 2),
      'step_mask': mask & (np.arange(T) % 2 == 1),
      # Rewards of steps that end with every second token and with the completion; NaN elsewhere.
      'step_rewards': np.where(mask & ((np.arange(T) % 2 == 1)
                                       | (np.arange(T) == LENGTHS[:, None] - 1)),
                               (0.3 * REWARDS[:, None] + np.arange(T) * 0.7) % 1.0, np.nan),
      'outcome_rewards': REWARDS}


def _gold():
  """The demonstration of each pair's prompt."""
  return CHOSEN // G * G + G - 1


def parameters(noise=0.0):
  """The model's parameters, or another model's that is as far away as `noise` says."""
  rng = np.random.default_rng(0)
  params = {name: rng.normal(0.0, 1.0, (F, *shape)) for name, shape in (
      ('policy', (V,)), ('critic', ()), ('head', ()), ('steps', (2,)))}
  if noise:
    rng = np.random.default_rng(round(100 * noise))
    params = {name: x + rng.normal(0.0, noise, x.shape) for name, x in params.items()}
  return jax.tree.map(jnp.asarray, params)


@functools.lru_cache(None)
def _tokens():
  """What the older policy, and for demonstrations the teacher, wrote. [B, T] int."""
  rng = np.random.default_rng(2)
  with jax.enable_x64(True):
    old, teacher = (np.asarray(parameters(noise)['policy']) for noise in (0.4, 1.0))
  written = np.zeros((B, T), int)
  for t in range(T):
    features = _features(written)[:, t]
    logits = np.where(DEMONSTRATION[:, None], features @ teacher, features @ old)
    written[:, t] = np.argmax(logits + rng.gumbel(size=(B, V)), axis=1)
  return written


def _features(written, prompt=None):
  """[B, T, F]; `prompt` [B] is the prompt each completion follows, its own by default."""
  before = np.concatenate([np.full((len(written), 1), V - 1), written[:, :-1]], axis=1)
  prompt = np.arange(B) // G if prompt is None else prompt
  return np.concatenate([
      np.eye(V)[before], np.broadcast_to(np.eye(T), (*written.shape, T)),
      np.repeat(np.eye(P)[prompt][:, None], T, axis=1)], axis=-1)


def outputs(params):
  """Everything the model says about the batch: what a gradient can flow through."""
  written = _tokens()
  features = _features(written)
  def scored(features, written):
    log_p = jax.nn.log_softmax(features @ params['policy'])  # [..., T, V]
    return jnp.take_along_axis(log_p, written[..., None], axis=-1)[..., 0], log_p
  log_probs, log_p = scored(features, written)
  without_prompt = features[CHOSEN] * (np.arange(F) < V + T)
  after = np.roll(np.arange(B), -G)
  mismatched = _features(written[after], np.arange(B) // G)
  rewards = (features * (np.arange(T) < LENGTHS[:, None])[..., None]).sum(1) @ params['head']
  return {
      'log_probs': log_probs, 'responses': log_probs, 'logits': features @ params['policy'],
      'entropy': -(jnp.exp(log_p) * log_p).sum(-1),
      'chosen': log_probs[CHOSEN], 'rejected': log_probs[REJECTED],
      'demonstration_log_probs': log_probs[_gold()],
      'corrupted_log_probs': scored(without_prompt, written[CHOSEN])[0],
      'mismatched_log_probs': scored(mismatched, written[after])[0],
      'sum_squares': jnp.log(jnp.exp(2.0 * log_p).sum(-1)),
      'values': features @ params['critic'], 'head_rewards': rewards,
      'chosen_rewards': rewards[CHOSEN], 'rejected_rewards': rewards[REJECTED],
      'preference_logits': rewards - rewards[np.arange(B) ^ 1],
      'step_logits': features @ params['steps']}
