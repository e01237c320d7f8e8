"""Every offline row of the table, trained for 20 steps by the launcher itself.

One very small model, one shape of batch and a handful of files for all of them, so that little but
the update compiles anew.
"""

import inspect
import json
import math
import pathlib
import sys

import numpy as np
import pytest
import safetensors.numpy

from ptjax import algorithms

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import job_runs

STEPS, BATCH, ROWS = 20, 4, 8
NAMES = [name for name, row in algorithms.TABLE.items() if not row.door.startswith('prompts')]

ALWAYS = {'step', 'stage', 'loss', 'grad_norm', 'learning_rate', 'epoch', 'num_tokens'}
PAIRS = {f'rewards/{name}' for name in ('chosen', 'rejected', 'margins', 'accuracies')}
LOG_PROBS = {'logps/chosen', 'logps/rejected'}
# Family -> metrics that come with it.
FAMILY = {
    'imitation': {'entropy', 'mean_token_accuracy'},
    'preference': {'entropy', *LOG_PROBS, *PAIRS - {'rewards/accuracies'}},
    'distillation': {'entropy', 'mean_token_accuracy', 'distillation/divergence'},
    'reward model': set()}
# Argument of a loss -> metrics that come with it.
ARGUMENTS = {
    'pair': PAIRS, 'chosen_rewards': PAIRS, 'ranks': {'rewards/margins', 'rewards/accuracies'},
    'preference_logits': {'accuracy'}, 'step_labels': {'accuracy'}}
# Rows whose loss need not fall, and why.
NEED_NOT_FALL = {'gkd': "half of its batches are the student's own, others each time"}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A folder with a model, a teacher, and a file of rows for each door."""
  root = tmp_path_factory.mktemp('offline')
  sizes = {'width': 16, 'num_layers': 1, 'num_heads': 2, 'num_kv_heads': 1, 'mlp_width': 16,
           'max_length': 32}
  job_runs.export_model(root / 'model', **sizes)
  job_runs.export_model(root / 'teacher', **{**sizes, 'mlp_width': 24})
  pairs, labelled, steps, ranked, next_steps = [], [], [], [], []
  for i in range(ROWS):
    prompt, right, wrong = f'{i}+1=', f'{i + 1}+0', f'{9 - i}*{i}=0'  # of unequal lengths
    pairs.append({
        'prompt': prompt, 'chosen': right, 'rejected': wrong, 'demonstration': f'{i}*1',
        'margin': 0.5 + i / 8, 'chosen_score': 1.0 + i / 8, 'rejected_score': 0.5,
        'chosen_win_probability': 0.9 - i / 20, 'rejected_win_probability': 0.1 + i / 20})
    labelled.append({'prompt': prompt, 'completion': wrong if i % 2 else right,
                     'label': i % 2 == 0})
    steps.append({'prompt': prompt, 'completions': [f'{i}', '-1'], 'labels': [True, i % 3 == 0]})
    ranked.append({'prompt': prompt, 'completions': [right, wrong, f'{i}*1'][:3 - i % 2],
                   'scores': [2.0, 0.0, 1.0][:3 - i % 2]})
    next_steps.append({'prompt': f'{i}+', 'prefix': '1=', 'chosen': right, 'rejected': wrong})
  for name, rows in (('pairs', pairs), ('labelled', labelled), ('steps', steps),
                     ('ranked', ranked), ('next_steps', next_steps)):
    (root / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  return root


FILES = {'demonstrations': 'labelled', 'text': 'labelled', 'unpaired': 'labelled',
         'preferences': 'pairs', 'stepwise': 'steps', 'ranked': 'ranked'}


def train(root, compile_cache, name, *more, run='', **settings):
  """Trains a row for 20 steps; returns the run's folder."""
  row, out = algorithms.TABLE[name], root / f'{name}{run}'
  rows = 'next_steps' if name == 'step_dpo' else FILES[row.door]
  settings = {
      'training__batch_size': BATCH, 'rollout__max_completion_tokens': 16,
      'optimizer__learning_rate': 1e-2, 'log__report': False, 'log__tensorboard': False,
      'log__compile_cache': compile_cache, 'data__reference_cache': root / 'log_probs', **settings}
  teacher = [f'--teacher={root / "teacher"}'] if 'teacher' in row.models else []
  assert job_runs.launch_here([
      f'--algo={name}', f'--model={root / "model"}', f'--out_dir={out}', f'--steps={STEPS}',
      f'--dataset={root / rows}.jsonl', *teacher, *more,
      *(f'--set={key.replace("__", ".")}={value}' for key, value in settings.items())]) == 0
  return out


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_row_trains(root, compile_cache, name):
  row, out = algorithms.TABLE[name], train(root, compile_cache, name)
  records = job_runs.metrics(out)
  assert [record['step'] for record in records] == list(range(1, STEPS + 1))
  expected = ALWAYS | FAMILY[row.family]
  for argument, metrics in ARGUMENTS.items():
    if argument in inspect.signature(row.loss).parameters:
      expected |= metrics
  for record in records:
    assert expected <= record.keys(), expected - record.keys()
    assert all(math.isfinite(v) for v in record.values() if not isinstance(v, str)), record
    assert 'bad_steps' not in record
  assert records[0]['grad_norm'] > 0  # later a hinge may have nothing left to say
  if name not in NEED_NOT_FALL:  # the same eight rows, over and over
    first, last = (sum(r['loss'] for r in part) for part in (records[:4], records[-4:]))
    assert last < first
  before, after = weights(root / 'model'), weights(out / 'model')
  moved = [np.abs(after[tensor] - before[tensor]).max() for tensor in before if tensor in after]
  assert len(moved) > 5 and min(moved) > 0 and np.isfinite(moved).all()


