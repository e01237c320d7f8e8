"""Defects measured in other trainers, each held off by a test.

  KL term whose gradient does not depend on the reference     job_test, losses/policy_gradient_test
  the same random numbers in every rollout or micro-batch     rollout/sampler_test, job_test
  the end token cut off, so that stopping is never learned    here, data/demonstrations_test
  a setting that no code reads                                config_test, training/optimizer_test
  rope_theta, rope scaling or head_dim ignored                models/hf_parity_test
  misspelt nested keys accepted, an override wiping siblings  config_test, launch_test
  pad = EOS masking the stop token                            here, data/demonstrations_test
  resume inside a rollout's mini-batches on another path      job_resume_test
  the loss depending on the micro-batch split                 training/every_loss_test, job_test
  a reference fetched again by name                           here
"""

import json
import pathlib
import shutil
import sys

import pytest

from ptjax.models import hub

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import job_runs


@pytest.mark.slow
def test_stopping_is_learned_with_pad_as_end_and_the_reference_is_the_policy(
    tmp_path, compile_cache, monkeypatch):
  model = job_runs.export_model(tmp_path / 'model')
  tokenizer = json.loads((model / 'tokenizer_config.json').read_text())
  tokenizer['pad_token'] = tokenizer['eos_token']
  (model / 'tokenizer_config.json').write_text(json.dumps(tokenizer))

  load = hub.load_params
  def load_once(*args, **kwargs):  # afterwards there is nothing left to fetch
    params = load(*args, **kwargs)
    shutil.rmtree(model)
    return params
  monkeypatch.setattr(hub, 'load_params', load_once)
  folder = tmp_path / 'run'
  assert job_runs.launch_here(job_runs.arguments(
      model, folder, compile_cache, warm_start__steps=60, loss__kl_coefficient=0.04,
      log__samples_every=1, eval__limit=32)) == 0

  records = job_runs.metrics(folder)
  start, warm, first, second = records[0], records[60], records[61], records[62]
  assert start['eval/arithmetic/truncated'] > 0.8
  assert warm['stage'] == 'sft' and warm['eval/arithmetic/truncated'] < 0.2
  # Every token of the rollouts trains, stop tokens included.
  for before, after in ((warm, first), (first, second)):
    assert after['num_tokens'] - before['num_tokens'] == 16 * after['completions/mean_length']
  samples = [json.loads(line) for line in (folder / 'samples.jsonl').read_text().splitlines()]
  stopped = [sample for sample in samples if not sample['truncated']]
  assert stopped and all(len(s['tokens']) == s['completion_tokens'] for s in samples)
  assert all(s['tokens'][-1] == tokenizer['eos_token'] for s in stopped)
  assert all(tokenizer['eos_token'] not in s['completion'] for s in samples)

  # Sixty steps have moved the policy far from the files; the reference moved along.
  assert abs(first['kl']) < 1e-6 < second['kl']
