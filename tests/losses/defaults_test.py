"""Every default of every row, as the specification has it: defaults are part of what names mean."""

import inspect

import pytest

from ptjax import algorithms
from ptjax.losses import modifiers
from ptjax.losses import policy_gradient
from ptjax.pieces import advantage
from ptjax.pieces import returns

CLIP = dict(clip_low=0.2, clip_high=0.2)
NARROW = dict(clip_low=3e-4, clip_high=4e-4, epsilon=1e-4)
GRPO = dict(CLIP, kl_coefficient=0.0, epsilon=1e-4)
SGRPO = dict(CLIP, kl_coefficient=0.0, entropy_coefficient=0.0, epsilon=1e-8)
RLHF = dict(SGRPO, kl_coefficient=0.04, epsilon=1e-4)
FIXED = dict(CLIP, kl_coefficient=0.0, max_completion_tokens=None)
PPO = dict(CLIP, value_clip=0.2, value_coefficient=0.1, entropy_coefficient=0.0, max_ratio=None,
           reward_kl_coefficient=0.05, discount=1.0, gae_lambda=0.95)
HPT = dict(sft_coefficient=1.0, shaping=0.1, entropy_coefficient=1e-3, max_completion_tokens=None,
           threshold=0.0, off_policy_threshold=None, success_threshold=0.5)
BETA = dict(beta=0.1)
SMOOTH = dict(beta=0.1, label_smoothing=0.1)
DPO = dict(beta=0.1, label_smoothing=0.0)
GOLD = dict(beta=0.01, nll_coefficient=1.0)

DEFAULTS = {  # rows without an entry have no hyperparameters
    'rft': dict(reward_threshold=0.5),
    'kd': dict(nll_coefficient=0.5, temperature=2.0),
    'gkd': dict(interpolation=0.5, temperature=1.0, student_fraction=0.5),
    'iw_opd': dict(gamma=0.5),
    'minillm': dict(CLIP, discount=1.0, temperature=1.0),
    'sdft': dict(interpolation=0.5, top_k=100, max_ratio=2.0),
    'sdpo': dict(CLIP, distillation_weight=1.0, interpolation=0.5, top_k=5, max_ratio=2.0,
                 epsilon=1e-4),
    'reinforce_pp': dict(CLIP, kl_coefficient=0.0, reward_kl_coefficient=1e-2, discount=1.0),
    'reinforce_pp_baseline': dict(CLIP, kl_coefficient=1e-2),
    'remax': dict(reward_kl_coefficient=0.0),
    'ppo': PPO, 'ppo_dual_clip': dict(PPO, max_ratio=3.0),
    'grpo': GRPO, 'grpo_process': GRPO, 'bnpo': GRPO, 'dr_grpo': FIXED, 'sft_then_grpo': FIXED,
    'dapo': dict(clip_low=0.2, clip_high=0.28, epsilon=1e-4),
    'sgrpo': SGRPO, 'sgrpo_oxrl': SGRPO, 'rlhf': RLHF, 'rlaif': RLHF,
    'gdpo': dict(GRPO, reward_weights=None), 'pass_at_k': dict(GRPO, epsilon=1e-6),
    'cispo': dict(max_ratio=5.0, epsilon=1e-4), 'cispo_oxrl': dict(CLIP, epsilon=1e-8),
    'sapo': dict(temperature_positive=1.0, temperature_negative=1.05, epsilon=1e-4),
    'clip_cov': dict(CLIP, covariance_low=1.0, covariance_high=5.0, fraction=2e-4, epsilon=1e-4),
    'kl_cov': dict(penalty_coefficient=1.0, fraction=2e-4, epsilon=1e-4),
    'rloo': dict(CLIP, reward_kl_coefficient=0.05),
    'gspo': NARROW, 'gspo_token': NARROW, 'luspo': NARROW,
    'vespo': dict(shape_positive=2.0, rate_positive=3.0, shape_negative=3.0, rate_negative=2.0,
                  epsilon=1e-4),
    'gmpo': dict(log_clip=0.4, epsilon=1e-4), 'a_star_po': dict(beta=1e-3), 'rebel': dict(eta=1.0),
    'nash_md': dict(kl_coefficient=0.1),

    **dict.fromkeys(('dpo', 'online_dpo', 'spin', 'aot', 'aot_unpaired'), DPO),
    **dict.fromkeys(('cdpo', 'robust_dpo', 'robust_dpo_oxrl'), SMOOTH),
    **dict.fromkeys(('hinge', 'ipo', 'ipo_oxrl', 'orpo', 'sampo', 'minor_dpo', 'sppo', 'sppo_soft',
                     'apo_zero', 'apo_down', 'bco_pair', 'apo_zero_unpaired'), BETA),
    'tr_dpo': {**DPO, 'reference_mixup': 0.6, 'reference_sync_steps': 512},
    'step_dpo': dict(beta=0.5, label_smoothing=0.0),
    'xpo': dict(BETA, optimism=1e-5),
    'exo': dict(beta=0.1, label_smoothing=1e-3),
    'discopop': dict(BETA, temperature=0.05),
    'gpo': dict(BETA, variant='exponential'),
    'focalpo': dict(BETA, exponent=0.05), 'focalpo_oxrl': dict(BETA, exponent=1.0),
    'odpo': dict(BETA, alpha=1.0), 'odpo_oxrl': dict(BETA, margin=1.0),
    'sigmoid_norm': dict(beta=5.0),
    'simpo': dict(beta=2.0, margin=1.0), 'simpo_oxrl': dict(beta=0.1, margin=0.5),
    'alphapo': dict(beta=2.5, margin=0.1, alpha=0.25),
    'alphapo_oxrl': dict(beta=0.1, margin=0.5, alpha=1.0),
    'cpo': dict(DPO, nll_coefficient=1.0, variant='logistic'),
    'cposimpo': dict(beta=2.0, margin=0.5, nll_coefficient=1.0),
    'slic_hf': dict(margin=1.0, nll_coefficient=1.0),
    'ld_dpo': dict(BETA, alpha=0.5),
    'rdpo': dict(BETA, alpha=0.01), 'rdpo_oxrl': dict(BETA, alpha=0.01),
    'hdpo': dict(BETA, alpha=0.9),
    'dposhift': dict(BETA, rejected_coefficient=0.5),
    'fdpo': dict(BETA, variant='js', alpha=0.5),
    'chipo': dict(BETA, max_reward=None),
    'spo': dict(beta=2.5, margin=0.8),
    'dpop': dict(BETA, penalty_coefficient=5.0),
    'bpo': dict(BETA, alpha=0.3),
    'betadpo': dict(BETA, alpha=0.6, drop_fraction=0.2, decay=0.9, min_beta=1e-3),
    'betadpo_oxrl': dict(BETA, alpha=0.5, decay=0.9, min_beta=1e-3),
    'alpha_dpo': dict(beta=2.5, margin_per_beta=0.4, alpha=0.1, decay=0.9),
    'wpo': dict(beta=0.01), 'nca': dict(beta=0.01),
    'drdpo': dict(BETA, beta_prime=1.0),
    'caldpo': dict(BETA, calibration_coefficient=1.0),
    'c2dpo': dict(BETA, constraint_coefficient=2e-4),
    'dpnll': dict(BETA, nll_coefficient=1.0),
    'rpo': dict(beta=0.01, nll_coefficient=0.005),
    'mpo': dict(BETA, preference_coefficient=0.8, quality_coefficient=0.2, nll_coefficient=1.0),
    'tpo': dict(GOLD, label_smoothing=0.0, variant='logistic'), 'tpo_l': dict(GOLD, margin=0.5),
    'mdpo': dict(BETA, margin=0.0),
    'kto': dict(BETA, desirable_weight=1.0, undesirable_weight=1.0),
    'kto_oxrl': dict(BETA, desirable_weight=1.0, undesirable_weight=1.0, decay=0.9),
    'bco': dict(BETA, min_weight=0.5, max_weight=10.0),

    'hpt': HPT, 'hpt_off': dict(HPT, threshold=-1.0, off_policy_threshold=0.0),
    'hpt_mix': dict(HPT, off_policy_threshold=0.25),
    'hpt_soft': dict(sft_coefficient=1.0, shaping=0.1, entropy_coefficient=1e-3,
                     max_completion_tokens=None, rollout_exponent=1.0, imitation_exponent=1.0,
                     success_threshold=0.5),
    'luffy': dict(shaping=0.1, entropy_coefficient=1e-3, max_completion_tokens=None),
    'srft': dict(sft_coefficient=0.5, positive_coefficient=0.1, shaping=0.1, success_threshold=0.5,
                 max_completion_tokens=None),
    'reward_centred': dict(centre_coefficient=0.01),
}

