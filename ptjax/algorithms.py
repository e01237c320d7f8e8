"""One table: what `--algo=NAME` means. The taxonomy on a page.

A row says which loss, which data door, which models beside the policy, and which advantage. The
launcher needs nothing else. Two rows may share a loss and differ in the data they learn from; rows
named `_oxrl` repeat that framework's departures, for its study (arXiv:2603.19335). A name may carry
modifiers: `grpo+tis+top_entropy`.
"""

import dataclasses
import importlib.util
import inspect
import json
import pathlib
from typing import Callable

from ptjax import config
from ptjax.losses import distillation
from ptjax.losses import hybrid
from ptjax.losses import imitation
from ptjax.losses import modifiers
from ptjax.losses import online_preference
from ptjax.losses import policy_gradient
from ptjax.losses import policy_gradient_sequence as sequence
from ptjax.losses import preference_anchor as anchor
from ptjax.losses import preference_gap as gap
from ptjax.losses import preference_link as link
from ptjax.losses import preference_score as score
from ptjax.losses import reward_model
from ptjax.losses import unpaired
from ptjax.pieces import advantage
from ptjax.pieces import divergence
from ptjax.pieces import following
from ptjax.pieces import returns

DOORS = ('prompts', 'demonstrations', 'preferences', 'ranked', 'unpaired', 'text', 'stepwise',
         'prompts+demonstrations')
ROLES = ('reference', 'critic', 'teacher', 'reward_model', 'judge')

# Arguments with a default that are arrays of the batch or state all the same, not hyperparameters.
OPTIONAL_ARRAYS = frozenset((
    'entropy', 'loss_mask', 'old_log_probs', 'reference_log_probs', 'off_policy', 'loss_state',
    'corrupted_log_probs', 'corrupted_reference_log_probs', 'outcome_rewards',
    'desirable_probabilities'))

# Coefficients that, above 0, need the reference model although the row does without.
_REFERENCE_COEFFICIENTS = ('kl_coefficient', 'reward_kl_coefficient')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
  """A row of the table."""
  name: str
  family: str
  loss: Callable  # `loss(log_probs, *, arrays, hyperparameters) -> (scalar, metrics)`
  door: str  # one of DOORS
  models: tuple[str, ...] = ()  # ROLES needed beside the policy, whatever the hyperparameters
  advantage: Callable | None = None  # `advantage(rewards, *, arrays, hyperparameters) -> array`
  # What the head makes of [..., V] logits for a loss that takes `divergence`:
  # `divergence(logits, teacher_logits, *, hyperparameters) -> [...]`, for any leading shape.
  divergence: Callable | None = None
  # How the reference moves: `follow(reference, params, step, *, hyperparameters) -> reference`.
  follow: Callable | None = None
  # Which batches of an offline row are the policy's own samples of the data's prompts:
  # `own_turn(key, *, hyperparameters) -> [] bool`.
  own_turn: Callable | None = None
  defaults: dict = dataclasses.field(default_factory=dict)  # where they differ from the loss's own
  source: str = ''  # arXiv id and short title
  tested_against: str = ''  # beside the closed form in NumPy, which every row has
  stages: tuple[str, ...] = ()  # rows that run one after the other in its place
  recipe: str = 'own samples'  # of training.recipes: who draws the completions, how rows lie
  data: str = ''  # what is special about its data, or about its frozen models

  def __post_init__(self):
    if self.door not in DOORS:
      raise ValueError(f'{self.name}: door={self.door!r}, expected one of {", ".join(DOORS)}')
    unknown = set(self.models) - set(ROLES)
    if unknown:
      raise ValueError(f'{self.name}: models {sorted(unknown)}, expected {", ".join(ROLES)}')
    if ('divergence' in inspect.signature(self.loss).parameters) != (self.divergence is not None):
      raise ValueError(f'{self.name}: the row names a divergence where, and only where, the loss '
                       'takes `divergence`; see ptjax.pieces.divergence')

  def hyperparameters(self):
    """Returns `{name: default}` of loss, advantage and the row's other functions, as it sets them.

    One that two of them share is one setting; the default is that of the first to name it.
    """
    found = {}
    for function in (self.loss, self.advantage, self.divergence, self.follow, self.own_turn):
      parameters = inspect.signature(function).parameters if function else {}
      for name, p in parameters.items():
        if p.default is not inspect.Parameter.empty and name not in OPTIONAL_ARRAYS:
          found.setdefault(name, p.default)
    return {**found, **self.defaults}

  def models_for(self, hyperparameters):
    """Returns the roles needed under these hyperparameters, `{name: value}`."""
    values = {**self.hyperparameters(), **hyperparameters}
    if any(values.get(name) for name in _REFERENCE_COEFFICIENTS):
      return tuple(role for role in ROLES if role in (*self.models, 'reference'))
    return self.models


