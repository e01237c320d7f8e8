"""The table of preference losses under test, their random and extreme inputs, and golden values."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import preference_reference as reference
import preference_reference_batch  # noqa: F401 (fills the tables of preference_reference)

from ptjax import types
from ptjax.losses import preference_anchor as anchor
from ptjax.losses import preference_gap as gap
from ptjax.losses import preference_link as link
from ptjax.losses import preference_score as score
from ptjax.losses import unpaired
from ptjax.pieces import running

STATE = {'mean': 0.3, 'std': 1.2, 'count': 3.0}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """One loss with hyperparameters."""
  name: str  # of the reference
  loss: typing.Callable
  hyper: dict
  extras: tuple = ()  # names of further arrays the loss takes
  state: tuple = ()  # which parts of STATE the reference takes
  draws: bool = False  # takes a key
  needs_reference: bool = True

  @property
  def id(self):
    variant = [str(v) for v in self.hyper.values() if isinstance(v, str)]
    return '-'.join([self.name, *variant, *(['extras'] if self.extras else [])])


free = functools.partial(Case, needs_reference=False)
smooth = {'beta': 0.3, 'label_smoothing': 0.1}
SCORES = ('chosen_scores', 'rejected_scores')
GOLD = ('demonstration_log_probs', 'demonstration_loss_mask')
WINS = ('chosen_win_probabilities', 'rejected_win_probabilities')
SQUARES = ('chosen_sum_squares', 'rejected_sum_squares')
CORRUPTED = ('corrupted_log_probs', 'corrupted_reference_log_probs')

PAIR = [
    Case('dpo', link.dpo_loss, {'beta': 0.3}),
    Case('cdpo', link.cdpo_loss, smooth),
    Case('robust_dpo', link.robust_dpo_loss, smooth),
    Case('robust_dpo_oxrl', link.robust_dpo_oxrl_loss, smooth),
    Case('hinge', link.hinge_loss, {'beta': 0.3}),
    Case('exo', link.exo_loss, smooth),
    Case('discopop', link.discopop_loss, {'beta': 0.05, 'temperature': 0.05}),
    *(Case('gpo', link.gpo_loss, {'beta': 0.3, 'variant': v}) for v in link.GPO_LINKS),
    Case('focalpo', link.focalpo_loss, {'beta': 0.3, 'exponent': 0.5}),
    Case('focalpo_oxrl', link.focalpo_oxrl_loss, {'beta': 0.3, 'exponent': 1.0}),
    Case('odpo', link.odpo_loss, {'beta': 0.3, 'alpha': 0.7}, SCORES),
    Case('odpo_oxrl', link.odpo_oxrl_loss, {'beta': 0.3, 'margin': 1.0}),
    Case('ipo', score.ipo_loss, {'beta': 0.3}),
    Case('ipo_oxrl', score.ipo_oxrl_loss, {'beta': 0.3}),
    Case('sigmoid_norm', score.sigmoid_norm_loss, {'beta': 5.0}),
    free('simpo', score.simpo_loss, {'beta': 2.0, 'margin': 1.0}),
    free('simpo_oxrl', score.simpo_oxrl_loss, {'beta': 0.1, 'margin': 0.5}),
    free('alphapo', score.alphapo_loss, {'beta': 2.5, 'margin': 0.1, 'alpha': 0.25}),
    free('alphapo_oxrl', score.alphapo_oxrl_loss, {'beta': 0.1, 'margin': 0.5, 'alpha': 1.0}),
    *(free('cpo', score.cpo_loss, {'beta': 0.3, 'nll_coefficient': 0.7, 'label_smoothing': 0.1,
                                   'variant': v}) for v in score.CONTRASTS),
    free('cposimpo', score.cposimpo_loss, {'beta': 2.0, 'margin': 0.5, 'nll_coefficient': 0.7}),
    free('orpo', score.orpo_loss, {'beta': 0.3}),
    free('slic_hf', score.slic_hf_loss, {'margin': 1.5, 'nll_coefficient': 0.7}),
    Case('ld_dpo', score.ld_dpo_loss, {'beta': 0.3, 'alpha': 0.4}),
    Case('rdpo', score.rdpo_loss, {'beta': 0.3, 'alpha': 0.05}),
    Case('rdpo_oxrl', score.rdpo_oxrl_loss, {'beta': 0.3, 'alpha': 0.05}),
    Case('hdpo', score.hdpo_loss, {'beta': 0.3, 'alpha': 0.8}),
    Case('dposhift', score.dposhift_loss, {'beta': 0.3, 'rejected_coefficient': 0.6}),
    *(Case('fdpo', score.fdpo_loss, {'beta': 0.3, 'variant': d})
      for d in ('reverse_kl', 'forward_kl', 'js')),
    Case('fdpo', score.fdpo_loss, {'beta': 0.3, 'variant': 'alpha', 'alpha': 0.6}),
    Case('chipo', score.chipo_loss, {'beta': 0.3}),
    Case('chipo', score.chipo_loss, {'beta': 0.3, 'max_reward': 0.3}),
    free('spo', score.spo_loss, {'beta': 2.5, 'margin': 0.8}),
    Case('dpop', gap.dpop_loss, {'beta': 0.3, 'penalty_coefficient': 5.0}),
    Case('minor_dpo', gap.minor_dpo_loss, {'beta': 0.3}),
    Case('bpo', gap.bpo_loss, {'beta': 0.3, 'alpha': 0.4}),
    Case('aot', gap.aot_loss, smooth),
    Case('aot_unpaired', gap.aot_unpaired_loss, smooth),
    Case('betadpo', gap.betadpo_loss, {'beta': 0.3, 'alpha': 0.6, 'drop_fraction': 0.3},
         state=('mean', 'std'), draws=True),
    Case('betadpo_oxrl', gap.betadpo_oxrl_loss, {'beta': 0.3, 'alpha': 0.5}, state=('mean',)),
    Case('alpha_dpo', gap.alpha_dpo_loss, {'beta': 2.5, 'margin_per_beta': 0.4, 'alpha': 0.1},
         state=('mean', 'std')),
    Case('wpo', gap.wpo_loss, {'beta': 0.3}, SQUARES),
    Case('drdpo', anchor.drdpo_loss, {'beta': 0.3, 'beta_prime': 0.7}),
    Case('sppo', anchor.sppo_loss, {'beta': 0.3}),
    Case('sppo_soft', anchor.sppo_soft_loss, {'beta': 0.3}, WINS),
    Case('nca', anchor.nca_loss, {'beta': 0.3}),
    Case('caldpo', anchor.caldpo_loss, {'beta': 0.3, 'calibration_coefficient': 0.5}),
    Case('apo_zero', anchor.apo_zero_loss, {'beta': 0.3}),
    Case('apo_down', anchor.apo_down_loss, {'beta': 0.3}),
    Case('c2dpo', anchor.c2dpo_loss, {'beta': 0.3, 'constraint_coefficient': 0.01}),
    Case('dpnll', anchor.dpnll_loss, {'beta': 0.3, 'nll_coefficient': 0.7}),
    Case('rpo', anchor.rpo_loss, {'beta': 0.3, 'nll_coefficient': 0.7}),
    Case('mpo', anchor.mpo_loss, {'beta': 0.3, 'preference_coefficient': 0.8,
                                  'quality_coefficient': 0.2, 'nll_coefficient': 0.7},
         state=('mean', 'count')),
    *(free('tpo', anchor.tpo_loss, {'beta': 0.3, 'nll_coefficient': 0.7, 'label_smoothing': 0.1,
                                    'variant': v}, GOLD) for v in score.CONTRASTS),
    free('tpo_l', anchor.tpo_l_loss, {'beta': 2.0, 'margin': 0.5, 'nll_coefficient': 0.7}, GOLD),
    Case('mdpo', anchor.mdpo_loss, {'beta': 0.3, 'margin': 0.2}),
    Case('mdpo', anchor.mdpo_loss, {'beta': 0.3, 'margin': 0.2}, CORRUPTED),
    Case('kto_oxrl', unpaired.kto_oxrl_loss,
         {'beta': 0.3, 'desirable_weight': 1.2, 'undesirable_weight': 0.8}, state=('mean',)),
    Case('bco_pair', unpaired.bco_pair_loss, {'beta': 0.3}),
]


def random_arrays(B, T, seed=0):
  """Ragged pairs in float64: lengths from 1 to T, some responses not starting at 0, and extras."""
  rng = np.random.default_rng(seed)
  arrays = {}
  lengths = {'chosen': [1, T, 3, T - 1], 'rejected': [T - 2, 2, T, T - 1]}
  for name in ('chosen', 'rejected'):
    arrays[name] = -rng.uniform(0.05, 2.0, (B, T))
    arrays[name + '_reference'] = arrays[name] + rng.normal(0.0, 0.5, (B, T))
    start = T - np.maximum(lengths[name], rng.integers(1, T + 1, B))
    position = np.arange(T)[None] - start[:, None]
    arrays[name + '_mask'] = (position >= 0) & (position < np.array(lengths[name])[:, None])
  return {**arrays, **extra_arrays(rng, B, T)}


def extreme_arrays(T):
  """Log-ratios of about ±50 at lengths 1 and T."""
  n = {'chosen': [1, T, 1, T], 'rejected': [T, 1, 1, T]}
  ratio = {'chosen': [50, -50, 49, -49], 'rejected': [-50, 50, 49.5, -48]}  # no ties
  arrays = {}
  for name in ('chosen', 'rejected'):
    lengths, ratios = np.array(n[name])[:, None], np.array(ratio[name])[:, None]
    arrays[name + '_mask'] = np.arange(T)[None] < lengths
    high = np.full((4, T), -0.5) / lengths
    low = high - np.abs(ratios) / lengths
    arrays[name] = np.where(ratios > 0, high, low)
    arrays[name + '_reference'] = np.where(ratios > 0, low, high)
  return {**arrays, **extra_arrays(np.random.default_rng(1), 4, T)}


def extra_arrays(rng, B, T):
  lengths = rng.integers(1, T + 1, (B, 1))
  return {
      'chosen_scores': rng.uniform(1.0, 3.0, B),
      'rejected_scores': np.array([0.5, 0.2, 4.0, 0.9]),  # one pair contradicts its order
      **{name: rng.uniform(0.0, 1.0, B) for name in WINS},
      **{name: -rng.uniform(0.0, 4.0, (B, T)) for name in SQUARES},
      **{name: -rng.uniform(0.1, 3.0, (B, T)) for name in CORRUPTED},
      'demonstration_log_probs': -rng.uniform(0.1, 3.0, (B, T)),
      'demonstration_loss_mask': np.arange(T)[None] < lengths}


PAIR_ARRAYS = tuple(side + part for side in ('chosen', 'rejected')
                    for part in ('', '_reference', '_mask'))


def to_jax(arrays, case, dtype):
  """The arrays of the pair and those the case asks for, floats as `dtype`."""
  names = PAIR_ARRAYS + (case.extras if case else ())
  return {name: jnp.asarray(arrays[name], bool if arrays[name].dtype == bool else dtype)
          for name in names}


def poison(arrays):
  """NaN wherever a mask says padding."""
  def mask_of(name):
    for prefix in ('chosen', 'corrupted', 'rejected', 'demonstration'):
      if name.startswith(prefix):
        prefix = 'chosen' if prefix == 'corrupted' else prefix
        return arrays['demonstration_loss_mask' if prefix == 'demonstration' else prefix + '_mask']
  return {name: jnp.where(mask_of(name), x, jnp.nan) if x.ndim == 2 and x.dtype != bool else x
          for name, x in arrays.items()}


def pair_of(arrays):
  return types.PairLogProbs(**{side: types.SideLogProbs(
      log_probs=arrays[side], loss_mask=arrays[side + '_mask'],
      reference_log_probs=arrays.get(side + '_reference')) for side in ('chosen', 'rejected')})


def sides(arrays):
  return [reference.side(arrays[s], arrays[s + '_mask'], arrays[s + '_reference'])
          for s in ('chosen', 'rejected')]


def gradients(loss, pair, **hyper):
  """(value, d/d chosen, d/d rejected) at a pair."""
  def objective(chosen, rejected):
    return loss(pair.replace(chosen=pair.chosen.replace(log_probs=chosen),
                             rejected=pair.rejected.replace(log_probs=rejected)), **hyper)[0]
  value, grads = jax.value_and_grad(objective, (0, 1))(
      pair.chosen.log_probs, pair.rejected.log_probs)
  return value, *grads


def row(pair, i, copies=1):
  return jax.tree.map(lambda x: jnp.repeat(x[i:i + 1], copies, axis=0), pair)


KEY_SEED = 5


def call(case, arrays):
  """The loss on arrays of `to_jax`; a loss with state starts from STATE."""
  extras = {name: arrays[name] for name in case.extras}
  if case.state:
    dtype = arrays['chosen'].dtype
    extras['loss_state'] = running.Moments(**{k: jnp.asarray(v, dtype) for k, v in STATE.items()})
  if case.draws:
    extras['key'] = jax.random.key(KEY_SEED)
  return case.loss(pair_of(arrays), **extras, **case.hyper)


def reference_extras(case, arrays, dtype=np.float64):
  """What the reference takes besides the sides; the noise is drawn in the loss's own dtype."""
  extras = {name: arrays[name] for name in case.extras}
  extras.update({name: STATE[name] for name in case.state})
  if case.draws:
    with jax.enable_x64(True):
      extras['noise'] = np.asarray(jax.random.gumbel(jax.random.key(KEY_SEED), (4,), dtype))
  return extras


