"""The table of losses under test beside preferences: hyperparameters, inputs, golden values."""

import dataclasses
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np

from ptjax.losses import distillation
from ptjax.losses import hybrid
from ptjax.losses import imitation
from ptjax.losses import policy_gradient as pg
from ptjax.losses import policy_gradient_sequence as seq
from ptjax.pieces import divergence

B, T, V, G = 8, 6, 7, 4
ATTACHED = ('log_probs', 'values', 'entropy', 'logits')  # what a model's gradient comes through
BATCH_FREE = ('key',)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """One loss with hyperparameters."""
  name: str  # of the reference
  loss: typing.Callable
  hyper: dict
  whole_vocabulary: bool = False  # part of its gradient is no weight on the sampled token
  advantages: str = 'advantages'  # which of the arrays below it gets
  without: tuple = ()  # optional arrays left out
  divergence: typing.Callable | None = None  # what a head makes of logits for the loss

  @property
  def id(self):
    return '-'.join([self.name, *(str(v) for v in self.hyper.values() if v == 0)])

  @property
  def arrays(self):
    """Names of the arrays the loss takes, `log_probs` first."""
    parameters = inspect.signature(self.of_model).parameters
    return [n for n in parameters if n in NAMES and n not in self.without]

  @property
  def of_model(self):
    """The loss as a function of what a model says, logits in place of a divergence."""
    return self.loss if self.divergence is None else from_logits(self.loss, self.divergence)


def from_logits(loss, divergence):
  """`loss` with `logits` and `teacher_logits` [B, T, V] in place of its `divergence` [B, T]."""
  own, head = (inspect.signature(f).parameters for f in (loss, divergence))
  def of_logits(log_probs, *, logits, teacher_logits, loss_mask, **arguments):
    clean = lambda x: jnp.where(loss_mask[..., None], x, 0.0)
    measured = divergence(clean(logits), clean(teacher_logits), **{
        n: x for n, x in arguments.items() if n in head})
    measured = jnp.where(loss_mask, measured, logits[..., 0])  # padding holds anything
    return loss(log_probs, divergence=measured, loss_mask=loss_mask, **{
        n: x for n, x in arguments.items() if n in own})
  of_logits.__signature__ = inspect.Signature([
      p.replace(kind=p.POSITIONAL_OR_KEYWORD if name == 'log_probs' else p.KEYWORD_ONLY)
      for name, p in {**own, **head}.items() if name != 'divergence'])
  return of_logits


clip = dict(clip_low=0.2, clip_high=0.3)
kl = dict(clip, kl_coefficient=0.3)
critic = dict(clip, value_clip=0.2, value_coefficient=0.3, entropy_coefficient=0.1)
rows = dict(shaping=0.2, max_completion_tokens=9)