def _online(name, loss, source, tested_against='', *, advantage=advantage.group_normalized,
            **row):
  return Algorithm(name=name, family='policy gradient', loss=loss, door='prompts', source=source,
                   tested_against=tested_against, advantage=advantage, **row)


def _offline(name, loss, source, tested_against='', *, family='imitation', door='demonstrations',
             **row):
  return Algorithm(name=name, family=family, loss=loss, door=door, source=source,
                   tested_against=tested_against, **row)


def _pairs(name, loss, source, tested_against='', *, models=('reference',), door='preferences',
           **row):
  return Algorithm(name=name, family='preference', loss=loss, door=door, models=models,
                   source=source, tested_against=tested_against, **row)


def _reward(name, loss, source, tested_against='', *, door='preferences', **row):
  return Algorithm(name=name, family='reward model', loss=loss, door=door, source=source,
                   tested_against=tested_against, **row)


def _hybrid(name, loss, source, **row):
  return Algorithm(name=name, family='hybrid', loss=loss, door='prompts+demonstrations',
                   source=source, recipe='own samples and demonstration', **row)


_HPT = '2509.04419, unified view of post-training'
_OXRL = '2603.19335, oxRL'

_ROWS = (
    # Imitation.
    _offline('sft', imitation.sft_loss, '2203.02155, InstructGPT stage 1', 'TRL SFT nll'),
    _offline('cpt', imitation.sft_loss, "2004.10964, Don't stop pretraining", door='text'),
    _offline('rft', imitation.rft_loss, '2308.01825, rejection sampling', door='prompts'),
    _offline('raft', imitation.sft_loss, '2304.06767, RAFT', door='prompts', recipe='best of group',
             data='best-of-n distillation: the best completion of each group'),
    _offline('dft', imitation.dft_loss, '2508.05629, dynamic fine-tuning', 'TRL SFT dft'),
    # Distillation.
    _offline('kd', distillation.kd_loss, '1503.02531, knowledge distillation',
             family='distillation', models=('teacher',), divergence=divergence.forward_kl),
    _offline('seqkd', imitation.sft_loss, '1606.07947, sequence-level KD', family='distillation',
             door='prompts', models=('teacher',), data='text generated by the teacher',
             recipe="teacher's samples"),
    _offline('gkd', distillation.gkd_loss, '2306.13649, generalized KD', 'TRL GKD',
             family='distillation', models=('teacher',), divergence=divergence.jensen_shannon,
             own_turn=distillation.student_turn, data='half of it sampled by the student'),
    _offline('opd', distillation.opd_loss, 'Thinking Machines 2025, on-policy distillation',
             family='distillation', door='prompts', models=('teacher',)),
    _offline('iw_opd', distillation.iw_opd_loss, '2606.22600, position bias of OPD', 'TRL IW-OPD',
             family='distillation', door='prompts', models=('teacher',)),
    _offline('minillm', distillation.minillm_loss, '2306.08543, MiniLLM', family='distillation',
             door='prompts', models=('teacher',), divergence=divergence.reverse_kl),
    _offline('sdft', distillation.sdft_loss, '2601.19897, self-distillation', 'TRL SDFT',
             family='distillation', door='prompts+demonstrations', models=('teacher',),
             divergence=divergence.top_k_jensen_shannon, recipe='shown the demonstration',
             data='the teacher is the policy shown the answer'),
    _offline('sdpo', distillation.sdpo_loss, '2601.20802, self-distillation PO', 'TRL SDPO',
             family='distillation', door='prompts', models=('teacher',),
             advantage=advantage.group_normalized, divergence=divergence.top_k_jensen_shannon,
             defaults={'top_k': 5}, recipe='shown a success',
             data='the teacher is the policy shown a success of the group'),
    _offline('ssd', imitation.sft_loss, '2604.01193, simple self-distillation',
             family='distillation', door='prompts', data="the model's own raw samples"),
    # Policy gradients, one ratio per token.
    _online('reinforce', policy_gradient.reinforce_loss, 'Williams 1992',
            advantage=advantage.group_centred),
    _online('reinforce_pp', policy_gradient.bnpo_loss, '2501.03262, REINFORCE++',
            advantage=returns.whitened_to_go),
    _online('reinforce_pp_baseline', policy_gradient.reinforce_pp_baseline_loss,
            '2501.03262, REINFORCE++', advantage=advantage.whitened_group_centred),
    _online('remax', policy_gradient.reinforce_loss, '2310.10505, ReMax',
            advantage=returns.minus_greedy, data='one extra greedy completion per prompt'),
    _online('gpg', policy_gradient.reinforce_loss, '2504.02546, group policy gradient',
            advantage=advantage.informative_group_scaled),
    _online('opo', policy_gradient.reinforce_loss, '2505.23585, optimal reward baseline',
            advantage=advantage.optimal_length_baseline),
    _online('ppo', policy_gradient.ppo_loss, '1707.06347, PPO', advantage=returns.whitened_gae,
            models=('critic',)),
    _online('ppo_dual_clip', policy_gradient.ppo_dual_clip_loss, '1912.09729, dual clip',
            advantage=returns.whitened_gae, models=('critic',)),
    _online('grpo', policy_gradient.grpo_loss, '2402.03300, DeepSeekMath', 'TRL grpo'),
    _online('dr_grpo', policy_gradient.dr_grpo_loss, '2503.20783, understanding R1-Zero',
            'TRL dr_grpo', advantage=advantage.group_centred),
    _online('bnpo', policy_gradient.bnpo_loss, 'TRL, loss_type=bnpo', 'TRL bnpo'),
    _online('dapo', policy_gradient.dapo_loss, '2503.14476, DAPO', 'TRL dapo',
            recipe='dynamic samples',
            data='groups of equal rewards resampled; overlong completions penalised'),
    _online('sgrpo', policy_gradient.sgrpo_loss, _OXRL, 'TRL bnpo', defaults={'epsilon': 1e-8}),
    _online('sgrpo_oxrl', policy_gradient.sgrpo_loss, _OXRL,
            advantage=advantage.last_token_normalized),
    _online('rlhf', policy_gradient.sgrpo_loss, '2203.02155, InstructGPT',
            models=('reference', 'reward_model'), defaults={'kl_coefficient': 0.04}),
    _online('rlaif', policy_gradient.sgrpo_loss, '2309.00267, RLAIF',
            models=('reference', 'judge'), defaults={'kl_coefficient': 0.04}),
    _online('gdpo', policy_gradient.grpo_loss, '2601.05242, GDPO', 'TRL normalize_then_sum',
            advantage=advantage.component_normalized),
    _online('grpo_process', policy_gradient.grpo_loss, '2402.03300, DeepSeekMath',
            advantage=advantage.step_normalized, data='rewards of steps: --reward=process:DIR'),
    _online('pass_at_k', policy_gradient.grpo_loss, '2503.19595, pass@k optimisation',
            advantage=advantage.pass_at_k),
    _online('cispo', policy_gradient.cispo_loss, '2506.13585, MiniMax-M1', 'TRL cispo'),
    _online('cispo_oxrl', policy_gradient.cispo_oxrl_loss, _OXRL, defaults={'epsilon': 1e-8}),
    _online('sapo', policy_gradient.sapo_loss, '2511.20347, soft adaptive PO', 'TRL sapo'),
    _online('clip_cov', policy_gradient.clip_cov_loss, '2505.22617, entropy mechanism'),
    _online('kl_cov', policy_gradient.kl_cov_loss, '2505.22617, entropy mechanism'),
    # Policy gradients, one ratio or residual per sequence.
    _online('rloo', sequence.rloo_loss, '2402.14740, Back to basics', 'TRL RLOO',
            advantage=advantage.leave_one_out_with_kl),
    _online('gspo', sequence.gspo_loss, '2507.18071, GSPO', 'TRL sequence level'),
    _online('gspo_token', sequence.gspo_token_loss, '2507.18071, GSPO', 'TRL sequence level'),
    _online('luspo', sequence.luspo_loss, '2602.05261, length-unbiased', 'TRL luspo'),
    _online('vespo', sequence.vespo_loss, '2602.10693, variational soft PO', 'TRL vespo'),
    _online('gmpo', sequence.gmpo_loss, '2507.20673, geometric mean', 'TRL GMPO'),
    _online('a_star_po', sequence.a_star_po_loss, '2505.20686, A*-PO', 'TRL A2PO',
            models=('reference',), advantage=advantage.minus_optimal_value,
            data='optimal values first estimated from samples of the reference'),
    _online('rebel', sequence.rebel_loss, '2404.16767, REBEL', advantage=None,
            recipe='two by two', data='pairs of completions of a prompt'),
    _online('nash_md', sequence.nash_md_loss, '2312.00886, Nash learning',
            models=('reference', 'judge'), advantage=advantage.win_margin,
            recipe='against a mixture', data='judged against samples of a mixture with the reference'),
    # Preferences on the policy's own samples.
    _pairs('online_dpo', link.dpo_loss, '2402.04792, online AI feedback', 'TRL DPO sigmoid',
           door='prompts', models=('reference', 'judge'), recipe='best against worst',
           data='best against worst of a group'),
    _pairs('xpo', online_preference.xpo_loss, '2405.21046, exploratory PO', door='prompts',
           models=('reference', 'judge'), recipe='against the reference',
           data="the policy's sample against the reference's"),
    _pairs('spin', link.dpo_loss, '2401.01335, self-play fine-tuning', 'TRL DPO sigmoid',
           door='prompts+demonstrations', recipe='demonstration against opponent',
           data="the previous iterate's sample is rejected"),
    # Preferences: the link differs from DPO.
    _pairs('dpo', link.dpo_loss, '2305.18290, DPO', 'TRL DPO sigmoid'),
    _pairs('cdpo', link.cdpo_loss, 'Mitchell 2023, noisy preferences', 'TRL DPO label_smoothing'),
    _pairs('robust_dpo', link.robust_dpo_loss, '2403.00409, provably robust DPO', 'TRL DPO robust'),
    _pairs('robust_dpo_oxrl', link.robust_dpo_oxrl_loss, _OXRL),
    _pairs('hinge', link.hinge_loss, '2309.06657, RSO', 'TRL DPO hinge'),
    _pairs('exo', link.exo_loss, '2402.00856, EXO', 'TRL DPO exo_pair'),
    _pairs('discopop', link.discopop_loss, '2406.08414, DiscoPOP', 'TRL DPO discopop'),
    _pairs('gpo', link.gpo_loss, '2402.05749, generalized PO'),
    _pairs('focalpo', link.focalpo_loss, '2501.06645, FocalPO'),
    _pairs('focalpo_oxrl', link.focalpo_oxrl_loss, _OXRL),
    _pairs('odpo', link.odpo_loss, '2402.10571, DPO with an offset',
           models=('reference', 'reward_model')),
    _pairs('odpo_oxrl', link.odpo_oxrl_loss, _OXRL),
    # Preferences: the score differs.
    _pairs('ipo', score.ipo_loss, '2310.12036, IPO', 'TRL DPO ipo'),
    _pairs('ipo_oxrl', score.ipo_oxrl_loss, _OXRL),
    _pairs('sigmoid_norm', score.sigmoid_norm_loss, '2411.15124, Tulu 3', 'TRL DPO sigmoid_norm'),
    _pairs('simpo', score.simpo_loss, '2405.14734, SimPO', 'TRL CPO simpo', models=()),
    _pairs('simpo_oxrl', score.simpo_oxrl_loss, _OXRL, models=()),
    _pairs('alphapo', score.alphapo_loss, '2501.03884, AlphaPO', 'TRL CPO alpha', models=()),
    _pairs('alphapo_oxrl', score.alphapo_oxrl_loss, _OXRL, models=()),
    _pairs('cpo', score.cpo_loss, '2401.08417, CPO', 'TRL CPO sigmoid', models=()),
    _pairs('cposimpo', score.cposimpo_loss, 'fe1ixxu/CPO_SIMPO', 'TRL CPO simpo', models=()),
    _pairs('orpo', score.orpo_loss, '2403.07691, ORPO', 'TRL ORPO', models=()),
    _pairs('slic_hf', score.slic_hf_loss, '2305.10425, SLiC-HF', models=()),
    _pairs('sampo', score.sampo_loss, '2406.10957, SamPO'),
    _pairs('ld_dpo', score.ld_dpo_loss, '2409.06411, LD-DPO', 'TRL DPO ld_alpha'),
    _pairs('rdpo', score.rdpo_loss, '2403.19159, length from quality'),
    _pairs('rdpo_oxrl', score.rdpo_oxrl_loss, _OXRL),
    _pairs('hdpo', score.hdpo_loss, '2411.07595, entropy-controllable DPO'),
    _pairs('dposhift', score.dposhift_loss, '2502.07599, DPO-Shift'),
    _pairs('fdpo', score.fdpo_loss, '2309.16240, f-DPO', 'TRL DPO f_divergence_type'),
    _pairs('chipo', score.chipo_loss, '2407.13399, chi-squared PO'),
    _pairs('spo', score.spo_loss, 'EMNLP Findings 2025.300, SPO', models=()),
    # Preferences: the gap differs.
    _pairs('dpop', gap.dpop_loss, '2402.13228, Smaug'),
    _pairs('minor_dpo', gap.minor_dpo_loss, '2408.09834, Minor DPO'),
    _pairs('bpo', gap.bpo_loss, '2506.03557, BPO'),
    _pairs('aot', gap.aot_loss, '2406.05882, alignment by OT', 'TRL DPO aot'),
    _pairs('aot_unpaired', gap.aot_unpaired_loss, '2406.05882, alignment by OT',
           'TRL DPO aot_unpaired'),
    _pairs('betadpo', gap.betadpo_loss, '2407.08639, dynamic beta'),
    _pairs('betadpo_oxrl', gap.betadpo_oxrl_loss, _OXRL),
    _pairs('alpha_dpo', gap.alpha_dpo_loss, '2410.10148, AlphaDPO'),
    _pairs('wpo', gap.wpo_loss, '2406.11827, WPO', 'TRL DPO use_weighting'),
    _pairs('step_dpo', link.dpo_loss, '2406.18629, Step-DPO', 'TRL DPO sigmoid',
           defaults={'beta': 0.5}, data='pairs of next steps after a correct prefix'),
    _pairs('tr_dpo', link.dpo_loss, '2404.09656, learn your reference', 'TRL DPO sigmoid',
           follow=following.synchronised, data='the reference follows the policy'),
    # Preferences: the aggregate or the anchor differs.
    _pairs('drdpo', anchor.drdpo_loss, '2407.07880, Dr. DPO'),
    _pairs('sppo', anchor.sppo_loss, '2405.00675, SPPO', 'TRL DPO sppo_hard'),
    _pairs('sppo_soft', anchor.sppo_soft_loss, '2405.00675, SPPO', models=('reference', 'judge')),
    _pairs('nca', anchor.nca_loss, '2402.05369, noise contrastive', 'TRL DPO nca_pair'),
    _pairs('caldpo', anchor.caldpo_loss, '2412.14516, Cal-DPO'),
    _pairs('apo_zero', anchor.apo_zero_loss, '2408.06266, APO', 'TRL DPO apo_zero'),
    _pairs('apo_down', anchor.apo_down_loss, '2408.06266, APO', 'TRL DPO apo_down'),
    _pairs('c2dpo', anchor.c2dpo_loss, '2502.17507, C-3DPO'),
    _pairs('dpnll', anchor.dpnll_loss, '2404.19733, iterative reasoning PO'),
    _pairs('rpo', anchor.rpo_loss, '2405.16436, RPO', 'TRL DPO sigmoid+sft'),
    _pairs('mpo', anchor.mpo_loss, '2411.10442, mixed PO'),
    _pairs('tpo', anchor.tpo_loss, '2405.16681, triple PO', models=(), data='and demonstrations'),
    _pairs('tpo_l', anchor.tpo_l_loss, '2405.16681, triple PO', models=(),
           data='and demonstrations'),
    _pairs('mdpo', anchor.mdpo_loss, '2406.11839, mDPO'),
    _pairs('bco_pair', unpaired.bco_pair_loss, '2404.04656, BCO', 'TRL DPO bco_pair'),
    _pairs('kto_oxrl', unpaired.kto_oxrl_loss, _OXRL),
    # Responses with a label.
    _pairs('kto', unpaired.kto_loss, '2402.01306, KTO', 'TRL KTO', door='unpaired'),
    _pairs('apo_zero_unpaired', unpaired.apo_zero_unpaired_loss, '2408.06266, APO', 'TRL KTO',
           door='unpaired'),
    _pairs('bco', unpaired.bco_loss, '2404.04656, BCO', door='unpaired'),
    # Demonstrations and rollouts together.
    _hybrid('hpt', hybrid.hpt_loss, _HPT, advantage=hybrid.gate),
    _hybrid('hpt_off', hybrid.hpt_loss, _HPT, advantage=hybrid.gate,
            defaults={'threshold': -1.0, 'off_policy_threshold': 0.0}),
    _hybrid('hpt_mix', hybrid.hpt_loss, _HPT, advantage=hybrid.gate,
            defaults={'threshold': 0.0, 'off_policy_threshold': 0.25}),
    _hybrid('luffy', hybrid.luffy_loss, '2504.14945, LUFFY', advantage=advantage.group_centred),
    _hybrid('srft', hybrid.srft_loss, '2506.19767, SRFT', advantage=advantage.group_centred),
    _hybrid('sft_then_grpo', policy_gradient.dr_grpo_loss, _HPT, tested_against='TRL dr_grpo',
            advantage=advantage.group_centred, stages=('sft', 'dr_grpo'),
            data='sft first, then dr_grpo from its checkpoint'),
    # Reward models, which train a head and no policy.
    _reward('reward_bt', reward_model.reward_bt_loss, '2203.02155, Bradley-Terry', 'TRL Reward'),
    _reward('reward_margin', reward_model.reward_margin_loss, '2307.09288, Llama 2', 'TRL Reward'),
    _reward('reward_centred', reward_model.reward_centred_loss, '2312.09244, helping or herding',
            'TRL Reward'),
    _reward('reward_kwise', reward_model.reward_kwise_loss, '2203.02155, InstructGPT',
            door='ranked'),
    _reward('orm', reward_model.orm_loss, '2110.14168, outcome reward model', door='unpaired'),
    _reward('prm', reward_model.prm_loss, '2305.20050, process reward model', door='stepwise'),
    _reward('math_shepherd', reward_model.prm_loss, '2312.08935, Math-Shepherd', door='stepwise',
            data='labelled by the rollouts that succeed from a step: scripts/make_step_labels.py'),
    _reward('preference_model', reward_model.preference_model_loss, '2312.00886, pair judge',
            data='both completions one behind the other, in both orders'),
)

