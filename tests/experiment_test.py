"""Experiment files: what they must define, and what is said of those that do not."""

import pytest

from ptjax import config
from ptjax import experiment


def test_experiment_files(tmp_path):
  good = tmp_path / 'good.py'
  good.write_text('from ptjax import config\ndef get_config():\n  return config.Config(seed=3)\n')
  assert experiment.from_file(str(good)).seed == 3
  for text, message in (('x = 1', 'defines no get_config'),
                        ('def get_config():\n  return {}', 'returned dict')):
    bad = tmp_path / 'bad.py'
    bad.write_text(text)
    with pytest.raises(config.UserError, match=message):
      experiment.from_file(str(bad))
  with pytest.raises(config.UserError, match='no such file'):
    experiment.from_file(str(tmp_path / 'absent.py'))
