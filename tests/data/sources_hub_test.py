"""Data sets by a hub's names: how they are read, and what is said where the hub is out of reach."""

import socket

import pytest

from ptjax import config
from ptjax.data import sources


def _message(name):
  with pytest.raises(config.UserError) as caught:
    sources.load(name)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_hub_offline_is_one_line():
  message = _message('nobody/nothing:main@test')
  assert message.startswith('nobody/nothing:main@test: offline, and no copy was downloaded')
  assert 'built-in tasks: arithmetic' in message
  assert 'did you mean the built-in task arithmetic?' in _message('arithmetik')


def test_hub_out_of_reach_fails_at_once(monkeypatch):
  datasets = pytest.importorskip('datasets')
  monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', False)
  for name in ('http_proxy', 'https_proxy', 'all_proxy'):
    monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(name.upper(), raising=False)
  def refuse(address, timeout):
    assert address[1] == 443 and timeout <= 5
    raise socket.gaierror('no such host')
  monkeypatch.setattr(socket, 'create_connection', refuse)
  assert 'the Hugging Face hub cannot be reached; set HF_HUB_OFFLINE=1' in _message('openai/gsm8k')


@pytest.mark.parametrize('name, expected', [
    ('openai/gsm8k:main@test', ('openai/gsm8k', 'main', 'test')),
    ('imdb', ('imdb', None, 'train')),
    ('owner/set@validation[:10]', ('owner/set', None, 'validation[:10]'))])
def test_hub_names(monkeypatch, name, expected):
  datasets = pytest.importorskip('datasets')
  def load_dataset(path, configuration, *, split):
    assert (path, configuration, split) == expected
    return datasets.Dataset.from_list([{'prompt': 'x'}])
  monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
  assert list(sources.load(name)) == [{'prompt': 'x'}]


def test_hub_errors_in_their_own_words(monkeypatch):
  datasets = pytest.importorskip('datasets')
  def load_dataset(*args, **kwargs):
    raise ValueError('Config name is missing.\nPlease pick one among: [main, socratic]')
  monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
  message = _message('openai/gsm8k')
  assert 'Please pick one among: [main, socratic]; name config and split as in' in message
  def not_found(*args, **kwargs):
    raise datasets.exceptions.DatasetNotFoundError('no')
  monkeypatch.setattr(datasets, 'load_dataset', not_found)
  assert 'no such data set on the Hugging Face hub' in _message('openai/gsm8kk')


def test_not_even_a_hub_name():
  assert 'not a hub name (owner/name:config@split)' in _message('my data set!')
