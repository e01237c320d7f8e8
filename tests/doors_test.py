"""What a run reads: the door of each stage, rewards, and rows to evaluate on."""

import json
import pathlib
import sys

import numpy as np
import pytest

from ptjax import assembly
from ptjax import config as settings
from ptjax import doors
from ptjax import overrides
from ptjax import stages
from ptjax.data import offline
from ptjax.data import packing
from ptjax.data import prompts
from ptjax.data import streaming

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import job_runs

PAIRS = [{'prompt': f'{i}+1=', 'chosen': f'{i + 1}', 'rejected': f'{i + 20}'} for i in range(8)]
ROWS = [{'prompt': f'{i}+2=', 'completion': f'{i + 2}', 'label': i % 2 == 0} for i in range(6)]


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A folder with a model and some files."""
  root = tmp_path_factory.mktemp('doors')
  job_runs.export_model(root / 'model')
  steps = [{'prompt': '1+2=', 'completions': ['1+2', '3'], 'labels': [True, bool(i)]}
           for i in range(2)]
  for name, rows in (('pairs', PAIRS), ('rows', ROWS), ('held_pairs', PAIRS[:3]), ('steps', steps),
                     ('held_rows', ROWS[:2]), ('prompts', [{'prompt': '1+1='}])):
    (root / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return root


@pytest.fixture
def load(root):
  """Opens everything of a run; returns its Data and the model's tokenizer."""
  def call(dataset, *assignments, parts=1, **values):
    path = root / f'{dataset}.jsonl'
    config = settings.Config(model=str(root / 'model'),
                             dataset=str(path) if path.exists() else dataset, **values)
    for assignment in assignments:
      config = overrides.override(config, assignment)
    plans = stages.stage_plans(config)
    policies = assembly.load_policies(config, plans)
    data = doors.load_data(config, plans, policies['policy'], parts=parts)
    return data, policies['policy'].tokenizer
  return call


def texts(door, tokenizer):
  """(prompt, completion, ...) of every example, without end tokens."""
  examples = door.examples
  decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
  return [(decode(prompt), *map(decode, group))
          for prompt, group in zip(examples.prompts, examples.completions)]


@pytest.mark.parametrize('overlong, words', [
    ('drop', 'dropped ('), ('truncate', ' truncated)')])
def test_overlong_prompts_are_counted_where_everybody_sees_it(load, caplog, overlong, words):
  # `3+5=` has five tokens, `13+5=` six.
  with caplog.at_level('WARNING'):
    data, _ = load('arithmetic:max_operand=19', 'data.max_prompt_tokens=5',
                   f'data.overlong={overlong}')
  message, = (r.getMessage() for r in caplog.records if 'rows:' in r.getMessage())
  assert message.startswith('grpo: ') and words in message
  rows, kept = int(message.split()[1]), len(data.doors[0])
  assert (kept < rows) == (overlong == 'drop') and f'{rows} rows: {kept} kept' in message


# Doors.


def test_every_stage_has_the_door_of_its_own_rows(root, load):
  data, tokenizer = load('rows', f'stages.dpo.dataset={root}/pairs.jsonl',
                         'stages.sft.data.packing=false', algo='sft,dpo')
  assert set(data.doors) == {0, 1} and data.rewards is None and data.evaluation is None
  assert texts(data.doors[0], tokenizer) == [(r['prompt'], r['completion']) for r in ROWS]
  assert texts(data.doors[1], tokenizer) == [
      (r['prompt'], r['chosen'], r['rejected']) for r in PAIRS]


def test_of_pairs_the_chosen_is_imitated(load):
  data, tokenizer = load('pairs', algo='sft')
  assert texts(data.doors[0], tokenizer) == [(r['prompt'], r['chosen']) for r in PAIRS]


