import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ptjax import config
from ptjax.data import log_prob_cache
from ptjax.data import tokenizer as tokenizers

KEY = log_prob_cache.Key(weights='w', tokenizer='t', template='c', rows='r', settings='s')


def _arrays():
  rng = np.random.default_rng(0)
  return [rng.standard_normal(n).astype(np.float32) for n in (3, 0, 7, 1)]


def _message(function, *args):
  with pytest.raises(config.UserError) as caught:
    function(*args)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_what_is_saved_is_loaded_to_the_bit(tmp_path):
  assert log_prob_cache.load(tmp_path / 'a' / 'b', KEY) is None
  path = log_prob_cache.save(tmp_path / 'a' / 'b', KEY, _arrays())
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  for found, expected in zip(log_prob_cache.load(path.parent, KEY), _arrays(), strict=True):
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
  assert log_prob_cache.load(log_prob_cache.save(tmp_path, KEY, []).parent, KEY) == []


def test_every_part_of_the_key_is_another_file(tmp_path):
  log_prob_cache.save(tmp_path, KEY, _arrays())
  for field in dataclasses.fields(KEY):
    assert log_prob_cache.load(tmp_path, dataclasses.replace(KEY, **{field.name: 'x'})) is None


@pytest.mark.parametrize('part, words', [
    ('weights', 'other weights'), ('tokenizer', 'another tokenizer'),
    ('template', 'another chat template'), ('rows', r'other rows (or rows cut differently)'),
    ('settings', 'other settings')])
def test_a_stale_file_says_what_differs(tmp_path, part, words):
  path = log_prob_cache.save(tmp_path, KEY, _arrays())
  other = dataclasses.replace(KEY, **{part: 'x'})
  assert _message(log_prob_cache.read, path, other) == (
      f'{path}: cached log-probs of {words}; delete {path} to have them computed anew')
  # Also under the other key's name, as after copying a folder about.
  os.rename(path, tmp_path / other.name())
  assert f'cached log-probs of {words}' in _message(log_prob_cache.load, tmp_path, other)


def test_a_part_that_is_not_known_any_more_is_not_compared(tmp_path):
  unknown = dataclasses.replace(KEY, weights=None)
  assert log_prob_cache.load(tmp_path, unknown) is None
  log_prob_cache.save(tmp_path, KEY, _arrays())
  assert len(log_prob_cache.load(tmp_path, unknown)) == 4
  assert 'cached log-probs of other rows' in _message(
      log_prob_cache.load, tmp_path, dataclasses.replace(unknown, rows='x'))
  log_prob_cache.save(tmp_path, dataclasses.replace(KEY, weights='v'), _arrays())
  assert '2 files of cached log-probs where one was expected' in _message(
      log_prob_cache.load, tmp_path, unknown)


def test_a_changed_number_is_refused(tmp_path):
  path = log_prob_cache.save(tmp_path, KEY, _arrays())
  data = bytearray(path.read_bytes())
  for place in (-1, -40):  # the values, and the lengths
    changed = bytearray(data)
    changed[place] ^= 1
    path.write_bytes(changed)
    assert _message(log_prob_cache.load, tmp_path, KEY) == (
        f'{path}: cached log-probs were changed since they were saved; delete {path} to have them '
        'computed anew')
  path.write_bytes(data)
  assert len(log_prob_cache.load(tmp_path, KEY)) == 4


@pytest.mark.parametrize('keep', [0, 5, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
  path = log_prob_cache.save(tmp_path, KEY, _arrays())
  path.write_bytes(path.read_bytes()[:keep])
  message = _message(log_prob_cache.load, tmp_path, KEY)
  assert message.startswith(f'{path}: cached log-probs cannot be read (')
  assert message.endswith(f'delete {path} to have them computed anew')


def test_some_other_safetensors_file_is_refused(tmp_path):
  path = tmp_path / KEY.name()
  safetensors.numpy.save_file({'values': np.zeros(3, np.float32)}, path)
  assert 'cannot be read' in _message(log_prob_cache.load, tmp_path, KEY)
  tensors = {'values': np.zeros(3, np.float32), 'lengths': np.array([3])}
  safetensors.numpy.save_file(tensors, path, {
      'version': '0', 'checksum': '', 'key': json.dumps(dataclasses.asdict(KEY))})
  assert 'of version 0, this program reads 1' in _message(log_prob_cache.load, tmp_path, KEY)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
  path = log_prob_cache.save(tmp_path, KEY, _arrays())
  def fail(*args):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(os, 'replace', fail)
  assert _message(log_prob_cache.save, tmp_path, KEY, []) == (
      f'{tmp_path}: cached log-probs cannot be written (No space left on device); set '
      'data.reference_cache to another folder')
  assert list(tmp_path.iterdir()) == [path]
  assert len(log_prob_cache.load(tmp_path, KEY)) == 4


def test_the_digest_of_parameters_sees_names_shapes_types_and_values():
  base = {'a': {'kernel': jnp.arange(6.0).reshape(2, 3)}, 'b': jnp.ones(3)}
  digest = log_prob_cache.digest_params
  assert digest(base) == digest(jax.tree.map(np.asarray, base))
  others = [
      {'a': {'weight': base['a']['kernel']}, 'b': base['b']},
      {'a': {'kernel': base['a']['kernel'].reshape(3, 2)}, 'b': base['b']},
      {'a': {'kernel': base['a']['kernel'].astype(jnp.bfloat16)}, 'b': base['b']},
      {'a': {'kernel': base['a']['kernel'].at[1, 2].add(1e-6)}, 'b': base['b']}]
  assert len({digest(tree) for tree in (base, *others)}) == 5


def test_the_digest_of_a_tokenizer_survives_saving_and_use(tmp_path):
  transformers = pytest.importorskip('transformers')
  made = tokenizers.characters('abc')
  digest = log_prob_cache.digest_tokenizer(made)
  made(['ab', 'c'], padding=True, truncation=True, max_length=2)
  assert log_prob_cache.digest_tokenizer(made) == digest
  made.save_pretrained(tmp_path)
  opened = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert log_prob_cache.digest_tokenizer(opened) == digest
  assert log_prob_cache.digest_tokenizer(tokenizers.characters('abd')) != digest
  assert log_prob_cache.digest_template(made) == ''
  made.chat_template = '{{ messages }}'
  assert log_prob_cache.digest_template(made) not in ('', digest)
  assert log_prob_cache.digest_tokenizer(made) == digest
