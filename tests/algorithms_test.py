"""The table: every row complete and proved, looked up by name, file or modifier, and light."""

import functools
import inspect
import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from ptjax import algorithm_table
from ptjax import algorithms
from ptjax import config
from ptjax.losses import distillation
from ptjax.losses import modifiers
from ptjax.losses import policy_gradient
from ptjax.pieces import divergence

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE / 'losses'), str(HERE / 'pieces')]
import advantage_test
import divergence_test
import hybrid_test
import online_preference_test
import policy_gradient_cases
import policy_gradient_test
import preference_cases
import preference_identities_test
import preference_test
import returns_test
import reward_model_test
import unpaired_test

ROWS = list(algorithms.TABLE.values())
every_row = pytest.mark.parametrize('row', ROWS, ids=[row.name for row in ROWS])

# Section 3 of the specification: the 51 names of arXiv:2603.19335, and what lies beyond.
THE_51 = '''sgrpo gspo cispo ppo rlhf rlaif sft dpo orpo kto cpt kd reward_bt online_dpo rft spin
  ipo simpo cpo alphapo rdpo cdpo spo dpnll minor_dpo c2dpo alpha_dpo aot_unpaired apo_zero bco
  betadpo bpo caldpo chipo cposimpo discopop dpop dposhift drdpo exo fdpo focalpo gpo hdpo hinge
  nca odpo robust_dpo sampo sppo wpo'''.split()
EXTRAS = '''dft raft seqkd gkd opd iw_opd minillm sdft sdpo ssd reinforce reinforce_pp
  reinforce_pp_baseline rloo ppo_dual_clip grpo dr_grpo bnpo dapo grpo_process gspo_token sapo
  luspo vespo gmpo remax gpg opo clip_cov kl_cov pass_at_k a_star_po rebel nash_md xpo gdpo
  sigmoid_norm slic_hf ld_dpo step_dpo tr_dpo aot sppo_soft apo_down rpo mpo tpo mdpo bco_pair
  tpo_l apo_zero_unpaired hpt hpt_soft hpt_off hpt_mix luffy srft sft_then_grpo reward_margin
  reward_centred reward_kwise orm prm preference_model math_shepherd kto_oxrl ipo_oxrl simpo_oxrl
  alphapo_oxrl rdpo_oxrl robust_dpo_oxrl focalpo_oxrl odpo_oxrl betadpo_oxrl cispo_oxrl
  sgrpo_oxrl'''.split()


def test_the_table_holds_every_name_of_the_specification():
  assert len(THE_51) == 51
  assert set(THE_51 + EXTRAS) == set(algorithms.TABLE)
  assert {'tis', 'mis', 'opsm', 'top_entropy', 'adaptive_entropy'} <= set(modifiers.MODIFIERS)
  assert len(algorithms.names()) == len(ROWS) == len({row.name for row in ROWS})


# Proof. A new row fails here until its loss and its advantage are held against a closed form.

CLOSED_FORMS = (
    policy_gradient_test.test_value_and_gradient_match_the_closed_form,
    preference_test.test_value_and_gradient_match_the_closed_form,
    preference_identities_test.test_sampo_draws_the_same_positions_for_policy_and_reference,
    online_preference_test.test_xpo_is_dpo_and_pushes_the_references_sample_down,
    unpaired_test.test_value_and_gradient_match_the_closed_form,
    reward_model_test.test_pair_losses_match_the_closed_form,
    reward_model_test.test_kwise_averages_the_ordered_pairs_of_each_prompt,
    reward_model_test.test_binary_losses_match_the_closed_form,
    reward_model_test.test_prm_is_cross_entropy_at_the_separators)
ADVANTAGES_BY_HAND = (
    advantage_test.test_against_loops,
    advantage_test.test_components_are_normalised_before_they_are_summed,
    advantage_test.test_rloo_takes_the_whole_kl_off_the_reward,
    advantage_test.test_last_token_alone_gets_the_oxrl_advantage,
    advantage_test.test_whitened_group_centred_is_whitened_over_tokens,
    advantage_test.test_simple_estimates,
    advantage_test.test_step_rewards_by_loops,
    returns_test.test_ppo_advantages_reach_back_to_the_first_token,
    returns_test.test_reinforce_pp_is_the_whitened_return_to_go,
    returns_test.test_remax_subtracts_the_greedy_completions_reward,
    hybrid_test.test_gate, hybrid_test.test_gate_advantages, hybrid_test.test_soft_gate_by_hand)
