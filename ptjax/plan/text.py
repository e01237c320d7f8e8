"""A plan as the text that `--plan` prints."""

import collections
import json

import jax

from ptjax import config as settings
from ptjax.models import hub
from ptjax.plan import dry_run
from ptjax.plan import fit as plan_fit
from ptjax.plan import rates as rates_of

GIB = 2.0**30

# What makes a phase smaller.
_REMEDIES = {
    'update': 'raise training.micro_batches or set model_settings.remat=full',
    'log-probs': 'raise training.micro_batches, or lower rollout.num_prompts or group_size',
    'values': 'raise training.micro_batches, or lower rollout.num_prompts or group_size',
    'rollout': 'lower rollout.num_prompts, rollout.group_size or rollout.max_completion_tokens',
}


def text(config, model, mesh, rates, stages, fits, *, local):
  """Writes a plan.

  Args:
    config: config.Config.
    model: TransformerConfig.
    mesh: the mesh.
    rates: rates.Rates.
    stages: a planner.StageEstimate per stage.
    fits: a plan_fit.Fit, or None, per stage.
    local: whether lengths are those of the data.
  """
  return '\n'.join([
      json.dumps(settings.to_dict(config), indent=2), '', *_heading(config, model, mesh, local),
      *(line for stage, fit in zip(stages, fits) for line in [
          *_stage_lines(stage, mesh, rates), *_fit_lines(config, stage, fit, rates)]),
      '', *_notes(model, mesh, rates, stages)])


def _heading(config, model, mesh, local):
  count = sum(leaf.size for leaf in jax.tree.leaves(hub.param_shapes(model)))
  where = f'{mesh.size} {mesh.devices.flat[0].platform} device' + 's' * (mesh.size > 1)
  return [f'model   {config.model}: {count / 1e6:,.1f} M parameters, {model.num_layers} layers, '
          f'width {model.width}, vocabulary {model.vocab_size}, {model.param_dtype} computing in '
          f'{model.dtype}',
          'mesh    ' + ', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())
          + f', planned on {where}',
          f'lengths {"the longest of the data" if local else "the limits set"}']


def _stage_lines(stage, mesh, rates):
  rows = stage.rows
  yield ''
  if rows.packed:
    yield (f'stage {stage.name}: {rows.prompts} packed row' + 's' * (rows.prompts > 1)
           + f' of {rows.prompt_tokens} tokens, up to '
           f'{rows.completion_tokens} of them targets')
  else:
    yield (f'stage {stage.name}: {rows.prompts} prompts x {rows.group_size}, up to '
           f'{rows.prompt_tokens} + {rows.completion_tokens} tokens')
  if stage.remat:
    yield f'  remat: {stage.remat}'
  if stage.may_pack:
    yield ('  every completion at full length, in a row of its own; shorter ones share rows where '
           'that makes an update cheaper, and then it holds less')
  yield '  memory per device'
  for part, size in stage.resident.items():
    yield _row(part, size)
  for phase, parts in stage.phases.items():
    for part, size in parts.items():
      yield _row(f'{phase}: {part}', size)
  yield _row(f'peak, in {stage.fullest}', stage.peak)
  every_step = [work for work in stage.work if not work.once]
  before = [work for work in stage.work if work.once]
  yield f'  {"work per optimizer step":26}{"FLOP":>12}{"moved":>12}{"received":>12}{"seconds":>10}'
  for work in every_step:
    yield _work_row(work, rates, mesh)
  yield _sum_row('together', every_step, rates, mesh)
  if before:
    yield '  work once, before the first step (unless an earlier run left the numbers)'
    yield from (_work_row(work, rates, mesh) for work in before)
  kinds = sum((collections.Counter(work.received) for work in every_step), collections.Counter())
  if kinds:
    yield '  received per optimizer step, by collective'
    for kind, size in kinds.most_common():
      where = {work.name: work.received.get(kind, 0) for work in every_step}
      most = max(where, key=where.get)
      yield f'{_row(kind, size)}, {where[most] / size:.0%} of it in {most}'
    if mesh.size > rates_of.PER_NODE:
      near = sum(work.near for work in every_step) / sum(kinds.values())
      yield f'    {near:.0%} of it from devices of the own node, of {rates_of.PER_NODE} each'