# Two pairs of the specification's section 6.1, as (S, S0, n) of each side.
GOLDEN_CHOSEN = np.array([[-10.0, -12.0, 5], [-9.0, -8.0, 6]])
GOLDEN_REJECTED = np.array([[-14.0, -13.0, 8], [-6.0, -7.5, 4]])


def golden_pairs(loss, whole_batch):
  """(value, A_w, A_l) of each pair by itself, or of the batch; call in float64."""
  T = 8
  def side(rows):
    S, S0, n = (jnp.asarray(rows[:, i:i + 1]) for i in range(3))
    spread = lambda total: jnp.broadcast_to(total / n, (2, T))
    return types.SideLogProbs(log_probs=spread(S), loss_mask=jnp.arange(T, dtype=n.dtype)[None] < n,
                              reference_log_probs=spread(S0))
  pair = types.PairLogProbs(chosen=side(GOLDEN_CHOSEN), rejected=side(GOLDEN_REJECTED))
  def one(pair):
    def objective(chosen, rejected):
      return loss(pair.replace(chosen=pair.chosen.replace(log_probs=chosen),
                               rejected=pair.rejected.replace(log_probs=rejected)))[0]
    value, grads = jax.value_and_grad(objective, (0, 1))(
        pair.chosen.log_probs, pair.rejected.log_probs)
    return value, *(-g[:, 0] for g in grads)  # every response has its first token
  if whole_batch:
    return jax.jit(one)(pair)
  value, chosen, rejected = jax.jit(jax.vmap(one))(jax.tree.map(lambda x: x[:, None], pair))
  return value, chosen[:, 0], rejected[:, 0]


