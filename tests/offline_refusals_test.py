"""What a user of an offline method can get wrong, through the launcher: one clear line each."""

import json
import pathlib
import shutil
import sys

import pytest


sys.path.insert(0, str(pathlib.Path(__file__).parent))
import job_runs

PAIR = {'prompt': '1+1=', 'chosen': '2', 'rejected': '3'}
LABELLED = {'prompt': '1+1=', 'completion': '2', 'label': True}
STEPS = {'prompt': '1+1=', 'completions': ['2', '3'], 'labels': [True, True]}
SMALL = {'width': 16, 'num_layers': 1, 'num_heads': 2, 'num_kv_heads': 1, 'mlp_width': 16}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A folder with a model, one of other sizes, and one of another vocabulary."""
  root = tmp_path_factory.mktemp('refusals')
  job_runs.export_model(root / 'model', **SMALL)
  job_runs.export_model(root / 'wider', **{**SMALL, 'width': 32})
  job_runs.export_model(root / 'foreign', **{**SMALL, 'vocab_size': 99})
  return root


@pytest.fixture
def launch(root, compile_cache, tmp_path, monkeypatch, capsys):
  """Runs one step; returns the exit code, the output, and the lines on stderr but for progress."""
  monkeypatch.chdir(tmp_path)

  def call(algo, rows, *more, **settings):
    if rows is not None:
      (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    settings = {'training__batch_size': 2, 'data__max_prompt_tokens': 16, 'log__report': False,
                'rollout__max_completion_tokens': 16, 'log__tensorboard': False,
                'log__compile_cache': compile_cache, **settings}
    code = job_runs.launch_here([
        f'--algo={algo}', f'--model={root / "model"}', '--dataset=rows.jsonl', '--out_dir=run',
        '--steps=1', *more,
        *(f'--set={name.replace("__", ".")}={value}' for name, value in settings.items())])
    captured = capsys.readouterr()
    return code, captured.out, [
        line for line in captured.err.splitlines() if not line.startswith('step ')]
  return call


@pytest.fixture
def refused(launch):
  """Runs the launcher, which must refuse in one line; returns that line."""
  def call(*args, **settings):
    code, out, lines = launch(*args, **settings)
    assert (code, out) == (2, ''), lines
    assert len(lines) == 1 and lines[0].startswith('ptjax: '), lines
    return lines[0]
  return call


@pytest.mark.parametrize('algo, rows, more, words', [
    # Rows that leave nothing.
    ('dpo', [{**PAIR, 'rejected': '2'}], [],
     ['rows.jsonl: nothing left to train on', '1 dropped (1 with chosen and rejected alike)']),
    ('dpo', [{**PAIR, 'chosen': ''}, {**PAIR, 'rejected': None}], [],
     ['2 dropped (2 with an empty prompt or chosen or rejected)']),
    ('reward_bt', [{**PAIR, 'prompt': '1+' * 20}], [],
     ['1 longer than data.max_prompt_tokens=16', 'raise data.max_prompt_tokens or set',
      'data.overlong=truncate']),
    ('dpo', [PAIR, {**PAIR, 'prompt': '1+' * 20}], ['--set=data.overlong=error'],
     ['row 2', 'longer than data.max_prompt_tokens=16']),
    ('sft', [{'prompt': '1+1=', 'completion': '2' * 30}], [],
     ['longer than rollout.max_completion_tokens=16']),
    ('step_dpo', [{**PAIR, 'prefix': '1', 'chosen': ''}], [], ['with an empty']),
    ('reward_kwise', [{'prompt': '1', 'completions': ['2', '3'], 'ranks': [1, 1]}], [],
     ['without two completions of different rank']),
    # Labels of one kind.
    ('kto', [LABELLED, {**LABELLED, 'completion': '3'}], [],
     ['every completion that is left is labelled true', 'there must be both kinds']),
    ('orm', [{**LABELLED, 'label': 0}] * 2, [], ['is labelled false', 'both kinds']),
    ('prm', [STEPS, STEPS], [],
     ['every step that is left is labelled 1', 'good ones and bad ones']),
    ('kto', [{**LABELLED, 'label': 'perhaps'}], [], ['row 1', 'true or false', "'perhaps'"]),
    # Columns.
    ('dpo', [{'question': 'a', 'better': 'b', 'worse': 'c'}], [],
     ["need the columns 'chosen' and 'rejected'", "found 'question', 'better', 'worse'",
      '--set data.columns.chosen=']),
    ('dpo', [{'prompt': 'a', 'text': 'b', 'reward': 1.0}], [],
     ["found 'prompt', 'text', 'reward'",
      'make_preferences.py --pairs=scored --dataset=rows.jsonl']),
    ('kto', [{'prompt': 'a', 'completion': 'b'}], [], ["'label'", 'data.columns.label=']),
    ('prm', [{'prompt': 'a', 'completion': 'b'}], [], ["'completions'", "'labels'"]),
    ('reward_margin', [PAIR], [], ["needs the column 'margins'", 'data.columns.margins=']),
    ('sppo_soft', [PAIR], [], ["needs the column 'chosen_win_probabilities'"]),
    ('dpo', [PAIR], ['--set=data.columns.chosen=choosen'], ["no column 'choosen'", 'chosen']),
    # Settings.
    ('dpo', [PAIR], ['--set=loss.betta=1'],
     ['loss.betta', 'dpo has no such hyperparameter', 'beta=0.1']),
    ('dpo', [PAIR], ['--set=lora.rank=2', '--set=lora.targets=q_prj'],
     ['lora.targets=q_prj', 'query', 'all-linear']),
    ('tr_dpo', [PAIR, PAIR], ['--set=lora.rank=2'],
     ['average of weights', 'loss.reference_mixup=1', 'lora.rank=0']),
    ('sft,reward_bt', [PAIR], [], ['no next-token head', 'a run of its own']),
])
def test_unusable_rows_and_settings(refused, algo, rows, more, words):
  message = refused(algo, rows, *more)
  assert all(word in message for word in words), message


def test_a_teacher_with_another_vocabulary(refused, root):
  message = refused('kd', [{'prompt': '1', 'completion': '2'}], f'--teacher={root / "foreign"}')
  assert 'its vocabulary has 99 tokens' in message and str(root / 'foreign') in message


@pytest.mark.parametrize('turns', ['last', 'all'])
def test_conversations_of_which_no_token_trains(refused, tmp_path, turns):
  (tmp_path / 'chat.jinja').write_text(
      '{% for m in messages %}{% if m.role == "assistant" %}={% endif %}{{ m.content }}{% endfor %}'
      '{% if add_generation_prompt %}={% endif %}')
  rows = [{'messages': [{'role': 'user', 'content': '1+1'}]},
          {'messages': [{'role': 'user', 'content': '1+1'},
                        {'role': 'assistant', 'content': ''}]}]
  said = {'messages': [*rows[0]['messages'], {'role': 'assistant', 'content': '2'}]}
  assert 'name one with --set=data.chat_template=FILE.jinja' in refused('sft', [said])
  missing = refused('sft', rows, data__chat_template='missing.jinja')
  assert 'data.chat_template=missing.jinja: cannot be read' in missing
  message = refused('sft', rows, data__turns=turns, data__chat_template='chat.jinja')
  assert 'nothing left to train on' in message and '2 dropped' in message, message


@pytest.mark.slow
def test_an_adapter_made_for_another_base(launch, refused, root, tmp_path):
  code, _, lines = launch('sft', [LABELLED], lora__rank=2)
  assert code == 0, lines
  adapter = tmp_path / 'adapter'
  shutil.copytree(tmp_path / 'run' / 'adapter', adapter)
  config = json.loads((adapter / 'adapter_config.json').read_text())
  config['base_model_name_or_path'] = str(root / 'wider')
  (adapter / 'adapter_config.json').write_text(json.dumps(config))
  message = refused('sft', [LABELLED], f'--model={adapter}', '--out_dir=other')
  assert 'wrongly shaped' in message and 'width 32' in message and str(root / 'wider') in message
  config['base_model_name_or_path'] = str(root / 'gone')
  (adapter / 'adapter_config.json').write_text(json.dumps(config))
  message = refused('sft', [LABELLED], f'--model={adapter}', '--out_dir=other')
  assert str(root / 'gone') in message


@pytest.mark.slow
def test_dropped_rows_are_counted_and_caches_guarded(launch, refused, root, tmp_path, caplog):
  """One run on a file with good and bad rows; then its cached log-probs, moved and changed."""
  rows = [PAIR, {**PAIR, 'prompt': '2+2='}, {**PAIR, 'rejected': '2'}, {**PAIR, 'chosen': ''},
          {**PAIR, 'prompt': '1+' * 20}, {**PAIR, 'chosen': '2' * 30}]
  code, _, lines = launch('dpo', rows)
  assert code == 0, lines
  assert ('6 rows: 2 kept, 4 dropped (1 with an empty prompt or chosen or rejected, '
          '1 with chosen and rejected alike, 1 longer than data.max_prompt_tokens=16, '
          '1 longer than rollout.max_completion_tokens=16); raise data.max_prompt_tokens and '
          'rollout.max_completion_tokens, or --set=data.overlong=truncate') in caplog.text
  cache, = (tmp_path / '.ptjax_log_probs').glob('*.safetensors')
  sound = cache.read_bytes()

  cache.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
  message = refused('dpo', None, '--out_dir=changed')
  assert f'{cache.name}: cached log-probs were changed since they were saved' in message
  assert 'delete' in message and 'computed anew' in message
  cache.write_bytes(sound[:100])
  assert 'cannot be read' in refused('dpo', None, '--out_dir=torn')
  cache.write_bytes(sound)

  # A stale file is one under another's name: of other rows here, of other weights by its key.
  (tmp_path / 'rows.jsonl').write_text(json.dumps({**PAIR, 'prompt': '5+5='}) + '\n')
  code, _, lines = launch('dpo', None, '--out_dir=fresh', training__batch_size=1)
  assert code == 0, lines
  other, = set((tmp_path / '.ptjax_log_probs').glob('*.safetensors')) - {cache}
  shutil.copy(cache, other)
  message = refused('dpo', None, '--out_dir=stale', training__batch_size=1)
  assert 'cached log-probs of other rows' in message and str(other.name) in message