DIVERGENCES_BY_HAND = (divergence_test.test_exact_divergences, CLOSED_FORMS[0])


@functools.lru_cache(None)
def held_by(tests):
  """The functions of the library that tests run: from their tables, and as their code names them.

  Code is what Python compiled, without comments and docstrings.
  """
  return {function for test in tests for function in _named_by(test)}


def _named_by(test):
  tables = [mark.args[1] for mark in getattr(test, 'pytestmark', ()) if mark.name == 'parametrize']
  names = set(_names(test.__code__))
  tables += [thing for name, thing in test.__globals__.items()
             if name in names and isinstance(thing, (list, tuple, dict))]
  helpers = [thing for name, thing in test.__globals__.items()
             if name in names and inspect.isfunction(thing) and thing.__module__ == test.__module__]
  for helper in helpers:
    names |= set(_names(helper.__code__))
  rooms = [thing for thing in test.__globals__.values()
           if inspect.ismodule(thing) and thing.__name__.startswith('ptjax.')]
  for thing in (*_leaves(tables), *names):
    if callable(thing):
      yield thing
    elif isinstance(thing, str):
      yield from (getattr(room, thing) for room in rooms if inspect.isfunction(
          getattr(room, thing, None)))


def _names(code):
  """Every name that a function's code reads, inner functions included."""
  yield from code.co_names
  for constant in code.co_consts:
    if inspect.iscode(constant):
      yield from _names(constant)


def _leaves(thing):
  """What a table holds, whatever it is made of."""
  if isinstance(thing, (policy_gradient_cases.Case, preference_cases.Case)):
    yield from (thing.loss, getattr(thing, 'divergence', None))
  elif isinstance(thing, (list, tuple, dict, range)):
    for part in thing:
      yield from _leaves(part)
  else:
    yield thing


def test_what_a_comment_names_is_not_held():
  def test():
    """Says nothing of policy_gradient.grpo_loss."""
    # Nor of policy_gradient.grpo_loss here.
    policy_gradient.cispo_loss  # pylint: disable=pointless-statement
  assert held_by((test,)) == {policy_gradient.cispo_loss}


@every_row
def test_every_loss_has_a_closed_form(row):
  assert row.loss in held_by(CLOSED_FORMS), (
      f'{row.name}: no closed form for {row.loss.__name__}; add a case to tests/losses/*_cases.py '
      'with a reference, or list a test of it in CLOSED_FORMS')


@every_row
def test_every_advantage_and_divergence_is_worked_out_by_hand(row):
  for function, tests in ((row.advantage, ADVANTAGES_BY_HAND),
                          (row.divergence, DIVERGENCES_BY_HAND)):
    assert function is None or function in held_by(tests), f'{row.name}: {function.__name__}'


@every_row
def test_row_is_complete_and_in_style(row):
  assert row.source and row.family
  assert row.loss.__doc__ and (row.advantage is None or row.advantage.__doc__)
  first, *others = inspect.signature(row.loss).parameters.values()
  assert first.kind is first.POSITIONAL_OR_KEYWORD and first.default is first.empty
  for parameter in others:
    if parameter.name in ('chosen_rewards', 'rejected_rewards'):
      continue  # reward models score two sides, both positional
    assert parameter.kind is parameter.KEYWORD_ONLY, parameter.name
  assert set(row.defaults) <= set(row.hyperparameters()), 'a default that nothing reads'
  for name, value in row.hyperparameters().items():
    assert isinstance(value, (int, float, str, type(None))), f'{name} is no hyperparameter'


@every_row
def test_row_asks_for_the_models_its_arrays_come_from(row):
  """A loss that cannot do without an array names the role that produces it."""
  arguments = inspect.signature(row.loss).parameters
  needs = lambda name: name in arguments and arguments[name].default is inspect.Parameter.empty
  for array, role in (('reference_log_probs', 'reference'), ('divergence', 'teacher'),
                      ('teacher_log_probs', 'teacher'), ('values', 'critic')):
    if needs(array):
      assert role in row.models, f'{row.name} needs {array}'
  if row.door == 'preferences' and row.family == 'preference':
    case = next((c for c in preference_cases.PAIR if c.loss is row.loss), None)
    if case:
      assert ('reference' in row.models) == case.needs_reference


