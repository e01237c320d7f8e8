"""Preference losses against TRL's own trainers: their loss methods run on stub models.

A stub model returns given log-probs, so that TRL's loss and its gradient with respect to them can
be compared with ours. Nothing of TRL is copied.
"""

import collections
import functools
import pathlib
import sys
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax import types
from ptjax.losses import preference_anchor as anchor
from ptjax.losses import preference_gap as gap
from ptjax.losses import preference_link as link
from ptjax.losses import preference_score as score
from ptjax.losses import unpaired

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import preference_cases as cases

torch = pytest.importorskip('torch', reason='install the parity extra')

pytestmark = pytest.mark.slow  # importing TRL takes longer than the tests

B, T = 4, 6


class Accelerator:
  """One process."""
  device = 'cpu'
  gather = gather_for_metrics = staticmethod(lambda x: x)


def trainer_of(path, **attributes):
  """A trainer that was never constructed, with just the attributes its loss reads."""
  module, _, name = path.rpartition('.')
  trainer = object.__new__(getattr(pytest.importorskip(module), name))
  trainer.__dict__.update(
      model=python_types.SimpleNamespace(training=False), accelerator=Accelerator(),
      _metrics={'eval': collections.defaultdict(list)}, _total_train_tokens=0,
      aux_loss_enabled=False, precompute_ref_logps=True, is_encoder_decoder=False,
      pad_token_id=0, padding_value=0, loss_weights=[1.0], label_smoothing=0.0, ld_alpha=None,
      use_weighting=False, f_divergence_type='reverse_kl', alpha=0.0, simpo_gamma=0.0,
      args=python_types.SimpleNamespace(discopop_tau=0.05))
  trainer.__dict__.update(attributes)
  return trainer


def tensor(x):
  return torch.tensor(np.asarray(x))


def with_prompt_token(mask, value=0):
  return torch.cat([torch.full((len(mask), 1), value), tensor(mask).long()], dim=1)


class FusedHead:
  """Returns masked log-probs, as TRL's models with a fused head do."""
  training = False

  def __init__(self, log_probs, mask, log_sum_squares):
    self.fields = dict(
        log_probs=torch.where(mask, log_probs, 0.0), log_sum_sq_probs=log_sum_squares,
        entropy=torch.zeros_like(log_sum_squares), mean_logits=torch.zeros_like(log_sum_squares),
        is_top1=torch.zeros_like(mask))

  def __call__(self, **_):
    return python_types.SimpleNamespace(**self.fields)


class TwoTokens:
  """A vocabulary of two, whose token 0, the only one used, has the given log-probs."""
  training = False

  def __init__(self, log_probs):
    self.log_probs = log_probs

  def __call__(self, *_, **__):
    logits = torch.stack([self.log_probs, torch.log(-torch.expm1(self.log_probs))], dim=-1)
    return python_types.SimpleNamespace(logits=torch.cat([logits, logits[:, :1]], dim=1))


@functools.lru_cache(None)
def arrays():
  values = cases.random_arrays(B, T, seed=1)
  # With sums of 1 every alignment is below 0 and WPO's weight below 1, where TRL does not clamp it.
  return {**values, **{name: np.zeros((B, T)) for name in cases.SQUARES}}


def leaves(*names):
  return [tensor(arrays()[name]).requires_grad_() for name in names]


def masks(*names):
  return torch.cat([tensor(arrays()[name + '_mask']) for name in names])


def dpo_trainer_loss(loss_types, dtype=torch.float64, **attributes):
  """(loss, gradients, metrics) of DPOTrainer."""
  trainer = trainer_of('trl.trainer.dpo_trainer.DPOTrainer', loss_types=loss_types, **attributes)
  chosen, rejected = leaves('chosen', 'rejected')
  mask = masks('chosen', 'rejected')
  w, l = (tensor(side.S0).to(dtype) for side in cases.sides(arrays()))
  if trainer.ld_alpha is not None:
    w, l = trainer_reference(trainer, mask)
  squares = torch.cat([tensor(arrays()[n]) for n in cases.SQUARES])
  loss = trainer._compute_loss(
      FusedHead(torch.cat([chosen, rejected]).to(dtype), mask, squares),
      dict(input_ids=torch.zeros((2 * B, T + 1), dtype=torch.long),
           completion_mask=with_prompt_token(mask), ref_chosen_logps=w, ref_rejected_logps=l),
      return_outputs=False)
  loss.backward()
  return loss, (chosen.grad, rejected.grad), {
      name: values[0] for name, values in trainer._metrics['eval'].items()}


