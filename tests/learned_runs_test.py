"""Whole runs with learned rewards: a reward model is trained, then a policy on what it says."""

import json
import pathlib
import random
import sys

import jax
import numpy as np
import pytest

from ptjax.data import tokenizer as tokenizers
from ptjax.models import hub
from ptjax.models import presets
from ptjax.models import transformer

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import endpoints
import job_runs

STANDARD_ERRORS = 4.0  # of the difference; chance alone passes one run in 30 000
_PROMPTS = [f'{i}=' for i in range(10)]


def _write(path, rows):
  path.write_text('\n'.join(map(json.dumps, rows)))
  return path


def _launch(folder, name, model, dataset, *more, steps, cache, **settings):
  """Runs one stage on a file of rows; returns its folder."""
  settings = {'data__max_prompt_tokens': 8, 'rollout__max_completion_tokens': 6,
              'optimizer__learning_rate': 3e-3, 'log__compile_cache': cache, 'log__report': False,
              'log__tensorboard': False, **settings}
  code = job_runs.launch_here([
      *more, f'--model={model}', f'--dataset={dataset}', f'--out_dir={folder / name}',
      f'--steps={steps}', *(f'--set={key.replace("__", ".")}={value}'
                            for key, value in settings.items())])
  assert code == 0, name
  return folder / name


@pytest.fixture(scope='module')
def trained(tmp_path_factory, compile_cache):
  """A policy that writes three random digits, a line each, and reward models that like sevens."""
  folder, draw = tmp_path_factory.mktemp('learned'), random.Random(0)
  tokenizer = tokenizers.characters('0123456789=\n')
  config = presets.get('tiny', vocab_size=len(tokenizer), width=32, num_layers=2, num_heads=4,
                       num_kv_heads=2, mlp_width=64, max_length=64)
  base = folder / 'base'
  hub.export(str(base), config, transformer.init(config, jax.random.key(0)), tokenizer)
  digits = lambda: '\n'.join(draw.choice('0123456789') for _ in range(3))
  sft = _write(folder / 'sft.jsonl', [
      {'prompt': draw.choice(_PROMPTS), 'completion': digits()} for _ in range(512)])
  pairs = [(digits(), digits()) for _ in range(2000)]
  pairs = [sorted(pair, key=lambda text: -text.count('7')) for pair in pairs
           if pair[0].count('7') != pair[1].count('7')]
  preferred = _write(folder / 'pairs.jsonl', [
      {'prompt': draw.choice(_PROMPTS), 'chosen': best, 'rejected': worst}
      for best, worst in pairs])
  _write(folder / 'steps.jsonl', [
      {'prompt': draw.choice(_PROMPTS), 'completions': steps,
       'labels': [step == '7' or draw.random() < 0.1 for step in steps]}
      for steps in (draw.choices('0123456777', k=3) for _ in range(1000))])
  _write(folder / 'prompts.jsonl', [{'prompt': prompt} for prompt in _PROMPTS])
  _launch(folder, 'sft', base, sft, '--algo=sft', steps=60, cache=compile_cache)
  _launch(folder, 'rewards', folder / 'sft' / 'model', preferred, '--algo=reward_bt', steps=60,
          cache=compile_cache)
  return folder


def _rise(folder, count, name):
  """The last step's mean reward less the first's, in standard errors; each of `count` draws."""
  records = [m for m in job_runs.metrics(folder) if 'reward' in m]
  first, last = records[0], records[-1]
  spread = lambda record: record[f'rewards/{name}/std'] ** 2 / count
  return (last['reward'] - first['reward']) / np.sqrt(spread(first) + spread(last))


@pytest.mark.slow
@pytest.mark.parametrize('critic, rank', [('head', 0), ('model', 8)])
def test_sft_then_a_reward_model_then_ppo(trained, compile_cache, critic, rank):
  run = _launch(trained, f'ppo_{critic}', trained / 'sft' / 'model', trained / 'prompts.jsonl',
                '--algo=ppo', f'--reward=model:{trained / "rewards" / "model"}', steps=16,
                cache=compile_cache, critic=critic, rollout__num_prompts=10, rollout__group_size=6,
                lora__rank=rank)
  assert _rise(run, 60, 'model') > STANDARD_ERRORS
  sevens = [np.mean([row['completion'].count('7') for row in job_runs.samples(run)
                     if row['step'] == step]) for step in (1, 16)]
  assert sevens[1] > sevens[0]  # what the reward model was taught


@pytest.mark.slow
def test_rewards_of_steps_teach_grpo(trained, compile_cache):
  judge = _launch(trained, 'steps', trained / 'sft' / 'model', trained / 'steps.jsonl',
                  '--algo=prm', steps=60, cache=compile_cache)
  assert job_runs.metrics(judge)[-1]['accuracy'] > 0.85
  run = _launch(trained, 'process', trained / 'sft' / 'model', trained / 'prompts.jsonl',
                '--algo=grpo_process', f'--reward=process:{judge / "model"}(steps="product")',
                steps=16, cache=compile_cache, rollout__num_prompts=10, rollout__group_size=6)
  assert _rise(run, 60, 'process') > STANDARD_ERRORS