def test_models_follow_the_hyperparameters():
  grpo = algorithms.get('grpo')
  assert grpo.models_for({}) == ()
  assert grpo.models_for({'kl_coefficient': 0.04}) == ('reference',)
  assert algorithms.get('rloo').models_for({}) == ('reference',)
  assert algorithms.get('rloo').models_for({'reward_kl_coefficient': 0.0}) == ()
  assert algorithms.get('ppo').models_for({}) == ('reference', 'critic')
  assert algorithms.get('kl_cov').models_for({}) == ()
  assert algorithms.get('grpo+corrected_kl').models_for({}) == ('reference',)


# Looking up.

def test_unknown_names_list_the_near_ones():
  with pytest.raises(config.UserError, match="algo 'grop' is unknown; did you mean .*grpo"):
    algorithms.get('grop')
  with pytest.raises(config.UserError, match="modifier 'tiss' is unknown; did you mean .*tis"):
    algorithms.get('grpo+tiss')
  with pytest.raises(config.UserError, match="'dpo' takes no advantages"):
    algorithms.get('dpo+tis')


def test_modified_row():
  row = algorithms.get('dapo+tis+top_entropy')
  assert row.name == 'dapo+tis+top_entropy' and row.advantage is algorithms.get('dapo').advantage
  assert row.hyperparameters()['max_rollout_ratio'] == 2.0
  assert {'rollout_log_probs', 'entropy'} <= set(inspect.signature(row.loss).parameters)


def test_advantages_by_name():
  row = algorithms.get('grpo+batch_normalized+reward_kl+adaptive_reward_kl')
  assert row.advantage.__name__ == 'batch_normalized+reward_kl'
  assert row.models_for({}) == ('reference',)
  assert {'epsilon', 'reward_kl_coefficient', 'kl_target'} <= set(row.hyperparameters())
  alone = algorithms.get('grpo+adaptive_reward_kl')
  assert alone.advantage.__name__ == 'group_normalized+reward_kl'
  assert algorithms.get('dapo+leave_one_out').advantage is algorithms.ADVANTAGES['leave_one_out']
  for name, message in (
      ('ppo+group_centred', 'its advantages are its own'),
      ('hpt+group_centred', 'its advantages are its own'),
      ('rloo+reward_kl', 'set loss.reward_kl_coefficient'),
      ('gdpo+reward_kl', 'no whole from which the KL could be taken'),
      ('gdpo+adaptive_reward_kl', 'no whole from which the KL could be taken'),
      ('grpo+adaptive_kl+adaptive_entropy', 'two modifiers that each carry a running statistic')):
    with pytest.raises(config.UserError, match=message):
      algorithms.get(name)


USER_FILE = '''
from ptjax import algorithms
from ptjax.losses import policy_gradient
from ptjax.pieces import likelihood, reduction

def my_loss(log_probs, *, advantages, loss_mask, scale=2.0):
  return likelihood.weighted_loss(
      log_probs, loss_mask, advantages=scale * advantages, reduce=reduction.token_mean)

def my_pairs(pair, *, beta=0.1):
  return 0.0, {}

def my_text(log_probs, *, loss_mask, reference_log_probs):
  return 0.0, {}

def my_student(log_probs, *, divergence, loss_mask, temperature=2.0):
  return reduction.token_mean(divergence, loss_mask), {}

def my_critic(log_probs, *, values, advantages, loss_mask):
  return 0.0, {}

MY_ROW = algorithms.Algorithm(
    name='mine', family='custom', loss=policy_gradient.cispo_loss, door='prompts',
    defaults={'max_ratio': 3.0})
NUMBER = 3
'''


def test_users_own_algorithm(tmp_path):
  path = tmp_path / 'my_file.py'
  path.write_text(USER_FILE)
  row = algorithms.get(f'{path}:my_loss')
  assert row.door == 'prompts' and row.advantage is not None and row.models == ()
  assert row.hyperparameters() == {'scale': 2.0, 'epsilon': 1e-4}
  loss, _ = row.loss(-jnp.ones((2, 3)), advantages=jnp.array([1.0, 0.0]),
                     loss_mask=jnp.ones((2, 3), bool))
  np.testing.assert_allclose(loss, 1.0, rtol=1e-6)
  pairs = algorithms.get(f'{path}:my_pairs')
  assert (pairs.door, pairs.models, pairs.advantage) == ('preferences', ('reference',), None)
  text = algorithms.get(f'{path}:my_text')
  assert (text.door, text.models) == ('demonstrations', ('reference',))
  student = algorithms.get(f'{path}:my_student')
  assert (student.models, student.divergence) == (('teacher',), divergence.jensen_shannon)
  assert student.hyperparameters() == {'temperature': 2.0, 'interpolation': 0.5}
  assert algorithms.get(f'{path}:my_critic').models == ('critic',)
  assert algorithms.get(f'{path}:MY_ROW').hyperparameters() == {'max_ratio': 3.0}
  assert algorithms.get(f'{path}:my_loss+tis').hyperparameters()['max_rollout_ratio'] == 2.0


