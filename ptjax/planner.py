"""What a run would need, from its compiled programs, without running it.

The train step is lowered and compiled for the real mesh on virtual CPU devices from shapes alone
(no weight is made), and the compiler's own memory analysis is read. FLOPs are counted from the
model's shape: a compiled loop's cost analysis counts its body once.
"""

import functools
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from ptjax import assembly
from ptjax import config as settings
from ptjax import sharding
from ptjax import types
from ptjax.models import hub
from ptjax.models import presets
from ptjax.training import algorithm as binding
from ptjax.training import optimizer as optimizers
from ptjax.training import state as training_state
from ptjax.training import step as training_step

# Hub models whose shape is known without fetching anything.
_KNOWN_SHAPES = {
    'Qwen/Qwen2.5-0.5B': 'qwen2.5-0.5b', 'Qwen/Qwen2.5-0.5B-Instruct': 'qwen2.5-0.5b',
    'Qwen/Qwen2.5-1.5B': 'qwen2.5-1.5b', 'Qwen/Qwen2.5-1.5B-Instruct': 'qwen2.5-1.5b',
    'Qwen/Qwen2.5-7B': 'qwen2.5-7b', 'Qwen/Qwen2.5-7B-Instruct': 'qwen2.5-7b',
    'openai-community/gpt2': 'gpt2',
}
_H100 = {'flops': 0.4 * 989e12, 'bytes': 0.4 * 3.35e12}  # 40 % of the data sheet's peak rates
GIB = 2.0**30


def use_virtual_devices(mesh_text):
  """Makes as many virtual CPU devices as the mesh names; call before anything touches a device.

  Returns:
    True if the mesh is planned on virtual devices; False where it is left open (a -1 or empty), so
    that the machine's own devices decide.
  """
  sizes = [part.partition('=')[2] for part in mesh_text.split(',') if part]
  if not sizes or '-1' in sizes:
    return False
  try:
    count = math.prod(int(size) for size in sizes)
  except ValueError:
    return False  # make_mesh says what is wrong with it
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', count)
  return True


def model_shape(config):
  """Returns the TransformerConfig of a run, from a preset, a known hub name or the files."""
  name = _KNOWN_SHAPES.get(config.model)
  if name is None:
    return assembly.load_policy(config).config
  return presets.get(name, dtype=config.model_settings.dtype,
                     param_dtype=config.model_settings.param_dtype)


def parameter_count(shapes):
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def forward_flops(model, tokens, context):
  """Multiply-adds x 2 of a forward pass over `tokens` positions that see `context` keys each."""
  shapes = hub.param_shapes(model)
  in_layers = parameter_count(shapes['layers'])
  attention = 2 * model.num_layers * model.num_heads * model.head_dim * context
  return 2 * tokens * (in_layers + attention)


def head_flops(model, tokens):
  return 2 * tokens * model.width * model.vocab_size


def plan(config):
  """Returns the plan as text: config, parameters, memory per device, FLOPs and time per step."""
  virtual = use_virtual_devices(config.mesh)
  mesh = sharding.make_mesh(config.mesh)
  plans = assembly.stage_plans(config)
  stage_plan = plans[-1]
  model = model_shape(config)
  assembly.check(config, plans, model, mesh)
  online = stage_plan.row.door == 'prompts'
  rollout, training = config.rollout, config.training
  group = rollout.group_size if online else 1
  prompts = rollout.num_prompts // training.mini_batches if online else stage_plan.batch_size
  longest = (config.data.max_prompt_tokens, rollout.max_completion_tokens)
  compiled, seconds = compile_train_step(config, stage_plan, model, mesh, prompts, group, longest)
  memory = compiled.memory_analysis()
  shapes = hub.param_shapes(model)
  count = parameter_count(shapes)
  per_device = functools.partial(_bytes_per_device, mesh)
  params = per_device(shapes)
  reference = params if binding.bind(stage_plan.row, stage_plan.hyperparameters).needs_reference \
      else 0
  devices = mesh.size
  completions = rollout.num_prompts * group
  kv_bytes = (2 * model.num_layers * model.num_kv_heads * model.head_dim
              * jnp.dtype(model.dtype).itemsize)
  cache = kv_bytes * (rollout.num_prompts * longest[0] + completions * longest[1]) / devices
  if not online:
    cache = 0
  rows = prompts * (longest[0] + group * longest[1])
  update = 3 * (forward_flops(model, rows, sum(longest) / 2)
                + head_flops(model, prompts * group * longest[1]))
  update *= training.epochs if online else 1
  if training.micro_batches > 1:
    update *= 4 / 3  # the outputs are computed once more, to take the loss over the whole batch
  if model.dtype != 'float32' or devices > 1 or virtual:
    rates, whose = _H100, '40 % of an H100\'s data sheet'
  else:
    rates, whose = measured_rates(), 'a matrix product and a copy measured here'
  lines = [
      json.dumps(settings.to_dict(config), indent=2), '',
      f'model        {config.model}: {count / 1e6:,.1f} M parameters, {model.num_layers} layers, '
      f'width {model.width}, vocabulary {model.vocab_size}',
      f'mesh         {dict(mesh.shape)}' + (' (virtual devices)' if virtual else ''),
      f'compiled     the train step, in {seconds:.1f} s', '',
      'memory per device (GiB)',
      _row('parameters', params), _row('optimizer state', memory.argument_size_in_bytes - params),
      _row('gradients and activations (temporaries)', memory.temp_size_in_bytes),
  ]
  if reference:
    lines.append(_row('reference', reference))
  if online:
    lines.append(_row('KV cache of a full rollout', cache))
  train_peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + reference
  rollout_peak = memory.argument_size_in_bytes + reference + cache
  lines += [_row('peak (the larger of update and rollout)', max(train_peak, rollout_peak)), '',
            'per optimizer step, at full lengths']
  per_step = training.mini_batches * training.epochs if online else 1
  total = update / devices / rates['flops']
  lines.append(f'  update        {update / 1e12:12.3f} TFLOP  {total:10.3f} s')
  if online:
    decode_steps = longest[1]
    flops = (forward_flops(model, completions * decode_steps, sum(longest) / 2)
             + head_flops(model, completions * decode_steps)) / per_step
    moved = decode_steps * (count * jnp.dtype(model.dtype).itemsize
                            + cache * devices / 2) / per_step
    seconds = max(flops / devices / rates['flops'], moved / devices / rates['bytes'])
    lines.append(f'  rollout       {flops / 1e12:12.3f} TFLOP  {seconds:10.3f} s  '
                 f'({moved / GIB:.1f} GiB moved)')
    total += seconds
  lines.append(f'  together      {"":12} {"":6} {total:10.3f} s  (rates: {whose})')
  return '\n'.join(lines)


