"""lm-evaluation-harness over a real model, on local tasks of two kinds."""

import json
import sys

import pytest

from ptjax import evaluation
from ptjax import process

ROWS = [{'q': 'Once upon a time, there was a little', 'choices': ['park', 'girl'], 'label': 1},
        {'q': 'Lily wanted to play', 'choices': ['outside', 'very'], 'label': 0}]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {kind}
doc_to_text: q
{more}
"""


@pytest.fixture(scope='module')
def script(load_script):
  return load_script('run_lm_eval')


@pytest.mark.slow
def test_local_tasks(script, shared_data, tmp_path, monkeypatch, capsys):
  pytest.importorskip('lm_eval', reason='lm_eval is not installed')
  monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(process, 'use_compile_cache', lambda folder: None)
  rows = tmp_path / 'rows.jsonl'
  rows.write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
  (tmp_path / 'choose.yaml').write_text(TASK.format(
      name='choose', rows=rows, kind='multiple_choice',
      more='doc_to_target: label\ndoc_to_choice: choices'))
  (tmp_path / 'write.yaml').write_text(TASK.format(
      name='write', rows=rows, kind='generate_until', more="""
doc_to_target: '{{[" girl", " with her toys"][1 - label]}}'
generation_kwargs: {until: [" named", ".", " in"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""))
  out = tmp_path / 'out.json'
  assert script.main([
      'x', f'--model={shared_data / "models" / "stories260K"}', '--tasks=choose,write',
      f'--include_path={tmp_path}', f'--out={out}', '--max_tokens=64']) == 0
  found = json.loads(out.read_text())
  assert found['choose']['acc,none'] == 1.0 and '|choose' in capsys.readouterr().out
  assert found['write']['exact_match,none'] >= 0.5  # greedy: ", there was a little girl named"


@pytest.mark.parametrize('argv, message', [
    ([], 'Flag --model must have a value'),
    (['--model=m', '--tasks=t', 'x'], 'unexpected argument'),
])
def test_unusable_requests(script, capsys, argv, message):
  assert script.main(['x', *argv]) == 2
  assert message in capsys.readouterr().err


def test_without_the_harness(script, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'lm_eval.api', None)
  monkeypatch.delitem(sys.modules, 'ptjax.evaluation.harness', raising=False)
  monkeypatch.delattr(evaluation, 'harness', raising=False)
  assert script.main(['x', '--model=m', '--tasks=t']) == 2
  assert 'needs lm_eval; install it with `python -m pip install lm_eval`' in capsys.readouterr().err
