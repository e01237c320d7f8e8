"""The front door: what it prints, what it refuses, and that a refusal or failure loses nothing."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import chex
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from ptjax.training import metrics

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import job_runs

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A folder with a model."""
  root = tmp_path_factory.mktemp('runs')
  job_runs.export_model(root / 'model')
  return root


@pytest.fixture
def launch(root, compile_cache, tmp_path, monkeypatch, capsys):
  """Runs the launcher on a short job; returns its exit code, stdout and lines on stderr."""
  monkeypatch.chdir(tmp_path)

  def call(*more, devices=1, model=root / 'model', **settings):
    code = job_runs.launch_here(
        job_runs.arguments(model, tmp_path / 'run', compile_cache, *more, **settings), devices)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith('step ')]
    return code, captured.out, lines
  return call


@pytest.fixture
def refused(launch):
  """Runs the launcher, which must refuse in one line; returns that line."""
  def call(*more, **settings):
    code, out, lines = launch(*more, **settings)
    assert (code, out) == (2, ''), lines
    assert len(lines) == 1 and lines[0].startswith('ptjax: '), lines
    return lines[0]
  return call


# What prints and ends.


_HEAVY = {'transformers', 'datasets', 'orbax', 'flax', 'optax', 'scipy', 'huggingface_hub'}


@pytest.mark.parametrize('argument, words, heavy', [
    ('--help', ('--algo', '--resume', '--num_processes', 'Default grpo'),
     _HEAVY | {'jax', 'numpy'}),
    ('--algo=list', ('grpo', 'arXiv:2402.03300', 'prompts', 'modifiers'), _HEAVY)])
def test_help_and_list_load_nothing_heavy(argument, words, heavy):
  # Time depends on the machine, so what is loaded is held; without, both take under a second.
  code = ('import sys; from ptjax import launch; code = launch.main(sys.argv); '
          f'heavy = {heavy} & set(sys.modules); '
          'sys.exit(code or (f"loaded {heavy}" if heavy else 0))')
  done = subprocess.run([sys.executable, '-c', code, argument], capture_output=True, text=True,
                        env={**os.environ, 'PYTHONPATH': str(REPOSITORY)})
  assert (done.returncode, done.stderr) == (0, '')
  assert all(word in done.stdout for word in words)


def test_the_list_as_json(capsys):
  assert job_runs.launch_here(['--algo=list', '--json']) == 0
  rows = {row['name']: row for row in json.loads(capsys.readouterr().out)}
  assert rows['grpo']['hyperparameters']['clip_low'] == 0.2 and rows['dpo']['models']


# Arguments that cannot be used.