def _with_state(loss, mean, std=0.0, **hyper):
  return functools.partial(loss, loss_state=running.Moments(
      np.float64(mean), np.float64(std), np.float64(1.0)), **hyper)


def _orpo_odds(pair):
  weighted, bare = (score.orpo_loss(pair, beta=b)[0] for b in (1.0, 0.0))
  return weighted - bare, {}


def _kto(pair):
  """The two responses of each pair as one batch; z0 = 0.5. The sum of both losses."""
  join = lambda name: jnp.concatenate([getattr(s, name) for s in (pair.chosen, pair.rejected)])
  batch = types.SideLogProbs(*(join(n) for n in ('log_probs', 'loss_mask', 'reference_log_probs')))
  count = batch.log_probs.shape[0]
  one = jnp.ones((count, 1))
  return 2.0 * unpaired.kto_loss(
      batch, labels=np.arange(count) < count // 2, mismatched_log_probs=-one,
      mismatched_reference_log_probs=-1.5 * one, mismatched_loss_mask=one > 0)[0], {}


_p = functools.partial
# Settings not named are the defaults; betadpo and alpha_dpo get the state that leads to the
# specification's statistics after the update.
GOLDEN = [
    ('dpo', link.dpo_loss, (.554355, .825939), (.042556, .056218), (-.042556, -.056218)),
    ('hinge', link.hinge_loss, (.7, 1.25), (.1, .1), (-.1, -.1)),
    ('cdpo', link.cdpo_loss, (.584355, .800939), (.032556, .046218), (-.032556, -.046218)),
    ('robust_dpo', link.robust_dpo_loss, (.516855, .857189), (.055056, .068718),
     (-.055056, -.068718)),
    ('robust_dpo_oxrl', link.robust_dpo_oxrl_loss, (.730444, 1.001174), (.040695, .057772),
     (-.040695, -.057772)),
    ('exo', link.exo_loss, (2.258199, 3.198420), (.161508, .176152), (-.161508, -.176152)),
    ('discopop', link.discopop_loss, (.740357, .829005), (.073084, .050610), (-.073084, -.050610)),
    ('gpo', link.gpo_loss, (.740818, 1.284025), (.074082, .128403), (-.074082, -.128403)),
    ('gpo truncated_quadratic', _p(link.gpo_loss, variant='truncated_quadratic'),
     (.49, 1.5625), (.14, .25), (-.14, -.25)),
    ('gpo squared', _p(link.gpo_loss, variant='squared'), (.49, 1.5625), (.14, .25), (-.14, -.25)),
    ('gpo savage', _p(link.gpo_loss, variant='savage'), (.181099, .316042), (.020806, .027674),
     (-.020806, -.027674)),
    ('focalpo', link.focalpo_loss, (.539201, .792525), (.040245, .051716), (-.040245, -.051716)),
    ('focalpo_oxrl', link.focalpo_oxrl_loss, (.318445, .361616), (.024446, .024613),
     (-.024446, -.024613)),
    ('odpo_oxrl', link.odpo_oxrl_loss, (1.103186, 1.501929), (.066819, .077730),
     (-.066819, -.077730)),
    ('rdpo', score.rdpo_loss, (.567232, .814745), (.043291, .055725), (-.043291, -.055725)),
    ('rdpo_oxrl', score.rdpo_oxrl_loss, (.541698, .837232), (.041824, .056709),
     (-.041824, -.056709)),
    ('ipo_oxrl', score.ipo_oxrl_loss, (4.0, 56.25), (4.0, 15.0), (-4.0, -15.0)),
    ('ipo', score.ipo_loss, (20.025625, 30.710069), (1.79, 1.847222), (-1.118750, -2.770833)),
    ('sigmoid_norm', score.sigmoid_norm_loss, (.069936, 2.772854), (.067547, .781264),
     (-.042217, -1.171896)),
    ('simpo', score.simpo_loss, (1.701413, 1.313262), (.327030, .243686), (-.204394, -.365529)),
    ('simpo_oxrl', score.simpo_oxrl_loss, (.989712, .974077), (.012566, .010374),
     (-.007854, -.015561)),
    ('alphapo', _p(score.alphapo_loss, margin=.125), (1.405327, .757599), (.622156, .322044),
     (-.365288, -.483066)),
    ('alphapo_oxrl', score.alphapo_oxrl_loss, (1.078909, .974077), (.097541, .046494),
     (-.047478, -.069742)),
    ('cpo preference term', _p(score.cpo_loss, nll_coefficient=0.0), (.513015, .854355),
     (.040131, .057444), (-.040131, -.057444)),
    ('orpo odds term', _orpo_odds, (.851757, .693147), (.132615, .107268), (-.086740, -.160902)),
    ('sppo_hard', anchor.sppo_loss, (25.0, 78.25), (6.0, 12.0), (-8.0, -13.0)),
    ('caldpo', anchor.caldpo_loss, (25.048587, 80.828890), (6.047426, 12.924142),
     (-8.047426, -13.924142)),
    ('nca', _p(anchor.nca_loss, beta=.1), (1.319407, 1.452074), (.017525, .028747),
     (-.023751, -.026871)),
    ('bco_pair', unpaired.bco_pair_loss, (1.242536, 1.515354), (.045017, .052498),
     (-.047502, -.053743)),
    ('kto', _kto, (.925140, 1.062409), (.024860, .024860), (-.024860, -.024938)),
    ('apo_zero', anchor.apo_zero_loss, (.925187, 1.062409), (.024752, .024938),
     (-.024938, -.024860)),
    ('apo_down', anchor.apo_down_loss, (.975391, 1.037197), (-.000306, -.000324),
     (-.024446, -.024613)),
    ('dpop', gap.dpop_loss, (.554355, 1.136871), (.042556, .407507), (-.042556, -.067918)),
    ('dposhift', score.dposhift_loss, (.575939, .784470), (.043782, .054364), (-.021891, -.027182)),
    ('hdpo', score.hdpo_loss, (.571573, .809185), (.039183, .049930), (-.039183, -.049930)),
    ('bpo', gap.bpo_loss, (.678260, .744397), (0.0, .052498), (-.014775, 0.0)),
    ('minor_dpo', gap.minor_dpo_loss, (.598139, .825939), (.045017, .056218), (0.0, -.056218)),
    ('c2dpo', anchor.c2dpo_loss, (.554555, .825989), (.042156, .056018), (-.042956, -.056418)),
    ('chipo', score.chipo_loss, (.312693, 1.077547), (.225267, .090221), (-.036731, -.361556)),
    ('fdpo forward_kl', _p(score.fdpo_loss, variant='forward_kl'), (.572316, .825667),
     (.005898, .152783), (-.118458, -.012541)),
    ('fdpo js', score.fdpo_loss, (.635589, .750284), (.005607, .038583), (-.034387, -.009628)),
    ('fdpo alpha', _p(score.fdpo_loss, variant='alpha'), (.573243, .817686),
     (.016051, .092089), (-.071935, -.026384)),
    ('spo', score.spo_loss, (1.148723, .551980), (.514417, .358793), (-.321511, -.538189)),
    ('drdpo', anchor.drdpo_loss, .680956, (.024150, .024315), (-.024150, -.024315), 'batch'),
    ('aot', gap.aot_loss, .690147, (.021278, .028109), (-.021278, -.028109), 'batch'),
    ('aot_unpaired', gap.aot_unpaired_loss, .680803, (.024375, .025), (-.025, -.024375), 'batch'),
    ('betadpo', _with_state(gap.betadpo_loss, (1.0 - .1 * .25) / .9, drop_fraction=0.0,
                            key=jax.random.key(0)),
     .689153, (.012618, .014694), (-.012618, -.014694), 'batch'),
    ('alpha_dpo', _with_state(gap.alpha_dpo_loss, .1, .5, decay=1.0), (1.985243, 1.089314),
     (.431326, .276480), (-.269579, -.414720)),
]