def weights(model):
  return safetensors.numpy.load_file(model / 'model.safetensors')


@pytest.mark.slow
def test_a_reference_that_follows_at_every_step_leaves_nothing_to_tell_apart(root, compile_cache):
  """The hard update after each step: policy and reference agree whenever the loss is asked."""
  records = job_runs.metrics(train(
      root, compile_cache, 'tr_dpo', run='-hard', loss__reference_mixup=1.0,
      loss__reference_sync_steps=1))
  for record in records:
    np.testing.assert_allclose(record['loss'], math.log(2.0), rtol=1e-5)
    assert record['rewards/margins'] == pytest.approx(0.0, abs=1e-5) and record['grad_norm'] > 0
  # One that never moves is the reference of DPO.
  still = job_runs.metrics(train(root, compile_cache, 'tr_dpo', run='-still'))
  plain = job_runs.metrics(train(root, compile_cache, 'dpo', run='-again'))
  for record, wanted in zip(still, plain, strict=True):
    np.testing.assert_allclose(record['loss'], wanted['loss'], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_reference_that_moves_survives_a_resume(root, compile_cache):
  settings = {'loss__reference_sync_steps': 3, 'checkpoint__every_steps': 5}
  whole = train(root, compile_cache, 'tr_dpo', run='-whole', **settings)
  train(root, compile_cache, 'tr_dpo', '--steps=10', run='-parts', **settings)
  parts = train(root, compile_cache, 'tr_dpo', run='-parts', **settings)
  job_runs.assert_same_run(whole, parts)


@pytest.mark.slow
def test_the_student_speaks_as_often_as_asked(root, compile_cache):
  def own(fraction):
    records = job_runs.metrics(train(root, compile_cache, 'gkd', run=f'-{fraction}',
                                     loss__student_fraction=fraction))
    return [record['distillation/own_samples'] for record in records]
  assert own(0.0) == [0.0] * STEPS and own(1.0) == [1.0] * STEPS
  assert 0 < sum(own(0.5)) < STEPS


@pytest.mark.slow
def test_batches_of_so_many_tokens(root, compile_cache):
  """Eight examples of nine or eleven tokens: two to a row of 24, two rows to a batch."""
  records = job_runs.metrics(train(root, compile_cache, 'sft', run='-tokens',
                                   training__tokens_per_batch=50, data__packed_tokens=24))
  assert [record['epoch'] for record in records[:4]] == [0.0, 0.5, 1.0, 1.5]
  # Every answer trains once in an epoch, its end token too.
  rows = [json.loads(line) for line in (root / 'labelled.jsonl').read_text().splitlines()]
  assert records[1]['num_tokens'] == sum(len(row['completion']) + 1 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['sft', 'simpo'])  # rows packed by the door, and in the step
def test_streamed_rows_survive_a_resume(root, compile_cache, name):
  """Windows of three rows; the part that goes on begins in the middle of one."""
  settings = {'data__streaming': True, 'data__window_rows': 3, 'training__batch_size': 2,
              'checkpoint__every_steps': 5, 'data__max_prompt_tokens': 16}
  whole = train(root, compile_cache, name, run='-streamed', **settings)
  train(root, compile_cache, name, '--steps=9', run='-streamed-parts', **settings)
  parts = train(root, compile_cache, name, run='-streamed-parts', **settings)
  job_runs.assert_same_run(whole, parts)
  records = job_runs.metrics(whole)
  assert sum(r['loss'] for r in records[-4:]) < sum(r['loss'] for r in records[:4])


@pytest.mark.slow
def test_rows_that_are_evaluated_on_do_not_train(root, compile_cache, capsys):
  rows = [json.loads(line) for line in (root / 'labelled.jsonl').read_text().splitlines()]
  (root / 'held_out.jsonl').write_text('\n'.join(map(json.dumps, rows[2:4])))
  settings = {'eval__dataset': root / 'held_out.jsonl', 'data__decontaminate': 'drop',
              'training__batch_size': len(rows), 'checkpoint__every_steps': 5}
  out = train(root, compile_cache, 'sft', '--steps=5', run='-clean', **settings)
  found, = json.loads((out / 'data.json').read_text())
  assert (found['stage'], found['rows'], found['kept']) == ('sft', 8, 6)
  assert list(found['dropped'].values()) == [2]
  assert [(hit['row'], hit['evaluation_row']) for hit in found['shared']['hits']] == [
      (2, 0), (3, 1)]
  # One batch is an epoch: each answer left trains once, its end token too.
  trained = [record['num_tokens'] for record in job_runs.metrics(out) if record['step'] == 1]
  assert trained == [sum(len(row['completion']) + 1 for row in rows[:2] + rows[4:])]
  # Other rows to evaluate on would be other rows to train on.
  with pytest.raises(AssertionError):
    train(root, compile_cache, 'sft', run='-clean', eval__limit=1, **settings)
  assert 'eval.limit was 256, now 1' in capsys.readouterr().err