@pytest.mark.parametrize('arguments, words', [
    (['--algo=gprpo'], ["algo 'gprpo' is unknown", 'did you mean', 'grpo']),
    (['--algo=missing.py:loss'], ['no file missing.py', 'path/to/file.py:function']),
    (['--agorithm=grpo'], ["'agorithm'"]),
    (['--stesp=3'], ["'stesp'", 'Did you mean', 'steps']),
    (['--steps=many'], ['--steps', "'many'"]),
    (['--steps=0'], ['training.steps=0', 'must be positive']),
    (['--resume=maybe'], ['--resume', 'auto|never']),
    (['grpo'], ["unexpected argument 'grpo'", '--']),
    (['--set=optimizer.learningrate=1'], ["'learningrate'", 'did you mean learning_rate']),
    (['--set=rollout.group_size=2.5'], ['rollout.group_size=2.5', 'expected int']),
    (['--algo=sft,dop'], ["algo 'dop' is unknown", 'did you mean', 'dpo']),
    (['--algo=kd'], ['--algo=kd', 'needs a teacher', '--teacher=DIR']),
    (['--algo=dpo'], ["need the columns 'chosen' and 'rejected'", 'data.columns.chosen=']),
    (['--set=stages.dpo.training.steps=3'], ['stages.dpo', 'no stage of that name']),
    (['--algo=sft,dpo', '--set=stages.dpo.seed=3'], ['stages.dpo.seed', 'the same for all stages']),
    (['--set=training.mini_batches=3'], ['rollout.num_prompts=4', 'training.mini_batches=3']),
    (['--set=lora.rank=2', '--set=lora.targets=querry'],
     ['lora.targets=querry', 'query', 'all-linear']),
    (['--set=lora.rank=-1'], ['lora.rank=-1', '0 to train all weights']),
    (['--set=loss.clip_hihg=1'], ['loss.clip_hihg', 'accepts', 'clip_high=0.2']),
    (['--config=missing.py'], ['--config=missing.py', 'no such file']),
    (['--mesh=dat=1'], ["'dat'", 'did you mean data']),
    (['--mesh=data=3'], ['multiply to 3', '1 devices']),
    (['--coordinator=localhost:1'], ['--num_processes', 'go together']),
    (['--model=missing/folder/model'], ['missing/folder/model', 'does not exist']),
    (['--dataset=missing.jsonl'], ['no such file or folder: missing.jsonl']),
    (['--reward=lenth'], ["'lenth'", 'did you mean length']),
    (['--reward=missing.py:f'], ['missing.py:f', 'no such file']),
    (['--reward=length(aim=3)'], ["no option 'aim'", 'target']),
    (['--set=rollout.group_size=1'], ['rollout.group_size=1', '2']),
    (['--set=data.max_prompt_tokens=2'], ['nothing left', 'longer than data.max_prompt_tokens=2',
                                          'data.overlong=truncate']),
    (['--set=data.max_prompt_tokens=2', '--set=data.overlong=error'],
     ['row 1', 'longer than data.max_prompt_tokens=2', 'drop or truncate']),
    (['--set=rollout.max_completion_tokens=200'], ['128 positions', 'lower one']),
])
def test_unusable_arguments(refused, arguments, words):
  message = refused(*arguments)
  assert all(word in message for word in words), message


def test_the_batch_must_divide_over_the_mesh(refused):
  message = refused(devices=8)
  assert 'rollout.num_prompts' in message and '= 4 does not split' in message
  assert '8 devices' in message and 'multiple of 8' in message


# Files that cannot be used.


@pytest.mark.parametrize('text, words', [
    ('', ['rows.jsonl is empty']),
    ('{"prompt": "1+1="}\n{"prompt": \n', ['rows.jsonl, line 2', 'not valid JSON']),
    ('{"prompt": "1+1="}\n[1]\n', ['rows.jsonl, line 2', 'expected an object', 'a list']),
    ('{"title": "a", "body": "b"}\n', ['title', 'body', 'prompt', 'data.columns.prompt=']),
    ('{"messages": [{"role": "user", "content": "1+1="}]}\n', ['chat template']),
    ('{"prompt": 3}\n', ['row 1', 'not int 3']),
])
def test_unusable_rows(refused, tmp_path, text, words):
  (tmp_path / 'rows.jsonl').write_text(text)
  message = refused('--dataset=rows.jsonl')
  assert all(word in message for word in words), message


def test_rows_without_a_reward_of_their_own(refused, tmp_path):
  (tmp_path / 'rows.jsonl').write_text('{"prompt": "1+1="}\n')
  (tmp_path / 'judge.py').write_text('def f(prompts, completions, score): return score\n')
  assert "needs the column 'score'" in refused('--dataset=rows.jsonl', '--reward=judge.py:f')
  assert 'judge.py' in refused('--dataset=rows.jsonl', '--reward=judge.py:g')
  code = job_runs.launch_here(['--dataset=rows.jsonl', f'--out_dir={tmp_path}/run'])
  assert code == 2


@pytest.mark.parametrize('text, words', [
    ('x = 1', ['defines no get_config']),
    ('def get_config(:', ['SyntaxError', 'line 1']),
    ('import missing_package', ['ModuleNotFoundError', 'missing_package']),
    ('def get_config(): return missing', ['NameError', 'missing']),
])
def test_unusable_experiment_files(refused, tmp_path, text, words):
  (tmp_path / 'experiment.py').write_text(text)
  message = refused('--config=experiment.py')
  assert all(word in message for word in ['experiment.py', *words]), message


