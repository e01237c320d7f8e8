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

from ptjax import assembly
from ptjax import collectives
from ptjax import sharding
from ptjax import types
from ptjax.models import hub
from ptjax.rollout import sampler
from ptjax.training import optimizer as optimizers
from ptjax.training import state as training_state
from ptjax.training import step as training_step
from ptjax.training import trained


@dataclasses.dataclass(frozen=True)
class Program:
  """What the compiler says about a program, per device."""
  arguments: int  # bytes
  outputs: int  # bytes; without what lies in donated arguments
  temporaries: int  # bytes
  received: dict  # collective -> bytes it receives
  seconds: float  # that compiling took


@dataclasses.dataclass(frozen=True)
class Rollout:
  """What a rollout of full-length completions holds and does; bytes are per device."""
  weights: int  # the copy decoding works on
  store: int  # keys and values of the prompts
  own: tuple  # keys and values of the completions, at each of their widths
  slots: int  # tokens, log-probs, keys
  windows: tuple  # width of the own caches in each chunk decoded
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
  memory = compiled.memory_analysis()
  return Program(
      arguments=memory.argument_size_in_bytes,
      outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
      received=collectives.bytes_received(compiled.as_text()),
      seconds=time.perf_counter() - started)


def train_step(plan, model, mesh, rows, *, micro_batches):
  """Compiles a stage's train step.

  Args:
    plan: stages.StagePlan.
    model: TransformerConfig.
    mesh: the mesh.
    rows: costs.Rows of one optimizer step.
    micro_batches: parts it is computed in.
  """
  bound, lora = plan.bind(), plan.config.lora
  shapes = trained.shapes(lora, hub.param_shapes(model))
  optimizer, schedule = optimizers.make_optimizer(plan.config.optimizer, plan.stage.steps, shapes)
  loss_state = training_step.initial_loss_state(bound.loss)
  shardings = training_state.shardings(mesh, shapes, optimizer, loss_state)
  state = jax.tree.map(_placed, jax.eval_shape(
      lambda p: training_state.init(p, optimizer, loss_state), shapes), shardings)
  step = training_step.make_train_step(
      _forward(plan, model), bound.loss, optimizer, schedule=schedule,
      micro_batches=micro_batches, mesh=mesh, state_sharding=shardings)
  batch = _place_batch(batch_shapes(bound, rows), mesh)
  frozen = {'base': placed_params(model, mesh)} if lora.rank else {}
  return compile_program(lambda: step.lower(state, batch, frozen), mesh)


def log_prob_step(plan, model, mesh, rows):
  """Compiles the program of old and reference log-probs; `rows` is a whole rollout."""
  step = training_step.make_log_prob_step(_forward(plan, model, role='reference'), mesh=mesh)
  batch = _place_batch(batch_shapes(None, rows), mesh)
  return compile_program(lambda: step.lower(placed_params(model, mesh), batch, {}), mesh)


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


def batch_shapes(bound, rows):
  """A train step's batch as shapes; with `bound` None that of a log-prob step."""
  struct = lambda shape, dtype: jax.ShapeDtypeStruct(shape, np.dtype(dtype))
  shape = (rows.completions, rows.completion_tokens)
  inputs = {}
  if bound is not None and bound.row.door == 'prompts':
    inputs['rollout_log_probs'] = struct(shape, 'float32')
    if bound.estimator:
      inputs['advantages'] = struct(shape[:1], 'float32')
    if bound.needs_reference:
      inputs['reference_log_probs'] = struct(shape, 'float32')
    if bound.needs_old_log_probs:
      inputs['old_log_probs'] = struct(shape, 'float32')
  return types.TokenBatch(
      prompt_tokens=struct((rows.prompts, rows.prompt_tokens), 'int32'),
      prompt_lengths=struct((rows.prompts,), 'int32'), tokens=struct(shape, 'int32'),
      loss_mask=struct(shape, 'bool'), on_policy=struct((), 'bool'), inputs=inputs)


def bytes_per_device(tree):
  """Bytes of a tree of placed shapes or arrays on one device."""
  return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64))
             * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def placed_params(model, mesh):
  """The parameters as shapes that know where they lie."""
  shapes = hub.param_shapes(model)
  return jax.tree.map(_placed, shapes, sharding.tree_sharding(mesh, shapes))


def params_bytes(model, mesh):
  """Bytes of the parameters on one device."""
  return bytes_per_device(placed_params(model, mesh))


class _DrySampler(sampler.Sampler):
  """A sampler that goes through its schedule on shapes, every completion at full length."""

  def __init__(self, *args, compiles):
    super().__init__(*args)
    self._compiles = compiles
    self._status_shapes = None
    self.programs, self.outputs, self.windows = {}, {}, []

  def _run(self, shapes, name, function, *args, out, donate=()):
    del shapes
    kind = name if isinstance(name, str) else name[0]
    wanted = kind in ('weights', 'prefill') or name == ('chunk', self._windows[-1])
    if self._compiles and wanted and kind not in self.programs:
      jitted = jax.jit(function, out_shardings=out, donate_argnums=donate)
      self.programs[kind] = compile_program(lambda: jitted.lower(*args), self.mesh)
    if kind == 'chunk':  # returns caches and slots as they were, filled further
      self.windows.append(name[1])
      return (*args[2:4], self._next_status())
    with sharding.use(self.mesh):
      made = _placed_as(jax.eval_shape(function, *args), out)
    self.outputs.setdefault(kind, []).append(made)
    if kind == 'prefill':
      *made, self._status_shapes = made
      made = (*made, self._next_status())
    return made

  def _next_status(self):
    """What the host sees: all done once every completion has its last token."""
    done = len(self.windows) * self._steps >= self.options.max_tokens - 1
    return {k: np.full(v.shape, k == 'done' and done, v.dtype)
            for k, v in self._status_shapes.items()}


def _dry_sampler(model, options, mesh, rows, *, compiles):
  dry = _DrySampler(model, options, mesh, None, True, compiles=compiles)
  shapes = hub.param_shapes(model)
  params = jax.tree.map(_placed, shapes, sharding.tree_sharding(mesh, shapes))
  p, s, g, *_ = rows
  dry(params, types.Prompts(
      tokens=np.zeros((p, s), np.int32), lengths=np.full(p, s, np.int32),
      ids=np.arange(p, dtype=np.int32), sample_ids=np.zeros((p, g), np.int32)), jax.random.key(0))
  store, own, slots, _ = dry.outputs['prefill'][0]
  return Rollout(
      weights=bytes_per_device(dry.outputs['weights'][0]), store=bytes_per_device(store),
      own=tuple(map(bytes_per_device, [own, *dry.outputs.get('grow', [])])),
      slots=bytes_per_device(slots), windows=tuple(dry.windows), steps=dry._steps,
      programs=dry.programs)


def _on_cpu(mesh):
  return mesh.devices.flat[0].platform == 'cpu'


def _forward(plan, model, role='policy'):
  policy = assembly.Policy(model, None, (), None)
  return assembly.make_forward(plan, {'policy': policy}, role=role)


def _placed(shape, place):
  return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)


def _placed_as(tree, places):
  """`tree` of shapes laid out by `places`, a prefix of it."""
  return jax.tree.map(lambda place, part: jax.tree.map(functools.partial(_placed, place=place),
                                                       part), places, tree)


def _place_batch(batch, mesh):
  return jax.tree.map(
      lambda s: _placed(s, sharding.batch(mesh) if s.ndim else sharding.replicated(mesh)), batch)
