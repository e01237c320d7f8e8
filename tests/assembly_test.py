"""What a config is put together to, before anything runs."""

import dataclasses
import pathlib
import sys

import pytest

from ptjax import assembly
from ptjax import config as settings

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import job_runs


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return str(job_runs.export_model(tmp_path_factory.mktemp('assembly') / 'model'))


def config_of(model, *assignments, **values):
  config = settings.Config(model=model, dataset='arithmetic:max_operand=19', **values)
  for assignment in assignments:
    config = settings.override(config, assignment)
  return config


def load(config):
  return assembly.load_data(config, assembly.stage_plans(config), assembly.load_policy(config))


def test_a_folder_name_says_what_runs():
  config = settings.Config(algo='mine/losses.py:loss', model='models/Qwen2.5/', dataset='a b.jsonl')
  assert assembly.out_dir(config) == 'runs/losses.py_loss-Qwen2.5-a_b.jsonl-0'
  assert assembly.out_dir(dataclasses.replace(config, out_dir='x')) == 'x'


@pytest.mark.parametrize('overlong, words', [
    ('drop', 'dropped ('), ('truncate', ' truncated)')])
def test_overlong_prompts_are_counted_where_everybody_sees_it(model, caplog, overlong, words):
  # `3+5=` has five tokens, `13+5=` six.
  config = config_of(model, 'data.max_prompt_tokens=5', f'data.overlong={overlong}')
  with caplog.at_level('WARNING'):
    data = load(config)
  message, = (r.getMessage() for r in caplog.records if 'rows:' in r.getMessage())
  assert message.startswith('grpo: ') and words in message
  rows = int(message.split()[1])
  kept = len(data.prompts)
  assert (kept < rows) == (overlong == 'drop') and f'{rows} rows: {kept} kept' in message


def test_a_warm_start_is_a_stage_of_its_own(model):
  config = config_of(model, 'warm_start.steps=7', 'warm_start.learning_rate=0.5',
                     'optimizer.beta2=0.9', 'training.steps=3', 'loss.clip_high=0.3')
  first, second = assembly.stage_plans(config)
  assert (first.stage.name, first.stage.first_step, first.stage.steps) == ('sft', 0, 7)
  assert (second.stage.name, second.stage.first_step, second.stage.steps) == ('grpo', 7, 3)
  assert first.optimizer == dataclasses.replace(config.optimizer, learning_rate=0.5)
  assert first.hyperparameters == {} and second.hyperparameters == {'clip_high': 0.3}
  only, = assembly.stage_plans(settings.replace(config, {'algo': 'sft'}))
  assert only.stage.first_step == 0  # supervised training needs no supervised warm start


def test_own_held_out_rows_are_the_tasks_test_split(model):
  data = load(config_of(model, 'eval.limit=6'))
  assert data.evaluation.name == 'arithmetic' and len(data.evaluation.rows) == 6
  trained = {data.prompts.take([i]).prompts[0] for i in range(len(data.prompts))}
  assert not trained & {row['prompt'] for row in data.evaluation.rows}


def test_processes_start_together_or_not_at_all():
  assembly.start_processes(None, None, None)
  with pytest.raises(settings.UserError, match='go together'):
    assembly.start_processes('localhost:1', 2, None)