@pytest.mark.parametrize('text, words', [
    ('def loss(', ['SyntaxError']),
    ('def other(log_probs): pass', ["no 'loss'", 'other']),
    ('loss = 3', ['expected a loss function', 'int']),
    ('def loss(log_probs, *, advantages, surprise): pass', ['loss needs surprise', 'default']),
])
def test_unusable_loss_files(refused, tmp_path, text, words):
  (tmp_path / 'mine.py').write_text(text)
  message = refused('--algo=mine.py:loss')
  assert all(word in message for word in ['mine.py', *words]), message


def test_a_loss_whose_array_no_column_holds(refused, tmp_path):
  (tmp_path / 'mine.py').write_text('def loss(log_probs, *, loss_mask, surprise): pass')
  assert "the loss needs the column 'surprise'" in refused('--algo=mine.py:loss')


@pytest.fixture
def model(root, tmp_path):
  """A copy of the model to spoil."""
  return shutil.copytree(root / 'model', tmp_path / 'model')


def test_models_that_cannot_be_loaded(refused, model):
  tensors = safetensors.numpy.load_file(model / 'model.safetensors')
  safetensors.numpy.save_file({**tensors, 'model.norm.weight': np.zeros(31, np.float32)},
                              model / 'model.safetensors')
  assert 'model.norm.weight is [31], not [32]' in refused(model=model)
  (model / 'model.safetensors').rename(model / 'pytorch_model.bin')
  message = refused(model=model)
  assert 'pytorch_model.bin' in message and 'safetensors' in message
  config = json.loads((model / 'config.json').read_text())
  (model / 'config.json').write_text(json.dumps({**config, 'model_type': 'mamba'}))
  message = refused(model=model)
  assert 'mamba' in message and 'qwen2' in message and 'gemma3' in message


def test_a_tokenizer_without_end_token(refused, model):
  for name in ('config.json', 'generation_config.json', 'tokenizer_config.json'):
    raw = json.loads((model / name).read_text())
    for key in {'eos_token', 'eos_token_id'} & raw.keys():
      raw[key] = None
    (model / name).write_text(json.dumps(raw))
  message = refused(model=model)
  assert 'no end token' in message and 'eos_token' in message


# Folders that cannot be written.


def test_an_out_dir_that_cannot_be_made(refused, tmp_path):
  (tmp_path / 'run').write_text('a file')
  message = refused()
  assert f'{tmp_path}/run' in message and '--out_dir' in message
  assert (tmp_path / 'run').read_text() == 'a file'


def test_a_disk_too_small_is_found_before_training(refused, tmp_path, monkeypatch):
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(1, 1, 1))
  message = refused()
  assert '1 B free' in message and '--out_dir' in message
  assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


# Failures on the way.

# Rewards by turns: what `script` says of the calls, one letter each, the last one for all the rest.
JUDGE = """
import pathlib
import signal
calls = 0

def judge(prompts, completions, **columns):
  global calls
  script = (pathlib.Path(__file__).parent / 'script').read_text()
  letter = script[min(calls, len(script) - 1)]
  calls += 1
  rewards = [1.0, 1.0, 0.0, 0.0] * (len(completions) // 4)
  if letter == 'r':
    raise OSError('no route to the judge')
  if letter == 'i':
    signal.raise_signal(signal.SIGINT)
  return {'s': rewards[1:], 'n': [float('nan')] + rewards[1:], 't': ['good'] + rewards[1:],
          'u': [1.0, 0.0, 0.0, 0.0] * (len(completions) // 4)}.get(letter, rewards)
"""

# Not finite where one completion of a group stands out, as it does after the letter u.
LOSS = """
import jax.numpy as jnp

def loss(log_probs, *, advantages, loss_mask):
  value = -jnp.where(loss_mask, log_probs * advantages[:, None], 0.0).sum() / loss_mask.sum()
  return jnp.where(advantages.max() > 1.2, jnp.nan, value), {}
"""


@pytest.fixture
def judged(launch, tmp_path):
  """Runs the launcher with rewards that follow a script."""
  (tmp_path / 'judge.py').write_text(JUDGE)
  (tmp_path / 'loss.py').write_text(LOSS)

  def call(script, *more, **settings):
    (tmp_path / 'script').write_text(script)
    return launch('--steps=5', '--reward=judge.py:judge', *more, **settings)
  return call


