"""The losses against TRL 1.16's own methods, called on a stand-in for the trainer, in float64.

Not copies of TRL's formulas: its code runs. One process and no accumulation, so that its averages
over micro-batches are averages over the batch.
"""

import collections
import inspect
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.losses import distillation
from ptjax.losses import imitation
from ptjax.losses import modifiers
from ptjax.losses import policy_gradient as pg
from ptjax.losses import policy_gradient_sequence as seq
from ptjax.pieces import divergence

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import policy_gradient_cases as cases

torch = pytest.importorskip('torch', reason='the parity extra (torch, trl) is not installed')
pytest.importorskip('trl', reason='the parity extra (torch, trl) is not installed')

pytestmark = pytest.mark.slow  # importing trl takes ten seconds


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope='module')
def arrays():
  """The random batch without the empty row, which TRL counts in some of its means."""
  arrays = cases.random_arrays()
  arrays['loss_mask'][5, 0] = True
  noise = np.random.default_rng(5).normal(0.0, 0.8, (cases.B, cases.T))
  return {**arrays, 'rollout_log_probs': arrays['old_log_probs'] + noise}


def tensors(arrays):
  return {n: torch.tensor(x) for n, x in arrays.items()}


def stand_in(**attributes):
  """A trainer in evaluation mode on one process, with exactly the attributes a method reads."""
  accelerator = types.SimpleNamespace(
      num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x,
      reduce=lambda x, reduction=None: x, pad_across_processes=lambda x, dim, pad_index: x,
      sync_gradients=True, parallelism_config=None)
  return types.SimpleNamespace(
      accelerator=accelerator, model=types.SimpleNamespace(training=False),
      current_gradient_accumulation_steps=1, aux_loss_enabled=False,
      _metrics=collections.defaultdict(lambda: collections.defaultdict(list)), **attributes)


def grpo_trainer(arrays, log_probs, entropy, **settings):
  from trl.trainer.grpo_trainer import GRPOTrainer
  options = dict(
      delta=None, use_bias_correction_kl=False, sapo_temperature_pos=1.0,
      sapo_temperature_neg=1.25, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0,
      vespo_lambda_neg=2.0)
  attributes = dict(
      beta=0.0, loss_type='grpo', importance_sampling_level='token', epsilon_low=0.2,
      epsilon_high=0.3, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
      vllm_importance_sampling_correction=True, max_completion_length=9,
      _entropy_bonus_enabled=False, use_adaptive_entropy=False, entropy_coef=0.0)
  options.update({k: settings.pop(k) for k in list(settings) if k in options})
  attributes.update(settings)
  trainer = stand_in(args=types.SimpleNamespace(**options), **attributes)
  trainer._get_per_token_logps_and_entropies = lambda *a, **k: (log_probs, entropy, None)
  trainer.get_off_policy_mask = GRPOTrainer.get_off_policy_mask
  trainer.get_gamma_weights = GRPOTrainer.get_gamma_weights
  trainer.get_high_entropy_mask = types.MethodType(GRPOTrainer.get_high_entropy_mask, trainer)
  return trainer


def batch_of(t):
  empty = torch.zeros(cases.B, 0, dtype=torch.long)
  return {
      'prompt_ids': empty, 'prompt_mask': empty, 'advantages': t['advantages'],
      'completion_ids': torch.zeros(cases.B, cases.T, dtype=torch.long),
      'completion_mask': t['loss_mask'].double(), 'old_per_token_logps': t['old_log_probs'],
      'ref_per_token_logps': t['reference_log_probs'],
      'sampling_per_token_logps': t['rollout_log_probs'],
      'num_items_in_batch': t['loss_mask'].sum()}


def trl_grpo(arrays, importance_ratio=None, trainer='grpo', **settings):
  """Value and gradient of TRL's GRPO loss, and of what is built on it."""
  t = tensors(arrays)
  log_probs = t['log_probs'].requires_grad_()
  entropy = t['entropy'].requires_grad_()
  batch = batch_of(t)
  if importance_ratio is not None:
    batch['importance_sampling_ratio'] = torch.tensor(importance_ratio)
  this = grpo_trainer(arrays, log_probs, entropy, **settings)
  if trainer == 'gmpo':
    from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer as method_of
  else:
    from trl.trainer.grpo_trainer import GRPOTrainer as method_of
  loss = method_of._compute_loss(this, None, batch)
  loss.backward()
  return {'loss': loss.item(), 'log_probs': log_probs.grad.numpy(),
          'entropy': None if entropy.grad is None else entropy.grad.numpy(),
          'metrics': {k: v[0] for k, v in this._metrics['eval'].items()}}


