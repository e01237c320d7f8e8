"""The policy in lm-evaluation-harness, on a small task of our own."""

import functools
import json
import logging

import jax
import numpy as np
import pytest

api = pytest.importorskip('lm_eval.api.instance', reason='lm_eval is not installed')

from lm_eval import evaluator
from lm_eval import tasks as harness_tasks

from ptjax.data import tokenizer as tokenizers
from ptjax.evaluation import evaluate
from ptjax.evaluation import harness
from ptjax.evaluation import likelihood
from ptjax.evaluation import tasks
from ptjax.models import hub
from ptjax.models import policy

QUESTIONS = [
    {'prompt': 'Once upon a time, there was a little', 'label': 1,
     'choices': [' park', ' girl', ' the', ' and then she went home to her mom']},
    {'prompt': 'Lily wanted to play', 'label': 0, 'choices': [' outside', ' very', ' Tim']},
    {'prompt': 'Tim was very', 'label': 1, 'choices': [' ball', ' happy because he saw', ' the']},
    {'prompt': 'She said, "Thank', 'label': 2, 'choices': [' dog', ' me', ' you']},
]


def request(kind, *arguments):
  return api.Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def model_of(**answers):
  return harness.HarnessModel(answers.get('log_likelihood'), answers.get('generate'),
                              answers.get('tokenizer', tokenizers.characters('ab')), max_tokens=9)


def test_likelihood_requests():
  def log_likelihood(prompts, completions):
    assert (prompts, completions) == (['a', 'b'], [' c', ' d'])
    return likelihood.Likelihoods(np.array([-1.0, -2.5]), np.array([1, 2]), np.array([True, False]))
  found = model_of(log_likelihood=log_likelihood).loglikelihood(
      [request('loglikelihood', 'a', ' c'), request('loglikelihood', 'b', ' d')])
  assert found == [(-1.0, True), (-2.5, False)]


def test_rolling_requests_begin_with_nothing():
  def log_likelihood(prompts, completions):
    assert (prompts, completions) == (['', ''], ['a text', 'b'])
    return likelihood.Likelihoods(np.array([-3.0, -4.0]), np.array([1, 1]), np.zeros(2, bool))
  found = model_of(log_likelihood=log_likelihood).loglikelihood_rolling(
      [request('loglikelihood_rolling', 'a text'), request('loglikelihood_rolling', 'b')])
  assert found == [-3.0, -4.0]


def test_generation_requests_are_grouped_and_cut():
  calls = []
  def generate(prompts, **options):
    calls.append((prompts, options))
    return [f'{prompt}1. Next Q: end' for prompt in prompts]
  found = model_of(generate=generate).generate_until([
      request('generate_until', 'a', {'until': ['Q:', '\n'], 'max_gen_toks': 4}),
      request('generate_until', 'b', {'until': '1', 'do_sample': True, 'temperature': 0.7}),
      request('generate_until', 'c', {'until': ['Q:', '\n'], 'max_gen_toks': 4,
                                      'do_sample': False, 'temperature': 0.0})])
  assert found == ['a1. Next ', 'b', 'c1. Next ']
  assert calls == [
      (['a', 'c'], {'max_tokens': 4, 'stop_strings': ('Q:', '\n'), 'temperature': 0.0}),
      (['b'], {'max_tokens': 9, 'stop_strings': ('1',), 'temperature': 0.7})]


def test_chat_templates_do_not_repeat_the_bos():
  tokenizer = tokenizers.characters('ab:')
  tokenizer.chat_template = (
      "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{% endfor %}"
      "{% if add_generation_prompt %}a:{% endif %}")
  model = model_of(tokenizer=tokenizer)
  assert model.apply_chat_template([{'role': 'user', 'content': 'b'}]) == 'u:ba:'
  assert model.chat_template(True) == tokenizer.chat_template and model.chat_template() == ''


@pytest.fixture(scope='module')
def log_likelihood(shared_data):
  path = str(shared_data / 'models' / 'stories260K')
  config, tokenizer = hub.load_config(path), hub.load_tokenizer(path)
  params = hub.load_params(path, config)
  forward = jax.jit(functools.partial(policy.log_probs, config))
  return likelihood.make_log_likelihood(
      lambda batch: forward(params, batch.prompt_tokens, batch.prompt_lengths, batch.tokens),
      tokenizer, end_ids=(1, 2), max_tokens=256)


@pytest.mark.slow
def test_the_harness_finds_what_our_own_task_finds(log_likelihood, tmp_path, monkeypatch):
  """Multiple choice on a real model: accuracy, length-normalised accuracy and errors agree."""
  monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
  logging.getLogger('lm_eval').setLevel(logging.ERROR)
  theirs_rows = [{**row, 'choices': [choice.strip() for choice in row['choices']]}
                 for row in QUESTIONS]  # the harness puts the space between
  (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in theirs_rows))
  (tmp_path / 'small.yaml').write_text(f"""
task: small_stories
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_target: label
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_bytes, aggregation: mean, higher_is_better: true}}
""")
  model = harness.HarnessModel(log_likelihood, None, tokenizers.characters('ab'))
  manager = harness_tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
  theirs = evaluator.simple_evaluate(
      model=model, tasks=['small_stories'], task_manager=manager, bootstrap_iters=100)
  samples = theirs['samples']['small_stories']
  records = []
  ours = evaluate.evaluate(tasks.make('choice', QUESTIONS), log_likelihood=log_likelihood,
                           record=records.extend)
  numbers = theirs['results']['small_stories']
  for name in ('acc', 'acc_norm', 'acc_bytes'):
    assert ours[f'eval/choice/{name}'] == numbers[f'{name},none']
  assert 0 < numbers['acc,none'] != numbers['acc_norm,none']
  assert ours['eval/choice/acc_se'] == pytest.approx(numbers['acc_stderr,none'])
  for sample, record in zip(sorted(samples, key=lambda s: s['doc_id']), records):
    nats = [float(answer[0]) for answer in sample['filtered_resps']]
    assert nats == pytest.approx(record['nats'], abs=1e-4)
