"""A run's programs, compiled from shapes: no weight is made, nothing is run.

The programs are those of a run, made by the same functions and laid out over the same mesh. One
thing differs: on CPU a bfloat16 program would mislead, since XLA widens bfloat16 operands there
(whole weights and caches, kept beside the originals), so what is compiled on CPU computes in
float32. Its temporaries are then near an upper bound of a GPU's.
"""

import dataclasses
import functools
import time

import jax
import numpy as np

from ptjax import sharding
from ptjax import types
from ptjax.models import hub
from ptjax.plan import collectives
from ptjax.plan import rates
from ptjax.rollout import sampler


@dataclasses.dataclass(frozen=True)
class Program:
  """What the compiler says about a program, per device."""
  arguments: int  # bytes
  outputs: int  # bytes; without what lies in donated arguments
  temporaries: int  # bytes
  received: dict  # collective -> bytes it receives
  near: float  # of these, bytes from devices of its own node
  seconds: float  # that compiling took


@dataclasses.dataclass(frozen=True)
class Rollout:
  """What a rollout of full-length completions holds and does; bytes are per device."""
  weights: int  # the copy decoding works on
  store: int  # keys and values of the prompts
  own: int  # keys and values of the slots
  copies: int  # the most keys and values that a chunk copies, to decode fewer slots or a part
  completions: int  # tokens, log-probs, keys
  share: float  # of the completions, that are decoded at once
  windows: tuple  # width of what is read of the own caches, in each chunk decoded
  steps: int  # of a chunk
  programs: dict  # 'weights', 'prefill', 'chunk' (the widest) -> Program


# Memory is settled before machine code is made, which may as well be slow code.
_FAST = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


def compiled_dtype(model, mesh):
  """The model as its programs are compiled on `mesh` (see above)."""
  if _on_cpu(mesh) and model.dtype != 'float32':
    return dataclasses.replace(model, dtype='float32')
  return model


def compile_program(lower, mesh):
  """Compiles what `lower()` returns for `mesh` and reads what the compiler says."""
  started = time.perf_counter()
  with sharding.use(mesh):
    compiled = lower().compile(compiler_options=_FAST if _on_cpu(mesh) else None)
  memory, text = compiled.memory_analysis(), compiled.as_text()
  return Program(
      arguments=memory.argument_size_in_bytes,
      outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
      received=collectives.bytes_received(text),
      near=sum(collectives.bytes_received(text, within=rates.PER_NODE).values()),
      seconds=time.perf_counter() - started)


def update(made, batch, mesh):
  """Compiles a stage's optimizer step.

  Args:
    made: stage_run.StageRun.
    batch: types.TokenBatch of shapes.
    mesh: the mesh.
  """
  step = made.update()
  return compile_program(
      lambda: step.lower(made.targets(), place(batch, mesh), made.frozen_shapes()), mesh)


def forward_pass(made, role, output, batch, mesh):
  """Compiles a forward pass of a role's model for one output; other arguments as `update`."""
  step = made.pass_step(role, output)
  return compile_program(
      lambda: step.lower(made.shapes(role), place(batch, mesh), made.frozen_shapes()), mesh)


def rollout(model, options, mesh, rows):
  """Goes through a rollout of full-length completions.

  Args:
    model: TransformerConfig.
    options: sampler.SamplingOptions.
    mesh: the mesh.
    rows: costs.Rows of a whole rollout.
  """
  # Stop strings are looked for by the host; the programs hardly differ.
  options = dataclasses.replace(options, stop_strings=())
  shapes = _dry_sampler(model, options, mesh, rows, compiles=False)
  compiled = _dry_sampler(compiled_dtype(model, mesh), options, mesh, rows, compiles=True)
  return dataclasses.replace(shapes, programs=compiled.programs)


def bytes_per_device(tree):
  """Bytes of a tree of placed shapes or arrays on one device."""
  return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64))
             * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def placed_params(model, mesh):
  """The parameters as shapes that know where they lie."""
  shapes = hub.param_shapes(model)
  return jax.tree.map(_placed, shapes, sharding.tree_sharding(mesh, shapes))


def place(batch, mesh):
  """A batch of shapes, placed as training_step.place does arrays."""
  return jax.tree.map(
      lambda s: _placed(s, sharding.batch(mesh) if s.ndim else sharding.replicated(mesh)), batch)


class _DrySampler(sampler.Sampler):
  """A sampler that goes through its schedule on shapes, every completion at full length."""

  def __init__(self, *args, compiles):
    super().__init__(*args)
    self._compiles = compiles
    self._lengths = None
    self.slots = 0
    self.programs, self.outputs, self.windows = {}, {}, []

  def _run(self, shapes, name, function, *args, out, donate=()):
    del shapes
    kind = name if isinstance(name, str) else name[0]
    wanted = kind in ('weights', 'prefill') or name[2:] == (self._windows[-1],)
    if self._compiles and wanted and kind not in self.programs:
      jitted = jax.jit(function, out_shardings=out, donate_argnums=donate)
      self.programs[kind] = compile_program(lambda: jitted.lower(*args), self.mesh)
    if kind == 'chunk':  # returns caches and completions as they were, filled further
      self.slots = max(self.slots, name[1])
      self.windows.append(name[2])
      rows = np.asarray(args[-1])
      self._lengths.reshape(len(rows), -1)[np.arange(len(rows))[:, None], rows] += self._steps
      return (*args[2:4], self._next_status())
    with sharding.use(self.mesh):
      made = _placed_as(jax.eval_shape(function, *args), out)
    self.outputs.setdefault(kind, []).append(made)
    if kind == 'prefill':
      self._lengths = np.where(np.asarray(args[-1]), 1, self.options.max_tokens)
      made = (*made[:3], self._next_status())
    return made

  def _next_status(self):
    """What the host sees: a completion is done once it has its last token."""
    lengths = np.minimum(self._lengths, self.options.max_tokens)
    return {'length': lengths, 'done': lengths == self.options.max_tokens}


def _dry_sampler(model, options, mesh, rows, *, compiles):
  dry = _DrySampler(model, options, mesh, None, True, compiles=compiles)
  p, s, g, *_ = rows
  params = placed_params(model, mesh)
  if options.mixture:
    params = [params] * len(options.mixture)
  dry(params, types.Prompts(
      tokens=np.zeros((p, s), np.int32), lengths=np.full(p, s, np.int32),
      ids=np.arange(p, dtype=np.int32), sample_ids=np.zeros((p, g), np.int32)), jax.random.key(0))
  store, own, made, _ = dry.outputs['prefill'][0]
  own, store = map(bytes_per_device, (own, store))
  slots, (narrow, wide) = dry.slots or p * g, [0, *dry._windows][-2:]
  # Beside what the program at full width copies: a narrower window, or half the slots, of which
  # each then needs a copy of its prompt.
  half = own / 2 + (store * g / 2 if slots == p * g else 0)
  return Rollout(
      weights=bytes_per_device(dry.outputs['weights']), store=store, own=own,
      copies=int(max(own * narrow / wide, half)) if dry.slots else 0,
      completions=bytes_per_device(made), share=slots / (p * g), windows=tuple(dry.windows),
      steps=dry._steps, programs=dry.programs)


def _on_cpu(mesh):
  return mesh.devices.flat[0].platform == 'cpu'


def _placed(shape, place):
  return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)


def _placed_as(tree, places):
  """`tree` of shapes laid out by `places`, a prefix of it."""
  return jax.tree.map(lambda place, part: jax.tree.map(functools.partial(_placed, place=place),
                                                       part), places, tree)