TABLE = {row.name: row for row in _ROWS}


def names():
  """Returns the names in table order."""
  return tuple(TABLE)


def get(name):
  """Returns the row of `name`, or of a user's own `path/to/file.py:function`.

  Either may be followed by modifiers: `grpo+tis`.

  Raises:
    UserError: no such name (near ones are listed), file, function or modifier.
  """
  path, separator, rest = name.rpartition('.py:')
  base, *added = rest.split('+')
  if separator:
    row = _from_file(f'{path}.py:{base}')
  elif base in TABLE:
    row = TABLE[base]
  else:
    raise config.UserError(f'algo {base!r} is unknown{config.near_names(base, TABLE)}')
  for modifier in added:
    row = _modified(row, modifier)
  return row


def _modified(row, modifier):
  if modifier not in modifiers.MODIFIERS:
    raise config.UserError(
        f'modifier {modifier!r} is unknown{config.near_names(modifier, modifiers.MODIFIERS)}')
  if not {'advantages', 'loss_mask'} <= set(inspect.signature(row.loss).parameters):
    raise config.UserError(
        f'algo {row.name!r} takes no advantages, so {modifier!r} has nothing to modify')
  return dataclasses.replace(
      row, name=f'{row.name}+{modifier}', loss=modifiers.MODIFIERS[modifier](row.loss))


