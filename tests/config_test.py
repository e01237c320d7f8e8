"""Settings: typed overrides, clear errors, and no setting that no code reads."""

import ast
import dataclasses
import pathlib

import pytest

from ptjax import config as settings
from ptjax import overrides

ROOT = pathlib.Path(settings.__file__).parent


def test_override_keeps_siblings():
  changed = overrides.override(settings.Config(), 'optimizer.learning_rate=1e-5')
  assert changed.optimizer == dataclasses.replace(
      settings.OptimizerSettings(), learning_rate=1e-5)
  assert dataclasses.replace(changed, optimizer=settings.OptimizerSettings()) == settings.Config()


@pytest.mark.parametrize('assignment, path, value', [
    ('training.steps=1e3', ('training', 'steps'), 1000),
    ('optimizer.max_grad_norm=none', ('optimizer', 'max_grad_norm'), None),
    ('data.limit=7', ('data', 'limit'), 7),
    ('log.report=false', ('log', 'report'), False),
    ('rollout.stop_strings=END,###', ('rollout', 'stop_strings'), ('END', '###')),
    ('eval.dataset=a=b.jsonl', ('eval', 'dataset'), 'a=b.jsonl'),
    ('data.columns.prompt=question', ('data', 'columns'), {'prompt': 'question'}),
    ('loss.clip_high=0.28', ('loss',), {'clip_high': 0.28}),
])
def test_override_reads_the_value_by_its_type(assignment, path, value):
  node = overrides.override(settings.Config(), assignment)
  for name in path:
    node = getattr(node, name)
  assert node == value and type(node) is type(value)


@pytest.mark.parametrize('assignment, message', [
    ('optimizer.learningrate=1', "unknown key 'learningrate'; did you mean learning_rate"),
    ('learning_rate=1', 'did you mean optimizer.learning_rate'),
    ('optimiser.learning_rate=1', "unknown key 'optimiser'; did you mean optimizer"),
    ('optimizer=1', 'a section, not a setting'),
    ('algo.x=1', 'a setting, not a section'),
    ('training.steps=1.5', "expected int, got '1.5'"),
    ('training.steps=many', "expected int, got 'many'"),
    ('log.report=yes', "expected bool, got 'yes'"),
    ('training.steps', 'expected key=value'),
    ('training.steps=0', 'must be positive'),
    ('data.overlong=cut', 'expected one of drop, truncate, error'),
    ('rollout.temperature=0', 'must be positive'),
    ('rollout.slots=-1', 'expected how many'),
    ('device.memory_fraction=1.5', 'expected a fraction'),
    ('model_settings.attention=flash', 'expected one of auto, xla, cudnn'),
    ('model_settings.dtype=float16', 'expected one of float32, bfloat16'),
    ('eval.k=8', 'needs eval.samples of at least 8'),
])
def test_bad_overrides_say_what_is_wrong(assignment, message):
  with pytest.raises(settings.UserError, match=message):
    overrides.override(settings.Config(), assignment)


def test_every_setting_is_read_by_some_code():
  read = set()
  for path in ROOT.rglob('*.py'):
    if path.name == 'config.py' and path.parent == ROOT:
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute):
        read.add(node.attr)
  def fields(kind, prefix=''):
    for field in dataclasses.fields(kind):
      if dataclasses.is_dataclass(field.type):
        yield from fields(field.type, f'{prefix}{field.name}.')
      else:
        yield prefix + field.name
  unread = [name for name in fields(settings.Config) if name.rsplit('.', 1)[-1] not in read]
  assert not unread, f'no code reads {unread}'
