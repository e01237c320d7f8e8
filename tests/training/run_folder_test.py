"""The out_dir: one holder, an honest config.json, resuming only what was the same run."""

import dataclasses
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from ptjax import config
from ptjax import overrides
from ptjax.training import run_folder

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CONFIG = config.Config(seed=3, loss={'beta': 0.1})


def _with_checkpoint(out_dir, settings=CONFIG, step=5):
  with run_folder.open_run(settings, out_dir) as run:
    (run.checkpoints / str(step)).mkdir(parents=True)


def _changed(**assignments):
  changed = CONFIG
  for path, value in assignments.items():
    changed = overrides.override(changed, f'{path.replace("__", ".")}={value}')
  return changed


def test_a_new_folder_gets_its_config(tmp_path):
  with run_folder.open_run(CONFIG, tmp_path / 'a' / 'b', argv=['launch', '--seed=3']) as run:
    assert run.path == tmp_path / 'a' / 'b' and not run.resuming
    assert run.checkpoints == run.path / 'checkpoints'
  saved = json.loads((tmp_path / 'a' / 'b' / 'config.json').read_text())
  assert saved['config'] == json.loads(json.dumps(config.to_dict(CONFIG)))
  assert saved['seed'] == 3
  assert saved['command'] == ['launch', '--seed=3']
  assert saved['versions']['python'] == '.'.join(str(n) for n in sys.version_info[:3])
  assert saved['versions']['jax'] and saved['versions']['flax'] and saved['versions']['numpy']
  assert saved['devices']['platform'] == 'cpu' and saved['devices']['count'] == 8
  assert 'git_revision' in saved and saved['started'].endswith('+00:00')


def test_git_revision_is_that_of_the_source_tree():
  found = subprocess.run(['git', '-C', str(REPOSITORY), 'rev-parse', 'HEAD'], capture_output=True,
                         text=True)
  if found.returncode:
    pytest.skip('not a git checkout')
  assert run_folder._git_revision().removesuffix('-changed') == found.stdout.strip()


def test_without_git_the_revision_is_unknown(monkeypatch):
  monkeypatch.setenv('PATH', '/nonexistent')
  assert run_folder._git_revision() is None


def test_auto_resumes_the_same_config(tmp_path):
  _with_checkpoint(tmp_path)
  with run_folder.open_run(CONFIG, tmp_path) as run:
    assert run.resuming


def test_a_folder_without_checkpoint_starts_anew_whatever_its_config(tmp_path):
  with run_folder.open_run(CONFIG, tmp_path) as run:
    run.checkpoints.mkdir()
    (run.checkpoints / '5.orbax-checkpoint-tmp').mkdir()  # a first save that was killed
  other = dataclasses.replace(CONFIG, seed=4, resume='never')
  with run_folder.open_run(other, tmp_path) as run:
    assert not run.resuming
  assert json.loads((tmp_path / 'config.json').read_text())['seed'] == 4


def test_a_changed_config_names_the_keys_with_both_values(tmp_path):
  _with_checkpoint(tmp_path)
  changed = _changed(seed=9, optimizer__learning_rate=0.5, loss__beta=0.2, loss__gamma=1)
  before = (tmp_path / 'config.json').read_bytes()
  with pytest.raises(config.UserError) as caught:
    run_folder.open_run(changed, tmp_path)
  message = str(caught.value)
  assert 'seed was 3, now 9' in message
  assert 'optimizer.learning_rate was 1e-06, now 0.5' in message
  assert 'loss.beta was 0.1, now 0.2' in message
  assert 'loss.gamma was "(absent)", now 1' in message
  assert '\n' not in message and 'step 5' in message
  assert (tmp_path / 'config.json').read_bytes() == before
  run_folder.open_run(CONFIG, tmp_path).close()  # the refusal let the folder go


@pytest.mark.parametrize('path,value', [
    ('training__steps', 999), ('log__samples', 1), ('eval__every_steps', 3),
    ('checkpoint__keep', 7), ('out_dir', 'elsewhere'), ('mesh', 'fsdp=8'),
    ('rewards__workers', 1)])
def test_what_may_change_may_change(tmp_path, path, value):
  _with_checkpoint(tmp_path)
  changed = _changed(**{path: value})
  assert changed != CONFIG
  with run_folder.open_run(changed, tmp_path) as run:
    assert run.resuming
  saved = json.loads((tmp_path / 'config.json').read_text())['config']
  assert not run_folder.changed_keys(saved, config.to_dict(changed))


def test_an_infinite_setting_survives_the_round_trip(tmp_path):
  settings = _changed(optimizer__max_grad_norm='inf')
  _with_checkpoint(tmp_path, settings)
  with run_folder.open_run(settings, tmp_path) as run:
    assert run.resuming


def test_names_on_the_allow_list_exist():
  known = run_folder.flatten(config.to_dict(CONFIG))
  for name in run_folder.MAY_CHANGE:
    assert any(run_folder._may_change(key) and key.startswith(name) for key in known), name