def trainer_reference(trainer, mask):
  """TRL's own reference log-probs, weighted by ld_alpha."""
  reference = torch.cat([tensor(arrays()[s + '_reference']) for s in ('chosen', 'rejected')])
  trainer.__dict__.update(ref_model=object(), model=FusedHead(reference, mask, reference))
  trainer.args.gradient_checkpointing_kwargs = None
  trainer.model.is_gradient_checkpointing = False
  trainer.accelerator.autocast = lambda: torch.no_grad()
  return trainer.compute_ref_log_probs(
      trainer.model, dict(input_ids=torch.zeros((2 * B, T + 1), dtype=torch.long),
                          completion_mask=with_prompt_token(mask)))


def pair_trainer_loss(path, **attributes):
  """(loss, gradients, metrics) of CPOTrainer or ORPOTrainer."""
  trainer = trainer_of(path, **attributes)
  chosen, rejected = leaves('chosen', 'rejected')
  batch = {}
  for side in ('chosen', 'rejected'):
    mask = with_prompt_token(arrays()[side + '_mask'])
    batch[side + '_input_ids'] = torch.zeros_like(mask)
    batch[side + '_labels'] = torch.where(mask == 1, 0, -100)
    batch[side + '_attention_mask'] = mask  # so that ORPO's NLL covers the response alone
  loss, metrics = trainer.get_batch_loss_metrics(
      TwoTokens(torch.cat([chosen, rejected])), batch, train_eval='train')
  loss.backward()
  return loss, (chosen.grad, rejected.grad), metrics


def tpo_trainer_loss(loss_type, **attributes):
  """(loss, gradients with the demonstration's last, metrics) of TPOTrainer."""
  trainer = trainer_of('trl.experimental.tpo.TPOTrainer', loss_type=loss_type, **attributes)
  parts = leaves('chosen', 'rejected', 'demonstration_log_probs')
  mask = torch.cat([masks('chosen', 'rejected'), tensor(arrays()['demonstration_loss_mask'])])
  loss = trainer._compute_loss(
      TwoTokens(torch.cat(parts)), dict(input_ids=torch.zeros((3 * B, T + 1), dtype=torch.long),
                                        completion_mask=with_prompt_token(mask)), False)
  loss.backward()
  return loss, [part.grad for part in parts], {
      name: values[0] for name, values in trainer._metrics['eval'].items()}


def ours(loss, hyper, extras=()):
  """(loss, gradients, metrics) of ptjax in float64."""
  case = cases.Case('', loss, hyper, extras)
  def objective(floats, rest):
    value, metrics, *_ = cases.call(case, {**floats, **rest})
    return value, metrics
  values = cases.to_jax(arrays(), case, np.float64)
  rest = {k: values.pop(k) for k in list(values) if values[k].dtype == bool}
  (value, metrics), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(values, rest)
  return value, [grads[n] for n in ('chosen', 'rejected')] + [
      grads[n] for n in extras if n == 'demonstration_log_probs'], metrics


b = {'beta': 0.3}
smooth = {'beta': 0.3, 'label_smoothing': 0.1}
dpo = lambda *names, **attributes: functools.partial(
    dpo_trainer_loss, list(names), **{'beta': 0.3, **attributes})
cpo = lambda loss_type, **attributes: functools.partial(
    pair_trainer_loss, 'trl.experimental.cpo.CPOTrainer', loss_type=loss_type,
    **{'beta': 0.3, **attributes})
tpo = lambda loss_type, **attributes: functools.partial(
    tpo_trainer_loss, loss_type, tpo_alpha=0.7, **{**smooth, **attributes})
f_dpo = lambda name: dpo('sigmoid', f_divergence_type=name)
cpo_smooth = {**smooth, 'nll_coefficient': 0.7}

