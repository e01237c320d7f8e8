"""Whole runs with learned rewards: a reward model is trained, then a policy on what it says."""

import json
import pathlib
import random
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
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
  """A policy that writes three random digits, and reward models that like sevens."""
  folder, draw = tmp_path_factory.mktemp('learned'), random.Random(0)
  base = job_runs.export_model(folder / 'base')
  digits = lambda: ''.join(draw.choice('0123456789') for _ in range(3))
  sft = _write(folder / 'sft.jsonl', [
      {'prompt': draw.choice(_PROMPTS), 'completion': digits()} for _ in range(512)])
  pairs = [(digits(), digits()) for _ in range(2000)]
  pairs = [sorted(pair, key=lambda text: -text.count('7')) for pair in pairs
           if pair[0].count('7') != pair[1].count('7')]
  preferred = _write(folder / 'pairs.jsonl', [
      {'prompt': draw.choice(_PROMPTS), 'chosen': best, 'rejected': worst}
      for best, worst in pairs])
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
@pytest.mark.parametrize('critic', ['head', 'model'])
def test_sft_then_a_reward_model_then_ppo(trained, compile_cache, critic):
  run = _launch(trained, f'ppo_{critic}', trained / 'sft' / 'model', trained / 'prompts.jsonl',
                '--algo=ppo', f'--reward=model:{trained / "rewards" / "model"}', steps=16,
                cache=compile_cache, critic=critic, rollout__num_prompts=10, rollout__group_size=6,
                optimizer__learning_rate=2e-3)
  assert _rise(run, 60, 'model') > STANDARD_ERRORS
  sevens = [np.mean([row['completion'].count('7') for row in job_runs.samples(run)
                     if row['step'] == step]) for step in (1, 16)]
  assert sevens[1] > sevens[0]  # what the reward model was taught