def test_packed_rows_hold_all_examples_and_split_over_the_devices(load):
  data, _ = load('rows', 'training.batch_size=6', 'training.micro_batches=2', parts=2, algo='sft')
  door = data.doors[0]
  assert isinstance(door, packing.PackedDoor)
  batch = door.batch(0)
  assert batch.tokens.shape[0] % 4 == 0
  # One batch is an epoch here: each answer is trained on, digits and end token.
  assert batch.loss_mask.sum() == sum(len(r['completion']) + 1 for r in ROWS)
  fixed, _ = load('rows', 'data.packed_tokens=40', algo='sft')
  assert fixed.doors[0].batch(0).prompt_tokens.shape[1] == 40
  loose, _ = load('rows', 'data.packing=false', algo='sft')
  assert isinstance(loose.doors[0], offline.OfflineDoor)


def test_a_batch_holds_so_many_tokens(load):
  asked = ['training.tokens_per_batch=100', 'data.packed_tokens=24']
  data, _ = load('rows', *asked, algo='sft')
  door = data.doors[0]
  assert door.batch(0).prompt_tokens.shape == (4, 24)  # 96 of 100
  assert load('rows', *asked, parts=3, algo='sft')[0].doors[0].batch(0).tokens.shape[0] == 3
  # Six examples of seven or eight tokens: three to a row, so two rows are the data set.
  assert door.steps_per_epoch == 1
  less, _ = load('rows', 'training.tokens_per_batch=24', 'data.packed_tokens=24', algo='sft')
  assert less.doors[0].steps_per_epoch == 2
  chain, _ = load('pairs', *(f'stages.sft.{each}' for each in asked), algo='sft,dpo')
  assert chain.doors[0].batch(0).tokens.shape[0] == 4
  for more in ({'algo': 'dpo'}, {'algo': 'sft,dpo'}):
    with pytest.raises(settings.UserError, match='tokens_per_batch=100: dpo does not train on '):
      load('pairs', *asked, **more)


@pytest.mark.parametrize('algo, dataset', [('sft', 'rows'), ('cpt', 'rows'), ('simpo', 'pairs'),
                                           ('prm', 'steps')])
def test_streamed_rows_are_those_held_in_memory(load, algo, dataset):
  asked = ['training.batch_size=2', 'data.max_prompt_tokens=8', 'rollout.max_completion_tokens=8']
  whole = load(dataset, *asked, algo=algo)[0].doors[0]
  data, _ = load(dataset, *asked, 'data.streaming=true', 'data.window_rows=2', algo=algo)
  door = data.doors[0]
  assert isinstance(door, streaming.StreamingDoor) and door.steps_per_window == 1
  drawn = [row for step in range(door.steps_per_epoch) for row in door.rows(step)]
  assert sorted(drawn) == sorted(whole.examples.row_ids)  # each once, two at a time
  targets = lambda door: sorted(
      token for step in range(door.steps_per_epoch) for batch in [door.batch(step)]
      for token in batch.tokens[batch.loss_mask])
  assert targets(door) == targets(whole)


@pytest.mark.parametrize('algo, message', [
    ('dpo', 'data.streaming=true: dpo reads reference log-probs, which are computed of all rows'),
    ('sft,kto', 'data.streaming=true: kto reads reference'),
    ('ssd', 'data.streaming=true: ssd draws completions of its prompts')])
def test_who_cannot_stream(load, algo, message):
  with pytest.raises(settings.UserError, match=message):
    load('rows', 'data.streaming=true', algo=algo)


def test_streamed_rows_are_packed_to_a_width_that_holds_any(load):
  with pytest.raises(settings.UserError, match='data.packed_tokens=10: a streamed row may have .* '
                                               '= 16 tokens; raise it'):
    load('rows', 'data.streaming=true', 'data.packed_tokens=10', 'data.max_prompt_tokens=8',
         'rollout.max_completion_tokens=8', algo='sft')


