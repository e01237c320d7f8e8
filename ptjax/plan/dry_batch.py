"""The widest batch of a stage, made of nothing by the very code that makes a run's batches.

Rows come from the data where it can be read; else from filler as long as the limits allow, which
goes through the same doors. Rollouts go through the run's own collector, whose samplers and forward
passes give zeros and are noted down.
"""

import dataclasses
import inspect
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np

from ptjax import doors
from ptjax import keys
from ptjax import reference
from ptjax import remat
from ptjax import sharding
from ptjax import stage_run
from ptjax import stages
from ptjax import types as parcels
from ptjax.data import sources
from ptjax.data import tokenizer as tokenizers
from ptjax.models import costs
from ptjax.rewards import combine
from ptjax.training import offline
from ptjax.training import online

_LOOKED_AT = 64  # packed batches
_RANKED = 4  # completions of a ranked row of filler; a real row says itself


@dataclasses.dataclass(frozen=True)
class Widest:
  """What one optimizer step works on, and what a rollout for it asks.

  Attributes:
    batch: types.TokenBatch of an optimizer step, as shapes.
    rows: costs.Rows of a whole rollout, or of the batch of an offline stage.
    draws: (sampler's name, costs.Rows) of everything that is drawn, in order.
    passes: input's name -> types.TokenBatch of the rollout it is computed for, as shapes.
    draw_share: of the optimizer steps, for which something is drawn.
    batches: of an offline stage, that make up the data set; of filler, which has no end, one.
  """
  batch: parcels.TokenBatch
  rows: costs.Rows
  draws: list
  passes: dict
  draw_share: float = 1.0
  batches: int = 1


def make(plan, policies, mesh, rows, *, memory=None, here=True):
  """Makes the widest batch of a stage.

  Args:
    plan: stages.StagePlan.
    policies: role -> assembly.Policy; weights are not loaded.
    mesh: the mesh.
    rows: sources.Rows that the stage trains on, as `doors.training_rows` gives them; None: filler,
      where they cannot be read.
    memory: see `remat.settled`.
    here: see stage_run.StageRun.
  Returns:
    (stage_run.StageRun, Widest).
  Raises:
    UserError: what is wrong with the data.
  """
  parts = sharding.batch_size(mesh)
  if rows is not None:
    door = doors.load_door(plan, policies['policy'], rows, parts=parts)
  else:
    letters = tokenizers.characters(tokenizers.PRINTABLE)
    policies = {**policies, 'policy': dataclasses.replace(
        policies['policy'], tokenizer=letters, stop_ids=tokenizers.eos_ids(letters))}
    data = dataclasses.replace(plan.config.data, overlong='truncate')
    filled = dataclasses.replace(plan, config=dataclasses.replace(plan.config, data=data))
    door = doors.load_door(filled, policies['policy'], _filler(plan), parts=parts)
  plan = remat.settled(plan, policies, door, mesh, memory=memory)
  made = stage_run.StageRun(
      plan, policies, doors.Data({plan.stage.index: door}, {}, None, None), mesh, pathlib.Path(),
      here=here)
  if plan.online:
    return made, _of_rollout(made, door)
  return made, _of_rows(made, door)