_scores = {'chosen_scores': jnp.ones(4), 'rejected_scores': jnp.zeros(4)}
BAD = [
    (link.dpo_loss, {'beta': 0.0}, 'beta=0.0'),
    (link.dpo_loss, {'beta': float('nan')}, 'beta=nan'),
    (link.cdpo_loss, {'label_smoothing': 0.5}, r'label_smoothing=0.5.*\[0, 0.5\)'),
    (link.robust_dpo_loss, {'label_smoothing': -0.1}, 'label_smoothing=-0.1'),
    (link.exo_loss, {'label_smoothing': 0.0}, r'label_smoothing=0.0.*\(0, 0.5\)'),
    (link.gpo_loss, {'variant': 'cubic'}, "variant='cubic'.*savage"),
    (link.focalpo_loss, {'exponent': -1.0}, 'exponent=-1.0'),
    (link.focalpo_oxrl_loss, {'exponent': -1.0}, 'exponent=-1.0'),
    (link.discopop_loss, {'temperature': 0.0}, 'temperature=0.0'),
    (link.odpo_loss, {**_scores, 'alpha': -1.0}, 'alpha=-1.0'),
    (link.odpo_loss, {**_scores, 'chosen_scores': None}, 'chosen_scores: .*got nothing'),
    (link.odpo_loss, {**_scores, 'rejected_scores': jnp.ones(1)}, r'rejected_scores: .*\[1\]'),
    (score.cpo_loss, {'nll_coefficient': -1.0}, 'nll_coefficient=-1.0'),
    (score.cpo_loss, {'variant': 'savage'}, "variant='savage'.*ipo"),
    (score.ld_dpo_loss, {'alpha': 1.5}, r'alpha=1.5.*\[0, 1\]'),
    (score.rdpo_loss, {'alpha': -0.01}, 'alpha=-0.01'),
    (score.hdpo_loss, {'alpha': 0.0}, 'alpha=0.0'),
    (score.dposhift_loss, {'rejected_coefficient': -1.0}, 'rejected_coefficient=-1.0'),
    (score.fdpo_loss, {'variant': 'hellinger'}, "variant='hellinger'.*forward_kl"),
    (score.fdpo_loss, {'variant': 'alpha', 'alpha': 1.0}, r'alpha=1.0.*\(0, 1\)'),
    (score.chipo_loss, {'max_reward': -1.0}, 'max_reward=-1.0'),
    (score.orpo_loss, {'beta': -0.1}, 'beta=-0.1'),
    (gap.dpop_loss, {'penalty_coefficient': -5.0}, 'penalty_coefficient=-5.0'),
    (gap.bpo_loss, {'alpha': 0.0}, 'alpha=0.0'),
    (gap.betadpo_loss, {'key': jax.random.key(0), 'drop_fraction': 1.5}, 'drop_fraction=1.5'),
    (gap.wpo_loss, {'chosen_sum_squares': None, 'rejected_sum_squares': None},
     'chosen_sum_squares'),
    (anchor.drdpo_loss, {'beta_prime': 0.0}, 'beta_prime=0.0'),
    (anchor.caldpo_loss, {'calibration_coefficient': -1.0}, 'calibration_coefficient=-1.0'),
    (anchor.c2dpo_loss, {'constraint_coefficient': -1.0}, 'constraint_coefficient=-1.0'),
    (anchor.mpo_loss, {'quality_coefficient': -1.0}, 'quality_coefficient=-1.0'),
    (anchor.tpo_loss, {'demonstration_log_probs': None, 'demonstration_loss_mask': None},
     'demonstration_log_probs'),
    (unpaired.kto_oxrl_loss, {'desirable_weight': -1.0}, 'desirable_weight=-1.0'),
]