def ours(loss, arrays, attached=('log_probs',), **hyper):
  names = inspect.signature(loss).parameters
  inputs = {n: jnp.asarray(x) for n, x in arrays.items() if n in names}
  objective = lambda a: loss(**{**inputs, **a}, **hyper)[:2]
  (value, metrics), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(
      {n: inputs[n] for n in attached})
  return {'loss': value, 'metrics': metrics, **grads}


def agree(got, want, names=('log_probs',)):
  np.testing.assert_allclose(got['loss'], want['loss'], rtol=1e-11)
  for name in names:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-10, atol=1e-14)


clip = dict(clip_low=0.2, clip_high=0.3)
tight = dict(clip_low=0.03, clip_high=0.05)
narrow = dict(epsilon_low=0.03, epsilon_high=0.05, importance_sampling_level='sequence')
length = dict(max_completion_tokens=9)
PLAIN = [
    ('grpo', pg.grpo_loss, clip, {}),
    ('grpo + k3', pg.grpo_loss, dict(clip, kl_coefficient=0.3), dict(beta=0.3)),
    ('dr_grpo', pg.dr_grpo_loss, {**clip, **length}, dict(loss_type='dr_grpo')),
    ('bnpo', pg.bnpo_loss, clip, dict(loss_type='bnpo')),
    ('sgrpo', pg.sgrpo_loss, dict(clip, kl_coefficient=0.3, entropy_coefficient=0.2),
     dict(loss_type='bnpo', beta=0.3, _entropy_bonus_enabled=True, entropy_coef=0.2)),
    ('dapo', pg.dapo_loss, clip, dict(loss_type='dapo')),
    ('gspo', seq.gspo_loss, tight, narrow),
    ('luspo', seq.luspo_loss, tight, dict(narrow, loss_type='luspo')),
    ('cispo', pg.cispo_loss, dict(max_ratio=1.2), dict(loss_type='cispo', epsilon_high=1.2)),
    ('sapo', pg.sapo_loss, dict(temperature_negative=1.25), dict(loss_type='sapo')),  # TRL: float32
    ('vespo', seq.vespo_loss, {}, dict(loss_type='vespo')),
    ('gmpo', seq.gmpo_loss, dict(log_clip=0.3),
     dict(trainer='gmpo', epsilon_low=0.3, epsilon_high=0.3)),
    ('opsm', modifiers.opsm(pg.grpo_loss), dict(clip, drift_threshold=0.05),
     dict(off_policy_mask_threshold=0.05)),
    ('top_entropy', modifiers.top_entropy(pg.grpo_loss), dict(clip, entropy_fraction=0.3),
     dict(top_entropy_quantile=0.3)),
    ('entropy_bonus', modifiers.entropy_bonus(pg.grpo_loss), dict(clip, entropy_coefficient=0.2),
     dict(_entropy_bonus_enabled=True, entropy_coef=0.2)),
]


@pytest.mark.parametrize('case', PLAIN,
                         ids=[c[0] for c in PLAIN])
def test_grpo_family(case, arrays):
  name, loss, hyper, settings = case
  attached = ('log_probs', 'entropy') if 'entropy_coef' in settings else ('log_probs',)
  got, want = ours(loss, arrays, attached, **hyper), trl_grpo(arrays, **settings)
  agree(got, want, attached)
  if 'importance_sampling_level' in settings or 'top_entropy_quantile' in settings:
    return  # TRL counts clipped sequences there, ours the clipped tokens that would push
  for metric, number in want['metrics'].items():
    if metric in got['metrics']:
      np.testing.assert_allclose(got['metrics'][metric], number, rtol=1e-10, err_msg=metric)


def test_corrected_kl_is_trls_bias_correction(arrays):
  got = ours(modifiers.corrected_kl(lambda log_probs, *, advantages, loss_mask: (0.0, {})), arrays,
             kl_coefficient=0.3)
  settings = dict(beta=0.3, use_bias_correction_kl=True)
  want = trl_grpo({**arrays, 'advantages': np.zeros(cases.B)}, **settings)
  agree(got, want)