def rows_of(batch):
  """The sizes of a types.TokenBatch, as costs.Rows."""
  batch = batch if batch.packed is None else batch.packed.rows
  (p, s), (b, t) = batch.prompt_tokens.shape, batch.tokens.shape
  return costs.Rows(p, s, b // p, t, packed=batch.packing is not None)


def _of_rows(made, door):
  """Takes the door's widest batch or, where the policy may answer itself, its answers if wider."""
  if made.reads_reference:
    reference.attach_zeros(door)
  batch, draws = _widest(made, door), []
  share = 1.0 if made.bound.own_turn is None else _own_share(made)
  if made.bound.own_turn is not None and share:
    shown = types.SimpleNamespace(batch=lambda step: batch, epoch=lambda step: 0.0,
                                  rows=lambda step: range(len(batch.prompt_lengths)))
    draw = _zeros_of('policy', made.drawn_by()['policy'][1], draws)
    own, _, _ = offline.MixedSource(shown, draw, lambda key: True, seed=0).batch(None, 0)
    batch = max(batch, own, key=lambda either: either.tokens.size)
  return Widest(_shapes(batch), rows_of(batch), draws, {}, draw_share=share,
                batches=door.steps_per_epoch)


def _widest(made, door):
  """The widest batch; of packed ones the fullest of the first: hardly any is like the widest."""
  if not made.plan.packs_completions:
    return door.widest()
  packed = [made.lay_out(door.batch(step)) for step in range(min(door.steps_per_epoch, _LOOKED_AT))]
  return max(packed, key=lambda batch: batch.packed.rows.prompt_tokens.size)


def _own_share(made):
  """In how many of the stage's steps the policy answers itself, a fraction, by the run's seed."""
  turn = lambda step: made.bound.own_turn(keys.stream(made.plan.config.seed, 'own_turn', step))
  return float(jax.vmap(turn)(jnp.arange(made.plan.stage.steps)).mean())


def _of_rollout(made, door):
  """Collects a rollout of zeros and cuts the first mini-batch out of it."""
  draws, passes = [], {}

  def zeros_for(name):
    def compute(params, batch):
      del params
      passes[name] = _shapes(batch)
      return np.zeros(batch.tokens.shape, np.float32)
    return compute

  collector = made.collector(
      types.SimpleNamespace(batch=lambda index: door.widest(), epoch=lambda index: 0.0),
      {name: _zeros_of(name, options, draws) for name, (_, options) in made.drawn_by().items()},
      {name: zeros_for(name) for name in made.passes()},
      combine.RewardSet([combine.Component('some', _alternating)]))
  whole = collector(None, 0).batch
  batch = online.mini_batch(
      whole, index=0, count=made.plan.config.training.mini_batches, seed=0, rollout=0, epoch=0,
      on_policy=True)
  return Widest(_shapes(batch), rows_of(whole), draws, passes)


def _zeros_of(name, options, draws):
  """A sampler of zeros, which notes in `draws` what it is asked for."""
  def draw(params, prompts, key):
    del params, key
    p, group = prompts.sample_ids.shape
    draws.append((name, costs.Rows(p, prompts.tokens.shape[1], group, options.max_tokens)))
    shape = (p * group, options.max_tokens)
    return parcels.Rollouts(
        tokens=np.zeros(shape, np.int32), loss_mask=np.arange(shape[1]) < np.ones((shape[0], 1)),
        log_probs=np.zeros(shape, np.float32), truncated=np.zeros(shape[0], bool))
  return draw


def _alternating(prompts, completions):
  """Rewards that differ within a group, so that no method throws it away."""
  del prompts
  return [i % 2 for i in range(len(completions))]


def _shapes(batch):
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.canonicalize_dtype(x.dtype)), batch)


def _filler(plan):
  """Rows with the columns that the stage's door needs, as long as the limits allow."""
  config, door = plan.config, plan.row.door
  count = config.rollout.num_prompts if plan.online else config.training.batch_size
  prompt, completion = config.data.max_prompt_tokens, config.rollout.max_completion_tokens
  if 'preference_logits' in inspect.signature(plan.row.loss).parameters:
    completion = completion // 2 - 1  # both stand one behind the other, and are dropped if cut
  good, bad = 'a' * completion, 'b' * completion
  row = {'prompt': 'p' * prompt, 'completion': good, 'chosen': good, 'rejected': bad,
         # A text begins and ends with a token of its own.
         'text': 't' * (prompt + completion - 2),
         **{name: 1.0 for name in stages.wanted_columns(plan)}}
  if door == 'ranked':
    row.update(completions=[good] * _RANKED, scores=[float(i) for i in range(_RANKED)])
  rows = [dict(row, label=i % 2 == 0) for i in range(max(count, 2))]
  if door == 'stepwise':
    rows = [dict(row, completions=['a', bad], labels=[row['label'], True]) for row in rows]
  return sources.Rows(rows, name='filler')