def test_never_refuses_a_checkpoint_and_leaves_all_as_it_was(tmp_path):
  _with_checkpoint(tmp_path)
  (tmp_path / 'error.txt').write_text('old')
  with pytest.raises(config.UserError, match='step 5 and --resume=never'):
    run_folder.open_run(dataclasses.replace(CONFIG, resume='never'), tmp_path)
  assert (tmp_path / 'error.txt').read_text() == 'old'


@pytest.mark.parametrize('text', [None, '', '{"config": ', '{}'])
def test_a_checkpoint_without_readable_config_is_refused(tmp_path, text):
  _with_checkpoint(tmp_path)
  if text is None:
    (tmp_path / 'config.json').unlink()
  else:
    (tmp_path / 'config.json').write_text(text)
  with pytest.raises(config.UserError, match='config.json cannot be read'):
    run_folder.open_run(CONFIG, tmp_path)


def test_other_versions_are_a_warning(tmp_path, caplog):
  _with_checkpoint(tmp_path)
  saved = json.loads((tmp_path / 'config.json').read_text())
  saved['versions']['jax'] = '0.0.1'
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  with caplog.at_level('WARNING'):
    with run_folder.open_run(CONFIG, tmp_path) as run:
      assert run.resuming
  assert 'jax 0.0.1 ->' in caplog.text


def test_two_runs_cannot_share_a_folder(tmp_path):
  with run_folder.open_run(CONFIG, tmp_path):
    with pytest.raises(config.UserError, match=f'in use by process {os.getpid()} on'):
      run_folder.open_run(CONFIG, tmp_path)
  run_folder.open_run(CONFIG, tmp_path).close()


def test_a_killed_run_lets_the_folder_go(tmp_path):
  code = ('import sys, time; from ptjax import config; from ptjax.training import run_folder; '
          'run = run_folder.open_run(config.Config(seed=3), sys.argv[1]); '
          'print("held", flush=True); time.sleep(600)')
  process = subprocess.Popen(
      [sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE, text=True,
      env={**os.environ, 'PYTHONPATH': str(REPOSITORY), 'JAX_PLATFORMS': 'cpu'})
  try:
    assert process.stdout.readline() == 'held\n'
    with pytest.raises(config.UserError, match=f'in use by process {process.pid} on'):
      run_folder.open_run(CONFIG, tmp_path)
  finally:
    process.send_signal(signal.SIGKILL)
    process.communicate()
  run_folder.open_run(CONFIG, tmp_path).close()


def test_error_txt_is_written_and_cleared_by_the_next_run(tmp_path):
  with run_folder.open_run(CONFIG, tmp_path) as run:
    assert run.write_error('Traceback ...\nboom') == tmp_path / 'error.txt'
  assert (tmp_path / 'error.txt').read_text() == 'Traceback ...\nboom\n'
  run_folder.open_run(CONFIG, tmp_path).close()
  assert not (tmp_path / 'error.txt').exists()


def test_write_error_never_raises(tmp_path):
  with run_folder.open_run(CONFIG, tmp_path) as run:
    (tmp_path / '.error.txt.tmp').mkdir()
    run.write_error('boom')
  assert not (tmp_path / 'error.txt').exists()


@pytest.mark.parametrize('use', [
    lambda path: run_folder.open_run(CONFIG, path),
    lambda path: run_folder.check_writable(path, 1)])
def test_an_impossible_folder_is_a_user_error(tmp_path, use):
  (tmp_path / 'file').write_text('')
  with pytest.raises(config.UserError, match='file.*choose another --out_dir'):
    use(tmp_path / 'file' / 'run')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
@pytest.mark.parametrize('use', [
    lambda path: run_folder.open_run(CONFIG, path),
    lambda path: run_folder.check_writable(path, 1)])
def test_a_read_only_folder_is_a_user_error(tmp_path, use):
  tmp_path.chmod(0o500)
  with pytest.raises(config.UserError, match='choose another --out_dir'):
    use(tmp_path)
  tmp_path.chmod(0o700)


@pytest.mark.parametrize('use', [
    lambda path: run_folder.open_run(CONFIG, path),
    lambda path: run_folder.check_writable(path, 1)])
def test_a_write_that_fails_is_a_user_error(tmp_path, monkeypatch, use):
  def fails(descriptor):
    raise OSError(errno.EDQUOT, 'Disk quota exceeded')
  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', fails)
    with pytest.raises(config.UserError, match='Disk quota exceeded; choose another --out_dir'):
      use(tmp_path)
  run_folder.open_run(CONFIG, tmp_path).close()  # neither lock nor probe is left behind


def test_a_full_disk_is_found_before_training(tmp_path):
  run_folder.check_writable(tmp_path / 'run', 1000)
  assert list((tmp_path / 'run').iterdir()) == []
  with pytest.raises(config.UserError, match=r'free, but .* need about 1152921.5 TB'):
    run_folder.check_writable(tmp_path / 'run', 1 << 60)


def test_atomic_write_keeps_the_old_text_when_it_fails(tmp_path):
  path = tmp_path / 'x.json'
  run_folder.write_atomically(path, 'old')
  with pytest.raises(UnicodeEncodeError):
    run_folder.write_atomically(path, 'new' * 1000 + '\ud800')
  assert path.read_text() == 'old'