CASES = [
    Case('sft', imitation.sft_loss, {}),
    Case('dft', imitation.dft_loss, {}),
    Case('rft', imitation.rft_loss, {'reward_threshold': 0.5}),
    Case('reinforce', pg.reinforce_loss, {}),
    Case('grpo', pg.grpo_loss, kl),
    Case('grpo', pg.grpo_loss, dict(kl, kl_coefficient=0), without=('reference_log_probs',)),
    Case('bnpo', pg.bnpo_loss, kl),
    Case('dapo', pg.dapo_loss, clip),
    Case('dr_grpo', pg.dr_grpo_loss, dict(kl, max_completion_tokens=9)),
    Case('sgrpo', pg.sgrpo_loss, dict(kl, entropy_coefficient=0.2), True),
    Case('ppo', pg.ppo_loss, critic, True, 'token_advantages'),
    Case('ppo_dual_clip', pg.ppo_dual_clip_loss, dict(critic, max_ratio=1.2), True,
         'token_advantages'),
    Case('reinforce_pp_baseline', pg.reinforce_pp_baseline_loss, kl, False, 'token_advantages'),
    Case('cispo', pg.cispo_loss, {'max_ratio': 1.2}),
    Case('cispo_oxrl', pg.cispo_oxrl_loss, clip),
    Case('sapo', pg.sapo_loss, {'temperature_positive': 1.0, 'temperature_negative': 1.3}),
    Case('clip_cov', pg.clip_cov_loss,
         dict(clip, covariance_low=0.05, covariance_high=0.6, fraction=1.0)),
    Case('kl_cov', pg.kl_cov_loss, {'penalty_coefficient': 0.5, 'fraction': 0.2}),
    Case('rloo', seq.rloo_loss, clip),
    Case('gspo', seq.gspo_loss, {'clip_low': 0.05, 'clip_high': 0.06}),
    Case('gspo_token', seq.gspo_token_loss, {'clip_low': 0.05, 'clip_high': 0.06}, False,
         'token_advantages'),
    Case('luspo', seq.luspo_loss, {'clip_low': 0.05, 'clip_high': 0.06}),
    Case('vespo', seq.vespo_loss, {'shape_positive': 2.0, 'rate_positive': 3.0,
                                   'shape_negative': 3.0, 'rate_negative': 2.0}),
    Case('gmpo', seq.gmpo_loss, {'log_clip': 0.3}),
    Case('a_star_po', seq.a_star_po_loss, {'beta': 0.2}),
    Case('rebel', seq.rebel_loss, {'eta': 0.7}),
    Case('nash_md', seq.nash_md_loss, {'kl_coefficient': 0.3}),
    Case('kd', distillation.kd_loss, {'nll_coefficient': 0.3, 'temperature': 2.0}, True,
         divergence=divergence.forward_kl),
    *(Case('gkd', distillation.gkd_loss, {'interpolation': b, 'temperature': 0.9}, True,
           divergence=divergence.jensen_shannon) for b in (0.0, 0.3, 1.0)),
    Case('opd', distillation.opd_loss, {}),
    Case('iw_opd', distillation.iw_opd_loss, {'gamma': 0.5}),
    Case('minillm', distillation.minillm_loss, dict(clip, discount=0.8), True,
         divergence=divergence.reverse_kl),
    Case('sdft', distillation.sdft_loss, {'interpolation': 0.3, 'top_k': 3, 'max_ratio': 1.2},
         True, divergence=divergence.top_k_jensen_shannon),
    Case('sdpo', distillation.sdpo_loss, dict(
        clip, distillation_weight=0.6, interpolation=0.5, top_k=2, max_ratio=1.2), True,
         divergence=divergence.top_k_jensen_shannon),
    Case('hpt', hybrid.hpt_loss, dict(rows, sft_coefficient=0.3, entropy_coefficient=0.1), True),
    Case('luffy', hybrid.luffy_loss, dict(rows, entropy_coefficient=0.1), True),
    Case('srft', hybrid.srft_loss, dict(
        rows, sft_coefficient=0.5, positive_coefficient=0.1, success_threshold=0.5)),
]


def random_arrays(seed=0):
  """Two prompts of four; lengths from 0 to T, with one hole; the fourth row is a demonstration."""
  rng = np.random.default_rng(seed)
  lengths = np.array([3, T, 1, 4, 5, 0, 2, T])
  loss_mask = np.arange(T)[None] < lengths[:, None]
  loss_mask[1, 2] = False
  log_probs = -rng.uniform(0.1, 2.0, (B, T))
  near = lambda scale: log_probs + rng.normal(0.0, scale, (B, T))
  rewards = rng.integers(0, 2, B).astype(float)
  demonstration = np.arange(B) % G == G - 1
  rewards[demonstration] = 1.0
  old_values = rng.normal(0.0, 1.0, (B, T))
  teacher_log_probs = near(0.4)
  return {
      'log_probs': log_probs, 'loss_mask': loss_mask, 'old_log_probs': near(0.25),
      'reference_log_probs': near(0.4), 'teacher_log_probs': teacher_log_probs,
      'rewards': rewards, 'advantages': rng.normal(0.0, 1.0, B),
      'token_advantages': rng.normal(0.0, 1.0, (B, T)),
      'old_values': old_values, 'values': old_values + rng.normal(0.0, 0.3, (B, T)),
      'returns': old_values + rng.normal(0.0, 0.5, (B, T)),
      'entropy': rng.uniform(0.0, 2.0, (B, T)),
      'logits': rng.normal(0.0, 1.5, (B, T, V)), 'teacher_logits': rng.normal(0.0, 1.5, (B, T, V)),
      'demonstration': demonstration, 'from_rollouts': ~demonstration & (np.arange(B) < G),
      'imitated': np.arange(B) == G - 1, 'off_policy': np.arange(B) == B - 1}


NAMES = frozenset(random_arrays())