MODIFIERS = {
    'tis': dict(max_rollout_ratio=2.0, level='token'),
    'mis': dict(min_rollout_ratio=0.5, max_rollout_ratio=5.0, level='token'),
    'opsm': dict(drift_threshold=0.1), 'top_entropy': dict(entropy_fraction=0.2),
    'mask_truncated': {}, 'entropy_bonus': dict(entropy_coefficient=1e-3),
    'adaptive_entropy': dict(entropy_target=0.2, coefficient_step=0.005, min_coefficient=0.0,
                             max_coefficient=1.0),
    'corrected_kl': dict(kl_coefficient=0.04), 'kl': dict(kl_coefficient=0.04, kl_estimator='k3'),
    # Ziegler et al., 2019, as TRL has it: 0.2 to begin with, 6 nats, 10,000 completions.
    'adaptive_kl': dict(kl_coefficient=0.2, kl_estimator='k3', kl_target=6.0, kl_horizon=10000),
    'adaptive_reward_kl': dict(kl_target=6.0, kl_horizon=10000)}

# Estimators that no row takes: whoever composes a loss gets these.
FURTHER = {
    advantage.optimal_value: dict(temperature=0.5), advantage.batch_normalized: dict(epsilon=1e-4),
    returns.whiten: dict(epsilon=1e-8), returns.gae: dict(discount=1.0, gae_lambda=0.95),
    returns.optimal_token_baseline: dict(discount=1.0)}


@pytest.mark.parametrize('name', algorithms.names())
def test_defaults_of_a_row(name):
  assert algorithms.get(name).hyperparameters() == DEFAULTS.get(name, {})


def test_no_default_is_left_over():
  assert set(DEFAULTS) <= set(algorithms.names())


def test_defaults_of_modifiers():
  plain = set(inspect.signature(policy_gradient.reinforce_loss).parameters)
  got = {name: {n: p.default for n, p in inspect.signature(
      modifier(policy_gradient.reinforce_loss)).parameters.items()
                if n not in {*plain, 'loss_state'} and p.default is not p.empty}
         for name, modifier in modifiers.MODIFIERS.items()}
  assert got == MODIFIERS


def test_defaults_of_further_estimators():
  for function, defaults in FURTHER.items():
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in defaults} == defaults, function.__name__
