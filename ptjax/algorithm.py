"""What a row of the algorithm table says."""

import dataclasses
import inspect
from typing import Callable

DOORS = ('prompts', 'demonstrations', 'preferences', 'ranked', 'unpaired', 'text', 'stepwise',
         'prompts+demonstrations')
ROLES = ('reference', 'critic', 'teacher', 'reward_model', 'judge')

# Arguments with a default that are arrays of the batch or state all the same, not hyperparameters.
OPTIONAL_ARRAYS = frozenset((
    'entropy', 'loss_mask', 'old_log_probs', 'reference_log_probs', 'off_policy', 'loss_state',
    'corrupted_log_probs', 'corrupted_reference_log_probs', 'outcome_rewards',
    'desirable_probabilities', 'shown',
    'imitation_weights'))

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
  # What the head makes of [..., V] logits for a loss that takes `divergence`:
  # `divergence(logits, teacher_logits, *, hyperparameters) -> [...]`, for any leading shape.
  divergence: Callable | None = None
  # How the reference moves: `follow(reference, params, step, *, hyperparameters) -> reference`.
  follow: Callable | None = None
  # Which batches of an offline row are the policy's own samples of the data's prompts:
  # `own_turn(key, *, hyperparameters) -> [] bool`.
  own_turn: Callable | None = None
  defaults: dict = dataclasses.field(default_factory=dict)  # where they differ from the loss's own
  source: str = ''  # arXiv id and short title
  tested_against: str = ''  # beside the closed form in NumPy, which every row has
  stages: tuple[str, ...] = ()  # rows that run one after the other in its place
  recipe: str = 'own samples'  # of training.recipes: who draws the completions, how rows lie
  data: str = ''  # what is special about its data, or about its frozen models

  def __post_init__(self):
    if self.door not in DOORS:
      raise ValueError(f'{self.name}: door={self.door!r}, expected one of {", ".join(DOORS)}')
    unknown = set(self.models) - set(ROLES)
    if unknown:
      raise ValueError(f'{self.name}: models {sorted(unknown)}, expected {", ".join(ROLES)}')
    if ('divergence' in inspect.signature(self.loss).parameters) != (self.divergence is not None):
      raise ValueError(f'{self.name}: the row names a divergence where, and only where, the loss '
                       'takes `divergence`; see ptjax.pieces.divergence')

  def hyperparameters(self):
    """Returns `{name: default}` of loss, advantage and the row's other functions, as it sets them.

    One that two of them share is one setting; the default is that of the first to name it.
    """
    found = {}
    for function in (self.loss, self.advantage, self.divergence, self.follow, self.own_turn):
      parameters = inspect.signature(function).parameters if function else {}
      for name, p in parameters.items():
        if p.default is not inspect.Parameter.empty and name not in OPTIONAL_ARRAYS:
          found.setdefault(name, p.default)
    return {**found, **self.defaults}

  def models_for(self, hyperparameters):
    """Returns the roles needed under these hyperparameters, `{name: value}`."""
    values = {**self.hyperparameters(), **hyperparameters}
    if any(values.get(name) for name in _REFERENCE_COEFFICIENTS):
      return tuple(role for role in ROLES if role in (*self.models, 'reference'))
    return self.models
