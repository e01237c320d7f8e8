"""The planned memory of an update, and of runs, against what the system sees the process take.

Of GSPO, whose update is in one piece on a CPU too, so that there is something to see; and of the
default job, of which programs and compiling take most.
"""

import os
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

_CODE = '''
import gc
import jax
import jax.numpy as jnp
from ptjax import assembly, config, overrides, sharding, stages
from ptjax.plan import dry_batch, dry_run, planner

settings = config.Config(mesh='fsdp=1')
for assignment in ('algo=gspo', 'rollout.num_prompts=32', 'rollout.group_size=8',
                   'data.packing=false', 'rollout.max_completion_tokens=48',
                   'data.max_prompt_tokens=16'):
  settings = overrides.override(settings, assignment)
mesh = sharding.make_mesh('fsdp=1', jax.devices()[:1])
plan, = stages.stage_plans(settings)
policies = assembly.load_policies(settings, [plan], load=planner.load_policy)
rows = planner.training_rows(plan, settings)
made, widest = dry_batch.make(plan, policies, mesh, rows)
shapes = made.targets(), dry_run.place(widest.batch, mesh), made.frozen_shapes()
step = made.update()
with sharding.use(mesh):
  program = step.lower(*shapes).compile()
planned = dry_run.update(made, widest.batch, mesh)
state, batch, frozen = jax.jit(
    lambda: jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes))()
jax.block_until_ready(state)
gc.collect()

def resident(name):
  with open('/proc/self/status') as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

with open('/proc/self/clear_refs', 'w') as file:
  file.write('5')  # the peak starts anew
before = resident('VmRSS')
jax.block_until_ready(program(state, batch, frozen))
print(planned.temporaries + planned.outputs, resident('VmHWM') - before)
'''


_RUN = '''
import sys
import jax
from ptjax import assembly, config, job, overrides
from ptjax.plan import planner

settings = config.Config()
for assignment in (
    'warm_start.steps=0', 'training.steps=2', 'eval.limit=8', 'log.report=false',
    'log.tensorboard=false', f'out_dir={sys.argv[1]}/run', 'log.compile_cache=none', *sys.argv[2:]):
  settings = overrides.override(settings, assignment)

def resident(name):
  with open('/proc/self/status') as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

before = resident('VmRSS')
job.run(settings)
taken = resident('VmHWM') - before
_, (stage,) = planner.estimate(settings, planner.planning_mesh('fsdp=1'))
print(stage.peak, taken)
'''


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'),
                    reason='only Linux resets its peak')
def test_an_update_takes_the_memory_that_is_planned():
  done = subprocess.run(
      [sys.executable, '-c', _CODE], capture_output=True, text=True, timeout=600,
      env={**os.environ, 'PYTHONPATH': str(REPOSITORY), 'MALLOC_TRIM_THRESHOLD_': '0',
           'MALLOC_MMAP_THRESHOLD_': str(2**20)})  # what is free before is not there at all
  assert done.returncode == 0, done.stderr
  planned, taken = map(int, done.stdout.split())
  assert planned > 200 * 2**20  # else small things count
  assert abs(taken - planned) < 0.1 * planned, (planned, taken)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='the C library is told what to keep on Linux')
@pytest.mark.parametrize('least_mib, changes', [
    (1000, ['algo=gspo', 'rollout.num_prompts=128', 'rollout.group_size=16', 'data.packing=false',
            'rollout.max_completion_tokens=16', 'data.max_prompt_tokens=16']),
    (0, ['algo=grpo']),
], ids=['large updates', 'default job'])
def test_a_run_takes_the_memory_that_is_planned(tmp_path, least_mib, changes):
  done = subprocess.run(
      [sys.executable, '-c', _RUN, str(tmp_path), *changes], capture_output=True, text=True,
      timeout=600, env={**os.environ, 'PYTHONPATH': str(REPOSITORY), 'JAX_PLATFORMS': 'cpu',
           'XLA_FLAGS': ''})  # the tests' own ask for eight devices
  assert done.returncode == 0, done.stderr
  planned, taken = map(int, done.stdout.split()[-2:])
  assert planned > least_mib * 2**20
  assert abs(taken - planned) < 0.1 * planned, (planned, taken)