def test_users_mistakes_are_named(tmp_path):
  path = tmp_path / 'my_file.py'
  path.write_text(USER_FILE)
  for name, message in ((f'{tmp_path}/other.py:f', 'no file .*other.py'),
                        (f'{path}:my_los', "has no 'my_los'; did you mean my_loss"),
                        (f'{path}:NUMBER', 'expected a loss function or an Algorithm, got int')):
    with pytest.raises(config.UserError, match=message):
      algorithms.get(name)
  broken = tmp_path / 'broken.py'
  broken.write_text('def f(:\n')
  with pytest.raises(config.UserError, match='broken.py.*SyntaxError'):
    algorithms.get(f'{broken}:f')


def test_row_rejects_what_no_launcher_knows():
  with pytest.raises(ValueError, match="door='window', expected one of prompts"):
    algorithms.Algorithm(name='x', family='x', loss=policy_gradient.grpo_loss, door='window')
  with pytest.raises(ValueError, match=r"models \['oracle'\]"):
    algorithms.Algorithm(name='x', family='x', loss=policy_gradient.grpo_loss, door='prompts',
                         models=('oracle',))
  for loss, measure in ((distillation.kd_loss, None),
                        (policy_gradient.grpo_loss, divergence.forward_kl)):
    with pytest.raises(ValueError, match='the row names a divergence where, and only where'):
      algorithms.Algorithm(name='x', family='x', loss=loss, door='text', divergence=measure)


# Printing.

def test_text_and_json_hold_every_row():
  text = algorithm_table.as_text().splitlines()
  assert text[0].split() == ['name', 'family', 'data', 'models', 'source']
  assert [line.split()[0] for line in text[1:1 + len(ROWS)]] == list(algorithms.names())
  assert max(map(len, text)) <= 160
  rows = json.loads(algorithm_table.as_json())
  assert [r['name'] for r in rows] == list(algorithms.names())
  grpo = next(r for r in rows if r['name'] == 'grpo')
  assert grpo['loss'] == 'ptjax.losses.policy_gradient.grpo_loss'
  assert grpo['hyperparameters']['clip_low'] == 0.2
  assert grpo['source'] == 'arXiv:2402.03300, DeepSeekMath' and grpo['divergence'] is None
  kd = next(r for r in rows if r['name'] == 'kd')
  assert kd['divergence'] == 'ptjax.pieces.divergence.forward_kl'


# Imports.

def test_the_loss_library_loads_with_jax_and_chex_alone():
  """Pieces, losses and the table in a fresh process: no module of any other package of ours."""
  code = ('import sys; from ptjax import algorithms, losses, pieces; '
          'print(*sorted({m.split(".")[0] for m in sys.modules}))')
  loaded = set(subprocess.run(
      [sys.executable, '-c', code], cwd=HERE.parent, check=True, capture_output=True, text=True,
      env={'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(HERE.parent)}).stdout.split())
  heavy = {'flax', 'optax', 'orbax', 'transformers', 'torch', 'datasets', 'tokenizers',
           'tensorboardX', 'matplotlib', 'trl'}
  assert not loaded & heavy
  assert {'jax', 'chex', 'numpy'} <= loaded


def test_pieces_and_losses_import_only_downhill():
  allowed = {'pieces': {'pieces'}, 'losses': {'pieces', 'losses'}}
  for room, rooms in allowed.items():
    for path in (HERE.parent / 'ptjax' / room).glob('*.py'):
      for line in path.read_text().splitlines():
        if line.startswith('from ptjax'):
          assert line.split()[1].split('.')[1] in rooms, f'{path.name}: {line}'
        elif line.startswith(('import ', 'from ')):
          package = line.split()[1].split('.')[0]
          assert package in {'jax', 'chex', 'numpy'} or package in sys.stdlib_module_names, (
              f'{path.name}: {line}')