def test_delta_and_dual_clip_differ_for_encouraged_tokens(arrays):
  """TRL's delta caps the unclipped ratio of both signs, dual clip that of discouraged tokens."""
  far = {**arrays, 'log_probs': arrays['log_probs'] + 0.5}
  loss = lambda log_probs, *, old_log_probs, advantages, loss_mask: pg.clipped_surrogate(
      log_probs, old_log_probs, advantages, loss_mask, max_ratio=1.4,
      reduce=pg.reduction.sequence_mean, **clip)
  discouraged = {**far, 'advantages': -np.abs(far['advantages'])}
  agree(ours(loss, discouraged), trl_grpo(discouraged, delta=1.4))


@pytest.mark.parametrize('level', ['token', 'sequence'])
@pytest.mark.parametrize('name', ['tis', 'mis'])
def test_importance_sampling_correction(name, level, arrays):
  gap = np.where(arrays['loss_mask'], arrays['old_log_probs'] - arrays['rollout_log_probs'], 0.0)
  gap = gap if level == 'token' else gap.sum(1, keepdims=True)
  ratio = np.exp(gap)
  bounds = dict(max_rollout_ratio=1.5)
  if name == 'tis':
    ratio = np.minimum(ratio, 1.5)
  else:
    bounds['min_rollout_ratio'] = 0.6
    ratio = np.where((ratio < 0.6) | (ratio > 1.5), 0.0, ratio)
  got = ours(modifiers.MODIFIERS[name](pg.grpo_loss), arrays, level=level, **bounds, **clip)
  agree(got, trl_grpo(arrays, importance_ratio=ratio, use_vllm=True))


def test_rloo(arrays):
  from trl.trainer.rloo_trainer import RLOOTrainer
  t = tensors(arrays)
  log_probs = t['log_probs'].requires_grad_()
  trainer = stand_in(epsilon_low=0.2, epsilon_high=0.3)
  trainer._get_per_token_logps_and_entropies = lambda *a, **k: (log_probs, t['entropy'], None)
  batch = batch_of(t)
  batch['old_logps'] = (t['old_log_probs'] * batch['completion_mask']).sum(1)
  loss = RLOOTrainer._compute_loss(trainer, None, batch)
  loss.backward()
  agree(ours(seq.rloo_loss, arrays, **clip),
        {'loss': loss.item(), 'log_probs': log_probs.grad.numpy()})


def test_a_star_po(arrays):
  from trl.experimental.a2po.a2po_trainer import A2POTrainer
  t = tensors(arrays)
  log_probs = t['log_probs'].requires_grad_()
  total = lambda x: (x * t['loss_mask']).sum(1)
  trainer = stand_in(args=types.SimpleNamespace(beta2=0.2))
  trainer._get_sequence_logps = lambda *a: total(log_probs)
  loss = A2POTrainer.compute_loss(trainer, None, {
      'input_ids': None, 'attention_mask': None, 'logits_to_keep': None,
      'ref_logps': total(t['reference_log_probs']), 'rewards': t['advantages'],
      'v_star': torch.zeros(cases.B)})
  loss.backward()
  agree(ours(seq.a_star_po_loss, arrays, beta=0.2),
        {'loss': loss.item(), 'log_probs': log_probs.grad.numpy()})


@pytest.mark.parametrize('loss, loss_type', [
    (imitation.sft_loss, 'nll'), (imitation.dft_loss, 'dft')], ids=['sft', 'dft'])
def test_supervised(loss, loss_type, arrays):
  from trl.trainer.sft_trainer import SFTTrainer
  t = tensors(arrays)
  log_probs = t['log_probs'].requires_grad_()
  outputs = types.SimpleNamespace(
      log_probs=torch.where(t['loss_mask'], log_probs, 0.0), label_mask=t['loss_mask'],
      entropy=t['entropy'], is_top1=t['loss_mask'])
  trainer = stand_in(
      args=types.SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False),
      compute_loss_func=None, label_smoother=None, _total_train_tokens=0)
  value = SFTTrainer.compute_loss(trainer, lambda **kwargs: outputs, {})
  value.backward()
  agree(ours(loss, arrays), {'loss': value.item(), 'log_probs': log_probs.grad.numpy()})