TABLE = [
    ('dpo', link.dpo_loss, b, dpo('sigmoid')),
    ('hinge', link.hinge_loss, b, dpo('hinge')),
    ('robust_dpo', link.robust_dpo_loss, smooth, dpo('robust', label_smoothing=0.1)),
    ('exo', link.exo_loss, smooth, dpo('exo_pair', label_smoothing=0.1)),
    ('discopop', link.discopop_loss, b, dpo('discopop')),
    ('ipo', score.ipo_loss, b, dpo('ipo')),
    ('sigmoid_norm', score.sigmoid_norm_loss, b, dpo('sigmoid_norm')),
    ('ld_dpo', score.ld_dpo_loss, {**b, 'alpha': 0.4}, dpo('sigmoid', ld_alpha=0.4)),
    ('fdpo forward', score.fdpo_loss, {**b, 'variant': 'forward_kl'}, f_dpo('forward_kl')),
    ('fdpo js', score.fdpo_loss, {**b, 'variant': 'js'}, f_dpo('js_divergence')),
    ('fdpo alpha', score.fdpo_loss, {**b, 'variant': 'alpha', 'alpha': 0.6},
     dpo('sigmoid', f_divergence_type='alpha_divergence', f_alpha_divergence_coef=0.4,
         dtype=torch.float32)),  # TRL knows no wider type here
    ('fdpo reverse', score.fdpo_loss, {**b, 'variant': 'reverse_kl'}, f_dpo('reverse_kl')),
    ('aot', gap.aot_loss, smooth, dpo('aot', label_smoothing=0.1)),
    ('aot_unpaired', gap.aot_unpaired_loss, smooth, dpo('aot_unpaired', label_smoothing=0.1)),
    ('wpo', gap.wpo_loss, b, dpo('sigmoid', use_weighting=True), cases.SQUARES),
    ('sppo', anchor.sppo_loss, b, dpo('sppo_hard')),
    ('nca', anchor.nca_loss, b, dpo('nca_pair')),
    ('apo_zero', anchor.apo_zero_loss, b, dpo('apo_zero')),
    ('apo_down', anchor.apo_down_loss, b, dpo('apo_down')),
    ('rpo', anchor.rpo_loss, {**b, 'nll_coefficient': 0.7},
     dpo('sigmoid', 'sft', loss_weights=[1.0, 0.7])),
    ('bco_pair', unpaired.bco_pair_loss, b, dpo('bco_pair')),
    ('cpo', score.cpo_loss, cpo_smooth, cpo('sigmoid', cpo_alpha=0.7, label_smoothing=0.1)),
    ('cpo hinge', score.cpo_loss, {**cpo_smooth, 'variant': 'hinge'},
     cpo('hinge', cpo_alpha=0.7)),
    ('cpo ipo', score.cpo_loss, {**cpo_smooth, 'variant': 'ipo'}, cpo('ipo', cpo_alpha=0.7)),
    ('simpo', score.simpo_loss, {'beta': 2.0, 'margin': 1.0},
     cpo('simpo', beta=2.0, simpo_gamma=1.0, cpo_alpha=0)),
    ('cposimpo', score.cposimpo_loss, {'beta': 2.0, 'margin': 1.0, 'nll_coefficient': 0.7},
     cpo('simpo', beta=2.0, simpo_gamma=1.0, cpo_alpha=0.7)),
    ('alphapo', score.alphapo_loss, {'beta': 2.5, 'margin': 0.1, 'alpha': 0.25},
     cpo('simpo', beta=2.5, simpo_gamma=0.1, alpha=0.25, cpo_alpha=0)),
    ('orpo', score.orpo_loss, b, functools.partial(
        pair_trainer_loss, 'trl.experimental.orpo.ORPOTrainer', beta=0.3)),
    *((f'tpo {ours_}', anchor.tpo_loss, {**cpo_smooth, 'variant': ours_}, tpo(trls), cases.GOLD)
      for ours_, trls in (('logistic', 'sigmoid'), ('hinge', 'hinge'), ('ipo', 'ipo'))),
    ('tpo_l', anchor.tpo_l_loss, {'beta': 2.0, 'margin': 0.5, 'nll_coefficient': 0.7},
     tpo('tpo-l', beta=2.0, tpo_l_gamma=0.5, label_smoothing=0.0), cases.GOLD),
]


