"""One table: what `--algo=NAME` means. The taxonomy on a page.

A row says which loss, which data door, which models beside the policy, and which advantage. The
launcher needs nothing else. Two rows may share a loss and differ in the data they learn from.
"""

import dataclasses
import importlib.util
import inspect
import json
import pathlib
from typing import Callable

from ptjax import config
from ptjax.losses import imitation
from ptjax.losses import policy_gradient
from ptjax.losses import policy_gradient_sequence
from ptjax.pieces import advantage

DOORS = ('prompts', 'demonstrations', 'preferences', 'unpaired', 'text', 'stepwise')
ROLES = ('reference', 'critic', 'teacher', 'reward_model', 'judge')

# Arguments of losses and advantages that are arrays of the batch, not hyperparameters.
ARRAYS = frozenset((
    'log_probs', 'entropy', 'loss_mask', 'advantages', 'rewards', 'old_log_probs',
    'rollout_log_probs', 'reference_log_probs'))

# Coefficients that, above 0, need the reference model although the row does without.
_REFERENCE_COEFFICIENTS = ('kl_coefficient', 'reward_kl_coefficient')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
  """A row of the table."""
  name: str
  family: str
  loss: Callable  # `loss(log_probs, *, arrays, hyperparameters) -> (scalar, metrics)`
  door: str  # one of DOORS
  models: tuple[str, ...] = ()  # ROLES needed beside the policy, whatever the hyperparameters
  advantage: Callable | None = None  # `advantage(rewards, *, arrays, hyperparameters) -> array`
  defaults: dict = dataclasses.field(default_factory=dict)  # where they differ from the loss's own
  source: str = ''  # arXiv id and short title
  tested_against: str = ''

  def __post_init__(self):
    if self.door not in DOORS:
      raise ValueError(f'{self.name}: door={self.door!r}, expected one of {", ".join(DOORS)}')
    unknown = set(self.models) - set(ROLES)
    if unknown:
      raise ValueError(f'{self.name}: models {sorted(unknown)}, expected {", ".join(ROLES)}')

  def hyperparameters(self):
    """Returns `{name: default}` of the loss and the advantage, as this row sets them."""
    found = {}
    for function in (self.loss, self.advantage):
      parameters = inspect.signature(function).parameters if function else {}
      found.update({name: p.default for name, p in parameters.items()
                    if p.default is not inspect.Parameter.empty and name not in ARRAYS})
    return {**found, **self.defaults}

  def models_for(self, hyperparameters):
    """Returns the roles needed under these hyperparameters, `{name: value}`."""
    values = {**self.hyperparameters(), **hyperparameters}
    if any(values.get(name) for name in _REFERENCE_COEFFICIENTS):
      return tuple(role for role in ROLES if role in (*self.models, 'reference'))
    return self.models


def _online(name, loss, source, tested_against, *, advantage=advantage.group_normalized, **row):
  return Algorithm(name=name, family='policy gradient', loss=loss, door='prompts',
                   advantage=advantage, source=source, tested_against=tested_against, **row)


_ROWS = (
    Algorithm(
        name='sft', family='imitation', loss=imitation.sft_loss, door='demonstrations',
        source='arXiv:2203.02155, InstructGPT stage 1', tested_against='TRL DPO sft; closed form'),
    Algorithm(
        name='dft', family='imitation', loss=imitation.dft_loss, door='demonstrations',
        source='arXiv:2508.05629, dynamic fine-tuning', tested_against='TRL dft; closed form'),
    _online('reinforce', policy_gradient.reinforce_loss,
            'Williams 1992', 'closed form', advantage=advantage.group_centred),
    _online('rloo', policy_gradient_sequence.rloo_loss,
            'arXiv:2402.14740, Back to Basics', 'TRL RLOOTrainer; closed form',
            advantage=advantage.leave_one_out_with_kl),
    _online('grpo', policy_gradient.grpo_loss,
            'arXiv:2402.03300, DeepSeekMath', 'TRL loss_type=grpo; closed form'),
    _online('dr_grpo', policy_gradient.dr_grpo_loss,
            'arXiv:2503.20783, Understanding R1-Zero-like training',
            'TRL loss_type=dr_grpo; closed form', advantage=advantage.group_centred),
    _online('bnpo', policy_gradient.bnpo_loss,
            'TRL, loss_type=bnpo', 'TRL loss_type=bnpo; closed form'),
    _online('dapo', policy_gradient.dapo_loss,
            'arXiv:2503.14476, DAPO', 'TRL loss_type=dapo; closed form'),
    _online('gspo', policy_gradient_sequence.gspo_loss,
            'arXiv:2507.18071, GSPO', 'TRL importance_sampling_level=sequence; closed form'),
    _online('cispo', policy_gradient.cispo_loss,
            'arXiv:2506.13585, MiniMax-M1', 'TRL loss_type=cispo; closed form'),
)

TABLE = {row.name: row for row in _ROWS}


def names():
  """Returns the names in table order."""
  return tuple(TABLE)


def get(name):
  """Returns the row of `name`, or of a user's own `path/to/file.py:function`.

  Raises:
    UserError: no such name (near ones are listed), file, or function.
  """
  if '.py:' in name:
    return _from_file(name)
  if name not in TABLE:
    raise config.UserError(f'algo {name!r} is unknown{config.near_names(name, TABLE)}')
  return TABLE[name]


def from_loss(name, loss):
  """Makes a row of a plain loss function, reading what it needs off its argument names."""
  arguments = inspect.signature(loss).parameters
  online = 'advantages' in arguments
  paired = 'pair' in arguments
  needs_reference = paired or (
      'reference_log_probs' in arguments
      and arguments['reference_log_probs'].default is inspect.Parameter.empty)
  return Algorithm(
      name=name, family='custom', loss=loss,
      door='prompts' if online else 'preferences' if paired else 'demonstrations',
      models=('reference',) if needs_reference else (),
      advantage=advantage.group_normalized if online else None, source=name)


def _from_file(name):
  path, _, attribute = name.rpartition(':')
  if not pathlib.Path(path).is_file():
    raise config.UserError(f'algo {name!r}: no file {path}; expected path/to/file.py:function')
  spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, attribute):
    public = [key for key, value in vars(module).items() if callable(value) and key[0] != '_']
    raise config.UserError(
        f'algo {name!r}: {path} has no {attribute!r}{config.near_names(attribute, public)}')
  found = getattr(module, attribute)
  if isinstance(found, Algorithm):
    return found
  if not callable(found):
    raise config.UserError(
        f'algo {name!r}: expected a loss function or an Algorithm, got {type(found).__name__}')
  return from_loss(name, found)


def table_json():
  """Returns the table as JSON, one object per row."""
  return json.dumps([_as_dict(row) for row in TABLE.values()], indent=2)


def _as_dict(row):
  function_name = lambda f: None if f is None else f'{f.__module__}.{f.__name__}'
  return {
      'name': row.name, 'family': row.family, 'door': row.door, 'models': list(row.models),
      'loss': function_name(row.loss), 'advantage': function_name(row.advantage),
      'hyperparameters': row.hyperparameters(), 'source': row.source,
      'tested_against': row.tested_against}


def table_text():
  """Returns the table for a terminal, aligned columns."""
  header = ('name', 'family', 'data', 'models', 'source')
  lines = [header] + [
      (row.name, row.family, row.door, ', '.join(row.models) or '-', row.source)
      for row in TABLE.values()]
  widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
  return '\n'.join(
      '  '.join([cell.ljust(width) for cell, width in zip(line, widths)] + [line[-1]])
      for line in lines)