def compile_train_step(config, stage_plan, model, mesh, prompts, group, longest):
  """Compiles the train step from shapes alone; returns it and the seconds that took."""
  bound = binding.bind(stage_plan.row, stage_plan.hyperparameters)
  shapes = hub.param_shapes(model)
  optimizer, schedule = optimizers.make_optimizer(
      stage_plan.optimizer, stage_plan.stage.steps, shapes)
  shardings = training_state.shardings(mesh, shapes, optimizer)
  place = lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d)
  state = jax.tree.map(
      place, jax.eval_shape(lambda p: training_state.init(p, optimizer), shapes), shardings)
  step = training_step.make_train_step(
      assembly.make_forward(model, config.rollout.temperature, config.model_settings.remat),
      bound.loss, optimizer, schedule=schedule, micro_batches=config.training.micro_batches,
      mesh=mesh, state_sharding=shardings)
  batch = jax.tree.map(
      lambda s: place(s, sharding.batch(mesh) if s.ndim else sharding.replicated(mesh)),
      batch_shapes(bound, prompts, group, longest))
  started = time.perf_counter()
  with sharding.use(mesh):
    compiled = step.lower(state, batch).compile()
  return compiled, time.perf_counter() - started


def batch_shapes(bound, prompts, group, longest):
  """The train step's batch as shapes, prompts and completions at their longest."""
  struct = lambda shape, dtype: jax.ShapeDtypeStruct(shape, np.dtype(dtype))
  rows = (prompts * group, longest[1])
  names = training_step.required_inputs(bound.loss)
  inputs = {'rollout_log_probs': struct(rows, 'float32')} if bound.estimator else {}
  if bound.estimator:
    inputs['advantages'] = struct(rows[:1], 'float32')
  if bound.needs_reference or 'reference_log_probs' in names:
    inputs['reference_log_probs'] = struct(rows, 'float32')
  if bound.needs_old_log_probs:
    inputs['old_log_probs'] = struct(rows, 'float32')
  return types.TokenBatch(
      prompt_tokens=struct((prompts, longest[0]), 'int32'),
      prompt_lengths=struct((prompts,), 'int32'), tokens=struct(rows, 'int32'),
      loss_mask=struct(rows, 'bool'), on_policy=struct((), 'bool'), inputs=inputs)


def measured_rates():
  """This device's float32 matrix-product FLOP/s and copy bytes/s, each the best of three."""
  x = jnp.ones((1024, 1024), jnp.float32)
  y = jnp.ones((1 << 24,), jnp.float32)
  product, copy = jax.jit(lambda a: a @ a), jax.jit(lambda a: a + 1)
  def best(function, argument):
    jax.block_until_ready(function(argument))
    times = []
    for _ in range(3):
      started = time.perf_counter()
      jax.block_until_ready(function(argument))
      times.append(time.perf_counter() - started)
    return min(times)
  return {'flops': 2 * 1024**3 / best(product, x), 'bytes': 2 * y.nbytes / best(copy, y)}


def _bytes_per_device(mesh, shapes):
  shardings = sharding.tree_sharding(mesh, shapes)
  return sum(math.prod(d.shard_shape(s.shape)) * s.dtype.itemsize
             for s, d in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings)))


def _row(name, size):
  return f'  {name:44} {size / GIB:10.3f}'