def extreme_arrays(sign):
  """Log-ratios of ±50 to every other model, one token and T tokens long, all rewards equal."""
  arrays = random_arrays(1)
  lengths = np.array([1, T] * (B // 2))
  low, high = np.full((B, T), -51.0), np.full((B, T), -1.0)
  log_probs, other = (high, low) if sign > 0 else (low, high)
  return {**arrays, 'loss_mask': np.arange(T)[None] < lengths[:, None], 'log_probs': log_probs,
          **{n: other for n in ('old_log_probs', 'reference_log_probs', 'teacher_log_probs')},
          'rewards': np.ones(B)}


def on_policy_arrays():
  """The first update: every ratio is exactly 1."""
  arrays = random_arrays(2)
  same = ('old_log_probs', 'reference_log_probs', 'teacher_log_probs')
  return {**arrays, **{n: arrays['log_probs'] for n in same}}


def poisoned(arrays):
  """NaN wherever the mask says padding."""
  mask = arrays['loss_mask']
  def poison(x):
    if x.ndim < 2 or x.dtype == bool:
      return x
    return np.where(mask if x.ndim == 2 else mask[..., None], x, np.nan)
  return {n: poison(x) for n, x in arrays.items()}


def reordered(arrays, order):
  return {n: x[order] for n, x in arrays.items()}


def call(case, inputs):
  """The loss on its inputs, a dict by the argument names of the loss."""
  inputs = dict(inputs)
  extra = {'key': jax.random.key(3)} if 'key' in inspect.signature(case.loss).parameters else {}
  return case.of_model(inputs.pop('log_probs'), **inputs, **extra, **case.hyper)


def inputs_of(case, arrays, dtype=np.float64):
  """The arrays of a case by argument name, floats as `dtype`."""
  chosen = {n: arrays[case.advantages if n == 'advantages' else n] for n in case.arrays}
  return {n: x if x.dtype == bool else x.astype(dtype) for n, x in chosen.items()}


# Section 6.2 of the specification.
PAD = np.nan
GOLDEN_ARRAYS = {
    'log_probs': np.array([[-1.0, -.8, -.6], [-1.2, -.5, PAD]]),
    'old_log_probs': np.array([[-1.1, -.5, -1.1], [-.95, -.9, PAD]]),
    'reference_log_probs': np.array([[-1.05, -.7, -.9], [-1.0, -.8, PAD]]),
    'advantages': np.array([1.0, -1.0]),
    'loss_mask': np.array([[True, True, True], [True, True, False]]),
    'values': np.zeros((2, 3)), 'old_values': np.zeros((2, 3)), 'returns': np.zeros((2, 3)),
    'demonstration': np.array([True, True])}
_wide = dict(clip_low=0.2, clip_high=0.2)
GOLDEN = [
    ('grpo', pg.grpo_loss, {}, 0.065291, (0.184195, 0.123470, 0), (0, -0.372956)),
    ('bnpo', pg.bnpo_loss, {}, -0.150833, (0.221034, 0.148164, 0), (0, -0.298365)),
    ('sgrpo', pg.sgrpo_loss, {}, -0.150833, (0.221034, 0.148164, 0), (0, -0.298365)),
    ('dapo', pg.dapo_loss, {}, -0.166833, (0.221034, 0.148164, 0), (0, -0.298365)),
    ('dr_grpo', pg.dr_grpo_loss, {'max_completion_tokens': 4}, -0.094271,
     (0.138146, 0.092602, 0), (0, -0.186478)),
    ('grpo + .04 k3', pg.grpo_loss, {'kl_coefficient': 0.04}, 0.066228,
     (0.183870, 0.124171, -0.001728), (0.002214, -0.375548)),
    ('ppo_dual_clip', pg.ppo_dual_clip_loss, {'clip_high': 0.28}, -0.166833,
     (0.221034, 0.148164, 0), (0, -0.298365)),
    ('gspo .2', seq.gspo_loss, _wide, -0.013643, (0.184195,) * 3, (-0.269471,) * 2),
    ('gspo', seq.gspo_loss, {}, 0.038742, (0,) * 3, (-0.269471,) * 2),
    ('luspo .2', seq.luspo_loss, _wide, -0.579872, (0.552585,) * 3, (-0.538942,) * 2),
    ('cispo', pg.cispo_loss, {}, 0.201317, (0.221034, 0.148164, 0.329744), (-0.155760, -0.298365)),
    ('cispo_oxrl', pg.cispo_oxrl_loss, {}, -0.038103, (0.221034, 0.16, 0.24), (-0.16, -0.24)),
    ('sapo', pg.sapo_loss, {}, -0.061414, (0.183687, 0.121419, 0.247790), (-0.192098, -0.349156)),
    ('gmpo', seq.gmpo_loss, {}, 0.004473, (0.178157, 0.178157, 0), (-0.269471,) * 2),
    ('vespo', seq.vespo_loss, {}, -0.079593, (0.127580,) * 3, (-0.226932,) * 2),
    ('reinforce', pg.reinforce_loss, {}, 0.14, (0.2,) * 3, (-0.2,) * 2),
    ('rloo', seq.rloo_loss, {}, -0.019083, (0,) * 3, (-0.580917,) * 2),
    ('luffy', hybrid.luffy_loss, {'max_completion_tokens': 3, 'entropy_coefficient': 0.0},
     -0.280298, (0.056017, 0.049634, 0.043458), (-0.062376, -0.040501)),
    ('sft', imitation.sft_loss, {}, 0.82, (0.2,) * 3, (0.2,) * 2),
    ('dft', imitation.dft_loss, {}, 0.344266, (0.073576, 0.089866, 0.109762),
     (0.060239, 0.121306)),
]