def _likes_sevens(question, attempt):
  """A judge's server: the answer with more sevens wins, and now and then it is out of order."""
  if attempt == 1 and len(question) % 5 == 0:
    return 503, {'Retry-After': '0'}, b'busy'
  part = lambda name: question.split(f'[Answer {name}]')[1].split(f'[End of answer {name}]')[0]
  a, b = part('A').count('7'), part('B').count('7')
  return endpoints.reply('[[A]]' if a > b else '[[B]]' if b > a else '[[C]]')


@pytest.mark.slow
@pytest.mark.parametrize('algo', ['nash_md', 'rlaif', 'online_dpo'])
def test_a_judge_over_http_teaches(trained, compile_cache, algo):
  with endpoints.serve(_likes_sevens) as (url, attempts):
    spec = f'{url}(model="m", cache="{trained / ("verdicts_" + algo)}")'
    run = _launch(trained, algo, trained / 'sft' / 'model', trained / 'prompts.jsonl',
                  f'--algo={algo}', f'--judge={spec}', steps=16, cache=compile_cache,
                  rollout__num_prompts=10, rollout__group_size=4, log__samples_every=1,
                  log__samples=40)
  records = [m for m in job_runs.metrics(run) if 'judge/asked' in m]
  assert len(records) == 16 and sum(m['judge/asked'] for m in records) == len(attempts)
  assert not any(f'judge/{what}' in m for m in records for what in ('failed', 'unreadable'))
  sevens = lambda step: np.array([row['completion'].count('7') for row in job_runs.samples(run)
                                  if row['step'] == step], float)
  first, last = sevens(1), sevens(16)
  error = np.sqrt(first.var(ddof=1) / first.size + last.var(ddof=1) / last.size)
  assert last.mean() - first.mean() > STANDARD_ERRORS * error, (first.mean(), last.mean(), error)


def test_a_method_of_steps_refuses_rewards_of_wholes(tmp_path, compile_cache, capsys):
  model = job_runs.export_model(tmp_path / 'model')
  argv = job_runs.arguments(model, tmp_path / 'run', compile_cache, '--algo=grpo_process')
  assert job_runs.launch_here(argv) == 2
  assert 'needs rewards of steps' in capsys.readouterr().err


@pytest.mark.parametrize('more, message', [
    (('--algo=grpo', '--reward=length'), 'grpo would not ask it, for it goes by the rewards'),
    (('--algo=remax',), 'its baseline needs rewards of single completions'),
    (('--algo=reinforce_pp', '--set=rollout.group_size=1'), 'leaves it nothing to compare'),
    (('--algo=sft',), 'no stage of --algo=sft compares completions')])
def test_a_judge_that_nothing_would_ask_is_refused(tmp_path, compile_cache, capsys, more, message):
  model = job_runs.export_model(tmp_path / 'model')
  code = job_runs.launch_here([
      *more, f'--model={model}', f'--out_dir={tmp_path / "run"}',
      '--judge=http://localhost:1/v1(model="m")', f'--set=log.compile_cache={compile_cache}'])
  assert code == 2 and message in capsys.readouterr().err


_SLOW = """
import threading
import time

threads = set()

def sevens(prompts, completions, completion_ids, **columns):
  threads.add(threading.current_thread() is threading.main_thread())
  assert all(len(ids) >= len(text) for ids, text in zip(completion_ids, completions))
  return [text.count('7') + 0.1 * int(prompt[0]) for prompt, text in zip(prompts, completions)]
"""


@pytest.mark.slow
def test_scoring_beside_drawing_changes_nothing(trained, compile_cache):
  (trained / 'slow.py').write_text(_SLOW)
  runs = [_launch(trained, f'overlap_{parts}', trained / 'sft' / 'model',
                  trained / 'prompts.jsonl', '--algo=grpo', f'--reward={trained}/slow.py:sevens',
                  '--reward=length(target=5)*0.1', steps=3, cache=compile_cache,
                  rollout__num_prompts=10, rollout__group_size=4, rewards__overlap=parts)
          for parts in (1, 2, 3)]
  module = next(m for name, m in sys.modules.items() if name.startswith('slow_'))
  assert module.threads == {False}  # of the last run; a module is loaded anew for each
  # A smaller batch rounds the sampler's own log-probs otherwise, which training does not read.
  numbers = lambda run: [{name: value for name, value in record.items()
                          if not name.startswith('sampling/')} for record in job_runs.metrics(run)]
  weights = job_runs.weights(runs[0])
  for run in runs[1:]:
    assert numbers(run) == numbers(runs[0])
    assert job_runs.samples(run) == job_runs.samples(runs[0])
    for name, tensor in job_runs.weights(run).items():
      np.testing.assert_array_equal(tensor, weights[name])