@pytest.mark.parametrize('row', TABLE, ids=[row[0] for row in TABLE])
def test_value_gradient_and_metrics_equal_trls(row):
  _, loss, hyper, trl_loss, *extras = row
  want, want_grads, want_metrics = trl_loss()
  with jax.enable_x64(True):
    value, grads, metrics = ours(loss, hyper, *extras)
  # TRL casts a few exponents and constants to float32.
  np.testing.assert_allclose(value, want.detach().numpy(), rtol=1e-5)
  for grad, want_grad in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(grad, want_grad.numpy(), rtol=1e-5, atol=1e-8)
  per_token_logps = not np.allclose(want_metrics['logps/chosen'], cases.sides(arrays())[0].S.mean())
  for name in set(metrics) & set(want_metrics):
    if name.startswith('logps/') and per_token_logps:
      continue  # some trainers log the score they use there; ours always logs the sum
    np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize('drift', [0.4, -0.4])
def test_kto_equals_trls(drift):
  """`drift` moves the mismatched log-ratios, so that z₀ is positive once and clamped once."""
  want, want_grad, want_metrics = kto_trainer_loss('kto', drift, 1.2, 0.8)
  with jax.enable_x64(True):
    value, grad, metrics = evaluate(functools.partial(
        unpaired.kto_loss, labels=LABELS, beta=0.3, desirable_weight=1.2, undesirable_weight=0.8,
        mismatched_log_probs=arrays()['rejected'],
        mismatched_loss_mask=arrays()['rejected_mask'],
        mismatched_reference_log_probs=arrays()['rejected'] - drift))
  assert (float(metrics['kl']) > 0) == (drift > 0)
  assert_equal(value, grad, metrics, want, want_grad, want_metrics)


def test_apo_zero_unpaired_equals_trls():
  want, want_grad, want_metrics = kto_trainer_loss('apo_zero_unpaired', 0.0, 1.0, 1.0)
  with jax.enable_x64(True):
    value, grad, metrics = evaluate(functools.partial(
        unpaired.apo_zero_unpaired_loss, labels=LABELS, beta=0.3))
  assert_equal(value, grad, metrics, want, want_grad, want_metrics)


LABELS = np.array([True, False, True, True])


def kto_trainer_loss(loss_type, drift, desirable_weight, undesirable_weight):
  """(loss, gradient, metrics) of KTOTrainer on the chosen responses."""
  trainer = trainer_of(
      'trl.trainer.kto_trainer.KTOTrainer', loss_type=loss_type, beta=0.3,
      calculate_KL=loss_type == 'kto',
      desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
  chosen, = leaves('chosen')
  def total(x):
    return tensor(np.where(arrays()['rejected_mask'], x, 0.0).sum(axis=1))
  trainer._compute_kl_logps = lambda model, batch: total(arrays()['rejected'])
  loss = trainer._compute_loss(
      FusedHead(chosen, masks('chosen'), torch.zeros_like(chosen)),
      dict(input_ids=torch.zeros((B, T + 1), dtype=torch.long), label=tensor(LABELS),
           completion_mask=with_prompt_token(masks('chosen')),
           ref_logps=tensor(cases.sides(arrays())[0].S0),
           ref_KL_logps=total(arrays()['rejected'] - drift)), False)
  loss.backward()
  return loss, chosen.grad, {name: v[0] for name, v in trainer._metrics['eval'].items()}


def evaluate(loss):
  """(value, gradient, metrics) of an unpaired loss of ours on the chosen responses."""
  side = types.SideLogProbs(*(jnp.asarray(arrays()[n]) for n in (
      'chosen', 'chosen_mask', 'chosen_reference')))
  (value, metrics), grad = jax.value_and_grad(
      lambda x: loss(side.replace(log_probs=x)), has_aux=True)(side.log_probs)
  return value, grad, metrics


def assert_equal(value, grad, metrics, want, want_grad, want_metrics):
  np.testing.assert_allclose(value, want.detach().numpy(), rtol=1e-9)
  np.testing.assert_allclose(grad, want_grad.numpy(), rtol=1e-9, atol=1e-15)
  for name in set(metrics) & set(want_metrics):
    np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-6, err_msg=name)