@pytest.mark.parametrize('interpolation', [0.0, 0.3, 0.5, 1.0])
def test_generalized_jensen_shannon(interpolation, arrays):
  from trl.experimental.gkd.gkd_trainer import GKDTrainer
  t = tensors(arrays)
  logits = t['logits'].requires_grad_()
  labels = torch.where(t['loss_mask'], 1, -100)
  loss = GKDTrainer.generalized_jsd_loss(
      logits, t['teacher_logits'], labels=labels, beta=interpolation, temperature=0.9,
      num_items_in_batch=t['loss_mask'].sum())
  loss.backward()
  gkd = cases.from_logits(distillation.gkd_loss, divergence.jensen_shannon)
  agree(ours(gkd, arrays, ('logits',), interpolation=interpolation, temperature=0.9),
        {'loss': loss.item(), 'logits': logits.grad.numpy()}, ('logits',))


def picked(arrays):
  """Arrays whose log-probs are those of token 2 under the student's own logits."""
  log_probs = jax.nn.log_softmax(arrays['logits'])[..., 2]
  return {**arrays, 'log_probs': np.asarray(log_probs)}


def of_logits(loss):
  """`loss` as a function of logits alone: the log-probs are those of token 2."""
  def wrapped(logits, **inputs):
    names = inspect.signature(loss).parameters
    inputs = {**inputs, **({'logits': logits} if 'logits' in names else {})}
    return loss(jax.nn.log_softmax(logits)[..., 2], **inputs)
  wrapped.__signature__ = inspect.Signature(
      [p for n, p in inspect.signature(loss).parameters.items() if n not in ('log_probs', 'logits')]
      + [inspect.Parameter('logits', inspect.Parameter.KEYWORD_ONLY)])
  return wrapped


def test_iw_opd(arrays):
  from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
  t = tensors(arrays)
  logits = t['logits'].requires_grad_()
  trainer = stand_in(temperature=1.0, iw_opd_gamma=0.5, iw_opd_epsilon=1e-8)
  # TRL's own step is on-policy: its ratio is 1, so the old log-probs are the student's.
  loss = IWOPDTrainer._compute_iw_opd_loss(
      trainer, logits, torch.full((cases.B, cases.T), 2), torch.where(t['loss_mask'], 1, -100),
      t['teacher_log_probs'])
  loss.backward()
  old = picked(arrays)['log_probs']
  got = ours(of_logits(distillation.iw_opd_loss), {**arrays, 'old_log_probs': old}, ('logits',))
  np.testing.assert_allclose(got['logits'], logits.grad.numpy(), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize('weight', [0.6, 1.0])
def test_self_distillation(weight, arrays):
  from trl.experimental.sdpo.sdpo_trainer import DistillationLogits, SDPOTrainer
  arrays = {**picked(arrays), 'old_log_probs': picked(arrays)['log_probs'] - arrays['entropy'] + 1}
  t = tensors(arrays)
  logits = t['logits'].requires_grad_()
  mask, ids = t['loss_mask'].double(), torch.full((cases.B, cases.T), 2)
  trainer = stand_in(
      args=types.SimpleNamespace(
          distillation_weight=weight, distillation_mode='topk_logits', distillation_topk=3,
          distillation_alpha=0.3, distillation_add_tail=True, distillation_is_clip=1.2),
      use_teacher_server=False, teacher_model=None, importance_sampling_level='token',
      loss_type='grpo', epsilon_low=0.2, epsilon_high=0.3,
      _log_self_distillation_metric=lambda *a: None)
  trainer._compute_teacher_student_logits = lambda *a: DistillationLogits(
      completion_ids=ids, completion_mask=mask, loss_mask=mask, student_logits=logits,
      teacher_logits=t['teacher_logits'])
  for name in ('_compute_policy_loss', '_compute_self_distillation_loss'):
    setattr(trainer, name, types.MethodType(getattr(SDPOTrainer, name), trainer))
  loss = SDPOTrainer.compute_loss(trainer, trainer.model, {
      'completion_ids': ids, 'completion_mask': mask, 'advantages': t['advantages'],
      'old_per_token_logps': t['old_log_probs']})
  loss.backward()
  want = {'loss': loss.item(), 'logits': logits.grad.numpy()}
  hyper = dict(interpolation=0.3, top_k=3, max_ratio=1.2)
  sdpo, sdft = (of_logits(cases.from_logits(loss, divergence.top_k_jensen_shannon))
                for loss in (distillation.sdpo_loss, distillation.sdft_loss))
  agree(ours(sdpo, arrays, ('logits',), distillation_weight=weight, **clip, **hyper), want,
        ('logits',))
  if weight == 1.0:
    agree(ours(sdft, arrays, ('logits',), **hyper), want, ('logits',))