def _work_row(work, rates, mesh):
  shown = work.name if len(work.name) < 24 else f'...{work.name[-20:]}'
  return (f'    {shown:24}{_scaled(work.flops, 1000):>12}{_bytes(work.moved):>12}'
          f'{_bytes(sum(work.received.values())):>12}{work.seconds(rates, mesh.size):10,.3f}')


def _sum_row(name, work, rates, mesh):
  flops = sum(one.flops for one in work)
  received = sum(sum(one.received.values()) for one in work)
  return (f'    {name:24}{_scaled(flops, 1000):>12}{"":12}{_bytes(received):>12}'
          f'{sum(one.seconds(rates, mesh.size) for one in work):10,.3f}')


def _fit_lines(config, stage, fit, rates):
  """What fits, and what to change where this does not."""
  if fit is None:
    return
  if stage.peak > fit.limit:
    yield (f'  does not fit into {rates.memory:,.0f} GiB in its phase {stage.fullest}: '
           f'{_remedy(stage.fullest)}; or split over more devices (--mesh)')
  yield f'  fits into {plan_fit.ROOM:.0%} of {rates.memory:,.0f} GiB per device'
  if fit.micro_batches is None:
    yield ('    no micro-batch, not even one with a prompt per device: set '
           'model_settings.remat=full, lower rollout.group_size or the lengths, or split over '
           'more devices (--mesh)')
  else:
    # How many rows they fill, only the run will see.
    unit = 'example' if stage.rows.packed else 'prompt'
    yield (f'    micro-batches of up to {fit.prompts} {unit}{"s" * (fit.prompts > 1)}: '
           f'training.micro_batches={fit.micro_batches} (now {config.training.micro_batches})')
  if fit.rollout is not None:
    now = config.rollout.num_prompts
    more = ', or more' if fit.rollout >= plan_fit.MOST * now else ''
    yield (f'    rollouts of up to {fit.rollout}{more} prompts x {config.rollout.group_size} '
           f'(now {now})')


def _row(name, size):
  shown = name if len(name) < 36 else f'...{name[-32:]}'  # a model's path tells by its end
  return f'    {shown:36}{_bytes(size):>12}'


def _bytes(size):
  return _scaled(size, 1024, 'iB') if size else '-'


def _scaled(number, base, unit=''):
  """Writes a number with the prefix that keeps it short, e.g. 3.55 GiB; mega is the least."""
  number, power = number / base**2, 0
  while number >= 1000 and power < 3:
    number, power = number / base, power + 1
  return f'{number:,.{2 if power else 1}f} {"MGTP"[power]}{unit}'


def _notes(model, mesh, rates, stages):
  compiled = sum(program.seconds for stage in stages for program in stage.programs.values())
  yield (f'{sum(len(stage.programs) for stage in stages)} programs compiled in {compiled:.0f} s; '
         'nothing was run.')
  yield ('FLOP are of all devices, with all that is recomputed; bytes moved (between a device and '
         'its memory: weights, caches, optimizer state and the logits of decoding, not '
         'activations) and received (from other devices) are per device.')
  between = '' if mesh.size <= rates_of.PER_NODE else (
      f', from other nodes {rates.network / 1e9:,.3g}')
  yield (f'Seconds assume {rates.flops / 1e12:,.3g} TFLOP/s, {rates.bytes / 1e9:,.3g} GB/s moved '
         f'and {rates.link / 1e9:,.3g} GB/s received{between} ({rates.name}), no overlap of '
         'computing and receiving, every completion at full length, and no time for rewards.')
  if dry_run.compiled_dtype(model, mesh) != model:
    yield (f'Temporaries and bytes received are those of programs in float32, since XLA widens '
           f'{model.dtype} on CPU; on a GPU both are smaller, activations down to half.')


def _remedy(phase):
  return next(remedy for name, remedy in _REMEDIES.items() if name in phase)