def steps(folder):
  return [record['step'] for record in job_runs.metrics(folder)]


def checkpoints(folder):
  return sorted(int(path.name) for path in (folder / 'checkpoints').iterdir())


@pytest.mark.slow
def test_a_reward_that_raises_later_loses_nothing(judged, tmp_path):
  code, out, lines = judged('..r')
  assert (code, out, len(lines)) == (2, '', 1)
  assert "reward 'judge': raised OSError: 'no route to the judge' at judge.py:13" in lines[0]
  assert 'completion 0: ' in lines[0]
  assert steps(tmp_path / 'run') == [0, 1, 2] and checkpoints(tmp_path / 'run') == [2]
  code, out, lines = judged('.')
  assert (code, lines) == (0, [])
  assert steps(tmp_path / 'run') == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize('letter, words', [
    ('s', 'returned 15 values for 16 completions'),
    ('n', 'returned nan; expected a finite number or None; completion 0: '),
    ('t', "returned 'good' of type str; expected a number or None; completion 0: ")])
def test_rewards_that_are_none(judged, tmp_path, letter, words):
  code, out, lines = judged(letter)
  assert (code, out, len(lines)) == (2, '', 1)
  assert f"reward 'judge': {words}" in lines[0]
  assert not (tmp_path / 'run' / 'error.txt').exists()
  assert checkpoints(tmp_path / 'run') == []  # nothing was learned that a new setting would lose


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_counted_and_end_the_run(judged, tmp_path):
  code, out, lines = judged('.u.u', '--algo=loss.py:loss', training__max_bad_steps=2,
                            checkpoint__every_steps=1, checkpoint__keep=9)
  run = tmp_path / 'run'
  assert (code, out, len(lines)) == (1, '', 1)
  assert '2 updates in a row' in lines[0] and 'not finite' in lines[0]
  assert f'traceback in {run}/error.txt' in lines[0]
  assert 'TrainingFailed' in (run / 'error.txt').read_text()
  records = job_runs.metrics(run)
  assert [r.get('bad_steps') for r in records[1:]] == [None, 1, None, 1, 2]
  assert [r['loss'] is None for r in records[1:]] == [False, True, False, True, True]
  arrays = {step: ocp.StandardCheckpointer().restore(run / 'checkpoints' / str(step) / 'arrays')
            for step in checkpoints(run)}
  assert sorted(arrays) == [1, 2, 3, 4, 5]
  for name in ('params', 'opt_state'):
    chex.assert_trees_all_equal(arrays[2][name], arrays[1][name])
    chex.assert_trees_all_equal(arrays[5][name], arrays[3][name])
  embedding = lambda step: arrays[step]['params']['embed']['embedding']
  assert np.abs(embedding(3) - embedding(2)).max() > 0


@pytest.mark.slow
def test_a_record_that_cannot_be_written_leaves_no_gap(judged, tmp_path, monkeypatch):
  write = metrics.MetricsWriter.write
  def full(self, step, values):
    if step == 3:
      raise OSError(28, 'No space left on device')
    return write(self, step, values)
  monkeypatch.setattr(metrics.MetricsWriter, 'write', full)
  code, out, lines = judged('.', checkpoint__every_steps=2)
  assert (code, out, len(lines)) == (1, '', 1) and 'No space left on device' in lines[0]
  assert steps(tmp_path / 'run') == [0, 1, 2] and checkpoints(tmp_path / 'run') == [2]
  monkeypatch.undo()
  monkeypatch.chdir(tmp_path)
  assert judged('.', checkpoint__every_steps=2)[0] == 0
  assert steps(tmp_path / 'run') == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_control_c_saves_and_says_how_to_go_on(judged, tmp_path):
  code, out, lines = judged('.i.', '--resume=never')
  assert (code, lines) == (0, [])
  assert steps(tmp_path / 'run') == [0, 1, 2] and checkpoints(tmp_path / 'run') == [2]
  assert 'python -m ptjax.launch --algo=grpo' in out and out.endswith('--resume=auto\n')
