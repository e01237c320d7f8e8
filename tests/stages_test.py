"""From a config to stages: their order, whose settings they have, and what they read."""

import dataclasses

import pytest

from ptjax import config as settings
from ptjax import overrides
from ptjax import stages


def config_of(*assignments, **values):
  config = settings.Config(**values)
  for assignment in assignments:
    config = overrides.override(config, assignment)
  return config


def plans_of(*assignments, **values):
  return stages.stage_plans(config_of(*assignments, **values))


def plan_of(*assignments, **values):
  plan, = plans_of(*assignments, **values)
  return plan


def loss_file(folder, text):
  path = folder / 'mine.py'
  path.write_text(text)
  return f'{path}:loss'


def test_stages_come_in_order_one_behind_the_other():
  plans = plans_of('training.steps=3', 'stages.dpo.training.steps=5', algo='sft, dpo,grpo')
  assert [(p.stage.name, p.stage.index, p.stage.first_step, p.stage.steps) for p in plans] == [
      ('sft', 0, 0, 3), ('dpo', 1, 3, 5), ('grpo', 2, 8, 3)]
  assert [p.online for p in plans] == [False, False, True]


def test_a_stage_has_its_own_settings_read_by_their_types():
  config = config_of(
      'training.batch_size=4', 'stages.dpo.training.steps=1e1', 'stages.dpo.dataset=pairs.jsonl',
      'stages.dpo.optimizer.max_grad_norm=none', 'stages.dpo.loss.beta=0.5',
      'stages.sft.data.packing=false', algo='sft,dpo', dataset='rows.jsonl')
  sft, dpo = stages.stage_plans(config)
  assert (dpo.config.training.steps, dpo.config.training.batch_size) == (10, 4)
  assert dpo.config.dataset == 'pairs.jsonl' and dpo.config.optimizer.max_grad_norm is None
  assert dpo.hyperparameters == {'beta': 0.5} and dpo.config.algo == 'dpo'
  assert dpo.config.data == config.data
  # The other stage is what the run says, but for its own.
  assert sft.config == dataclasses.replace(
      config, algo='sft', stages={}, data=dataclasses.replace(config.data, packing=False))
  assert sft.hyperparameters == {}


def test_a_hyperparameter_goes_to_the_stages_that_know_it():
  sft, dpo, kto = plans_of('loss.beta=0.3', 'stages.kto.loss.beta=0.4', algo='sft,dpo,kto')
  assert sft.hyperparameters == {}
  assert dpo.hyperparameters == {'beta': 0.3} and kto.hyperparameters == {'beta': 0.4}
  # One that none of them knows is not lost in silence, nor one given to a stage without it.
  for assignment in ('loss.betta=0.3', 'stages.sft.loss.beta=0.3'):
    with pytest.raises(settings.UserError, match='no such hyperparameter'):
      for plan in plans_of(assignment, algo='sft,dpo'):
        plan.bind()


@pytest.mark.parametrize('assignment, message', [
    ('stages.dop.training.steps=3', 'stages.dop: no stage of that name in --algo=sft,dpo; did you '
     'mean dpo'),
    ('stages.grpo.training.steps=3', 'no stage of that name'),
    ('stages.dpo.training.stesp=3', "unknown key 'stesp'; did you mean steps"),
    ('stages.dpo.trainings.steps=3', "unknown key 'trainings'"),
    ('stages.dpo.training.steps=many', "expected int, got 'many'"),
    ('stages.dpo.training.steps=0', 'must be positive'),
    ('stages.dpo.training=3', 'a section, not a setting'),
    ('stages.dpo=3', 'expected stages.<algo>.<setting>=value'),
    ('stages=3', 'expected stages.<algo>.<setting>=value'),
    *((f'stages.dpo.{path}', f'stages.dpo.{path.partition("=")[0]}: the same for all stages')
      for path in ('model=other', 'teacher=other', 'seed=1', 'out_dir=x', 'resume=never',
                   'mesh=fsdp=1', 'eval.limit=3', 'checkpoint.keep=3', 'log.samples=3',
                   'model_settings.dtype=bfloat16', 'reward=length', 'rewards.workers=1',
                   'warm_start.steps=1', 'algo=sft', 'device.preallocate=false')),
])
def test_settings_that_a_stage_cannot_have(assignment, message):
  with pytest.raises(settings.UserError) as raised:
    plans_of(assignment, algo='sft,dpo')
  assert message in str(raised.value)


@pytest.mark.parametrize('algo, message', [
    (' , ', '--algo is empty'), ('sft,dop', "'dop' is unknown; did you mean")])
def test_unknown_algorithms(algo, message):
  with pytest.raises(settings.UserError, match=message):
    plans_of(algo=algo)