def test_a_text_is_a_target_but_for_its_first_token(load):
  data, _ = load('rows', 'training.batch_size=6', algo='cpt')
  # <bos>, prompt, completion and end token, less the first.
  count = sum(len(r['prompt'] + r['completion']) + 2 - 1 for r in ROWS)
  assert data.doors[0].batch(0).loss_mask.sum() == count


def test_kto_scores_each_answer_behind_another_prompt_too(load):
  data, tokenizer = load('rows', algo='kto')
  found = texts(data.doors[0], tokenizer)
  answers = [r['completion'] for r in ROWS]
  assert [(own, other) for _, own, other in found] == list(zip(answers, answers[1:] + answers[:1]))
  np.testing.assert_array_equal(data.doors[0].take(range(6)).inputs['labels'],
                                [r['label'] for r in ROWS])
  alone, _ = load('rows', algo='bco')
  assert alone.doors[0].examples.group_size == 1


def test_a_triple_ends_in_a_demonstration(load):
  data, tokenizer = load('pairs', algo='tpo')
  assert texts(data.doors[0], tokenizer)[0] == ('0+1=', '1', '20', '1')


def test_steps_keep_their_labels(load):
  data, _ = load('steps', algo='prm')
  inputs = data.doors[0].take([0, 1]).inputs
  np.testing.assert_array_equal(inputs['step_mask'].sum(1), [2, 2])
  np.testing.assert_array_equal(inputs['step_labels'][inputs['step_mask']], [1, 0, 1, 1])


def test_limits_end_tokens_and_column_names_are_the_users(root, load):
  (root / 'named.jsonl').write_text('{"q": "1+1=", "a": "2"}\n{"q": "1+1=", "a": "2222222222"}\n')
  data, _ = load('named', 'data.columns.prompt=q', 'data.columns.completion=a',
                 'rollout.max_completion_tokens=4', 'data.packing=false', algo='sft')
  door = data.doors[0]
  assert door.intake.rows == 2 and door.intake.kept == 1
  (completion,), = door.examples.completions
  stop_id, = assembly.load_policy(settings.Config(model=str(root / 'model'))).stop_ids
  assert completion[-1] == stop_id


@pytest.mark.parametrize('dataset, algo, message', [
    ('rows', 'dpo', "preferences need the columns 'chosen' and 'rejected'"),
    ('prompts', 'sft', "need the columns 'prompt' and 'completion'"),
    ('pairs', 'kto', "labelled completions need the columns"),
    ('rows', 'prm', "labelled steps need the columns"),
    ('pairs', 'odpo', "the loss needs the column 'chosen_scores'"),
    ('pairs', 'reward_margin', "the loss needs the column 'margins'"),
])
def test_rows_of_the_wrong_kind(load, dataset, algo, message):
  with pytest.raises(settings.UserError) as raised:
    load(dataset, algo=algo)
  assert message in str(raised.value) and '--set data.columns.' in str(raised.value)


# Text of the rows to evaluate on.


@pytest.mark.parametrize('algo', ['sft', 'cpt', 'kto'])
def test_rows_that_are_evaluated_on_are_counted_and_left_out(root, load, caplog, algo):
  held = f'eval.dataset={root}/held_rows.jsonl'  # the first two of six
  def found(*more):
    caplog.clear()
    with caplog.at_level('INFO'):
      data, tokenizer = load('rows', *more, algo=algo)
    said = ' '.join(r.getMessage() for r in caplog.records if r.name == 'absl')
    return data.intake[0], data.doors[0].intake.kept, said

  counts, kept, said = found(held)
  assert kept == counts['kept'] == 6 and counts['dropped'] == {}
  assert [hit['row'] for hit in counts['shared']['hits']] == [0, 1]
  assert '2 of 6 training rows (33.33 %) share 13 words' in said and 'decontaminate=drop' in said
  counts, kept, said = found(held, 'data.decontaminate=drop')
  assert kept == counts['kept'] == 4 and counts['rows'] == 6
  reason = f'sharing 13 words in a row with --eval_dataset={root}/held_rows.jsonl'
  assert counts['dropped'] == {reason: 2} and f'2 dropped (2 {reason})' in said
  for unasked in ((held, 'data.decontaminate=none'), ()):
    counts, kept, said = found(*unasked)
    assert kept == 6 and counts['shared'] is None and 'share' not in said