def from_loss(name, loss):
  """Makes a row of a plain loss function, reading what it needs off its argument names.

  A loss that takes `divergence` gets the Jensen-Shannon divergence, which at `interpolation` 0 and
  1 is either KL; write an `Algorithm` for another.
  """
  arguments = inspect.signature(loss).parameters
  online = 'advantages' in arguments
  paired = 'pair' in arguments
  required = {n for n, p in arguments.items() if p.default is inspect.Parameter.empty}
  needs = {'reference': paired or 'reference_log_probs' in required,
           'critic': 'values' in required,
           'teacher': 'divergence' in arguments or 'teacher_log_probs' in required}
  return Algorithm(
      name=name, family='custom', loss=loss,
      door='prompts' if online else 'preferences' if paired else 'demonstrations',
      models=tuple(role for role in ROLES if needs.get(role)),
      advantage=advantage.group_normalized if online else None,
      divergence=divergence.jensen_shannon if 'divergence' in arguments else None, source=name)


def _from_file(name):
  path, _, attribute = name.rpartition(':')
  if not pathlib.Path(path).is_file():
    raise config.UserError(f'algo {name!r}: no file {path}; expected path/to/file.py:function')
  spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise config.UserError(
        f'algo {name!r}: {path} does not load: {type(error).__name__}: {error}') from error
  if not hasattr(module, attribute):
    public = [key for key, value in vars(module).items() if callable(value) and key[0] != '_']
    raise config.UserError(
        f'algo {name!r}: {path} has no {attribute!r}{config.near_names(attribute, public)}')
  found = getattr(module, attribute)
  if isinstance(found, Algorithm):
    return found
  if not callable(found):
    raise config.UserError(
        f'algo {name!r}: expected a loss function or an Algorithm, got {type(found).__name__}')
  return from_loss(name, found)


def table_json():
  """Returns the table as JSON, one object per row."""
  return json.dumps([_as_dict(row) for row in TABLE.values()], indent=2)


def _as_dict(row):
  function_name = lambda f: None if f is None else f'{f.__module__}.{f.__name__}'
  return {
      'name': row.name, 'family': row.family, 'door': row.door, 'models': list(row.models),
      'loss': function_name(row.loss), 'advantage': function_name(row.advantage),
      'divergence': function_name(row.divergence),
      'hyperparameters': row.hyperparameters(), 'source': _title(row),
      'tested_against': row.tested_against, 'data': row.data}


def _title(row):
  return f'arXiv:{row.source}' if row.source[:4].isdigit() else row.source


def table_text():
  """Returns the table for a terminal, aligned columns."""
  header = ('name', 'family', 'data', 'models', 'source')
  lines = [header] + [
      (row.name, row.family, row.door, ', '.join(row.models) or '-', _title(row))
      for row in TABLE.values()]
  widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
  text = '\n'.join(
      '  '.join([cell.ljust(width) for cell, width in zip(line, widths)] + [line[-1]])
      for line in lines)
  return f'{text}\n\nmodifiers, as in grpo+tis: {", ".join(modifiers.MODIFIERS)}'