def test_a_warm_start_is_a_stage_of_its_own():
  config = config_of('warm_start.steps=7', 'warm_start.learning_rate=0.5', 'optimizer.beta2=0.9',
                     'training.steps=3', 'loss.clip_high=0.3', dataset='arithmetic')
  first, second = stages.stage_plans(config)
  assert (first.stage.name, first.stage.first_step, first.stage.steps) == ('sft', 0, 7)
  assert (second.stage.name, second.stage.first_step, second.stage.steps) == ('grpo', 7, 3)
  assert first.config.optimizer == dataclasses.replace(config.optimizer, learning_rate=0.5)
  assert first.hyperparameters == {} and second.hyperparameters == {'clip_high': 0.3}
  assert first.config.dataset == 'arithmetic'
  # Of its own data set it reads everything, of the run's as much as the run does.
  limited = overrides.override(config, 'data.limit=5')
  assert stages.stage_plans(limited)[0].config.data.limit == 5
  other = overrides.override(limited, 'warm_start.dataset=rows.jsonl')
  assert stages.stage_plans(other)[0].config.dataset == 'rows.jsonl'
  assert stages.stage_plans(other)[0].config.data.limit is None


def test_supervised_training_needs_no_supervised_warm_start():
  for algo in ('sft', 'dpo,grpo'):
    plans = plans_of('warm_start.steps=7', algo=algo)
    assert [plan.stage.name for plan in plans] == algo.split(',')


def test_dr_grpo_divides_by_the_samplers_limit():
  plan = plan_of('rollout.max_completion_tokens=33', algo='dr_grpo')
  assert plan.hyperparameters == {'max_completion_tokens': 33}
  assert plan.bind().loss.keywords['max_completion_tokens'] == 33
  given = plan_of('loss.max_completion_tokens=9', algo='dr_grpo')
  assert given.hyperparameters == {'max_completion_tokens': 9}


def test_updates_and_temperature_are_those_of_rollouts():
  more = ('training.mini_batches=2', 'training.epochs=3', 'rollout.temperature=0.7')
  assert (plan_of(*more).updates_per_rollout, plan_of(*more).temperature) == (6, 0.7)
  offline = plan_of(*more, algo='sft')
  assert (offline.updates_per_rollout, offline.temperature) == (1, 1.0)


# What a stage reads.


@pytest.mark.parametrize('algo, packs', [
    ('sft', True), ('dft', True), ('kd', True), ('cpt', True),  # means over tokens
    ('gkd', False),  # samples now and then, which needs its prompts
    ('dpo', False), ('kto', False), ('prm', False), ('grpo', False)])
def test_only_means_over_tokens_are_packed(algo, packs):
  assert plan_of(algo=algo).packs == packs
  assert plan_of('data.packing=false', algo=algo).packs == (algo == 'cpt')


@pytest.mark.parametrize('algo, packs', [
    ('grpo', True), ('ppo', True), ('luffy', True), ('opd', True), ('dpo', True),
    ('sdpo', False),  # its teacher reads other prompts
    ('reward_bt', False), ('prm', False),  # heads that read whole rows
    ('sft', False), ('kd', False)])  # packed as examples already, or answered by the policy
def test_completions_share_rows_where_the_forward_pass_allows(algo, packs):
  assert plan_of(algo=algo).packs_completions == packs
  assert not plan_of('data.packing=false', algo=algo).packs_completions


def test_a_users_own_loss_may_look_at_rows_and_is_not_packed(tmp_path):
  name = loss_file(tmp_path, 'def loss(log_probs, *, loss_mask): return log_probs.sum(), {}')
  plan = plan_of(algo=name)
  assert plan.row.door == 'demonstrations' and not plan.packs


@pytest.mark.parametrize('algo, columns', [
    ('sft', ()), ('dpo', ()), ('kto', ()), ('prm', ()), ('wpo', ()), ('tpo', ()), ('kd', ()),
    ('reward_bt', ()), ('orm', ()), ('grpo', ()),
    ('odpo', ('chosen_scores', 'rejected_scores')), ('reward_margin', ('margins',)),
    ('sppo_soft', ('chosen_win_probabilities', 'rejected_win_probabilities'))])
def test_columns_a_loss_takes_from_the_data(algo, columns):
  assert stages.wanted_columns(plan_of(algo=algo)) == columns


def test_columns_of_a_users_own_loss(tmp_path):
  name = loss_file(tmp_path, 'def loss(log_probs, *, loss_mask, difficulty, power=1.0): pass')
  assert stages.wanted_columns(plan_of('loss.power=2', algo=name)) == ('difficulty',)


@pytest.mark.parametrize('algo, reads', [
    ('grpo', True), ('rft', True), ('rebel', True), ('online_dpo', True),
    ('ssd', False), ('seqkd', False), ('opd', False)])
def test_rewards_are_asked_for_only_where_something_reads_them(algo, reads):
  assert stages.reads_rewards(plan_of(algo=algo)) == reads


def test_an_array_that_no_rollout_has_is_named(tmp_path):
  stages.check_inputs(plan_of(algo='grpo'))
  name = loss_file(
      tmp_path, 'def loss(log_probs, *, advantages, loss_mask, surprise, scale=1.0): pass')
  with pytest.raises(settings.UserError, match='loss needs surprise, but from prompts') as raised:
    stages.check_inputs(plan_of('loss.scale=2.0', algo=name))
  assert 'a hyperparameter needs a default' in str(raised.value)
  # Offline the data may have it.
  offline = loss_file(tmp_path, 'def loss(log_probs, *, loss_mask, surprise): pass')
  stages.check_inputs(plan_of(algo=offline))