def test_streamed_rows_are_left_out_where_asked(root, load):
  asked = ['data.streaming=true', 'data.window_rows=2', 'training.batch_size=2',
           f'eval.dataset={root}/held_rows.jsonl']
  assert load('rows', *asked, algo='sft')[0].intake[0]['shared'] is None
  door = load('rows', *asked, 'data.decontaminate=drop', algo='sft')[0].doors[0]
  assert len(door) == 4 and door.steps_per_epoch == 2


def test_every_row_is_evaluated_on(root, load):
  with pytest.raises(settings.UserError, match='nothing left to train on: all 6 rows dropped, '
                                               'sharing 13 words in a row with'):
    load('rows', f'eval.dataset={root}/rows.jsonl', 'data.decontaminate=drop', algo='sft')


# Rewards.


def test_rewards_are_loaded_for_who_reads_them(load):
  data, _ = load('arithmetic:max_operand=19', algo='sft,grpo')
  with data.rewards as rewards:
    assert rewards.names == ('arithmetic',)
  assert isinstance(data.doors[1], prompts.PromptDoor)
  assert load('arithmetic:max_operand=19', algo='ssd')[0].rewards is None
  # Methods that read none need none.
  assert load('prompts', algo='ssd')[0].rewards is None


def test_rows_without_a_reward_of_their_own(load):
  with pytest.raises(settings.UserError, match='no task with a reward of its own; name one'):
    load('prompts', algo='grpo')
  data, _ = load('prompts', algo='grpo', reward=('length(target=4)',))
  with data.rewards as rewards:
    assert rewards.names == ('length',)


# Rows to evaluate on.


def test_own_held_out_rows_are_the_tasks_test_split(load):
  data, _ = load('arithmetic:max_operand=19', 'eval.limit=6')
  data.rewards.close()
  assert data.evaluation.name == 'arithmetic' and len(data.evaluation.rows) == 6
  door = data.doors[0]
  trained = {door.take([i]).prompts[0] for i in range(len(door))}
  assert not trained & {row['prompt'] for row in data.evaluation.rows}
  assert data.held_out == {}  # a rollout has no held-out loss


def test_an_offline_method_is_measured_on_held_out_rows_of_its_kind(root, load):
  data, tokenizer = load('rows', 'eval.limit=2', f'eval.dataset={root}/held_pairs.jsonl',
                         f'stages.dpo.dataset={root}/pairs.jsonl', algo='kto,dpo')
  assert set(data.held_out) == {1}  # these rows have no labels
  assert texts(data.held_out[1], tokenizer) == [
      (r['prompt'], r['chosen'], r['rejected']) for r in PAIRS[:2]]
  own, tokenizer = load('arithmetic:max_operand=19', 'eval.limit=5', algo='sft,grpo')
  own.rewards.close()
  assert set(own.held_out) == {0} and own.evaluation.name == 'arithmetic'
  assert [prompt for prompt, _ in texts(own.held_out[0], tokenizer)] == [
      row['prompt'] for row in own.evaluation.rows]


def test_held_out_pairs_need_no_task(root, load):
  """Offline, the method's own loss is an evaluation."""
  data, _ = load('pairs', f'eval.dataset={root}/held_pairs.jsonl', algo='dpo')
  assert set(data.held_out) == {0} and data.evaluation is None


def test_rows_that_nothing_can_measure(root, load):
  with pytest.raises(settings.UserError, match='eval_dataset='):
    load('rows', f'eval.dataset={root}/prompts.jsonl', algo='sft')
