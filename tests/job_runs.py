"""Whole runs for tests: a very small model, few steps, in this process or in one of their own."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

from absl.testing import flagsaver
import jax
import numpy as np
import safetensors.numpy

from ptjax import launch
from ptjax import sharding
from ptjax.data import arithmetic
from ptjax.data import tokenizer as tokenizers
from ptjax.models import hub
from ptjax.models import presets
from ptjax.models import transformer

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
_TIMING = ('timing_s/', 'perf/', 'step_time')


def export_model(folder, **changes):
  """Writes a model of some thousand weights with the character tokenizer; returns its path."""
  tokenizer = tokenizers.characters(arithmetic.ALPHABET)
  sizes = dict(vocab_size=len(tokenizer), width=32, num_layers=2, num_heads=4, num_kv_heads=2,
               mlp_width=64, max_length=128)
  config = presets.get('tiny', **{**sizes, **changes})
  hub.export(str(folder), config, transformer.init(config, jax.random.key(0)), tokenizer)
  return folder


def arguments(model, out_dir, cache, *more, **settings):
  """Command-line arguments of a short GRPO run whose rewards vary.

  Args:
    model: what `export_model` returned.
    out_dir: the run's folder.
    cache: folder of compiled programs.
    *more: further arguments, e.g. '--steps=6'.
    **settings: `--set` overrides, with `__` for the dot.
  """
  settings = {
      'warm_start__steps': 0, 'warm_start__batch_size': 8, 'rollout__num_prompts': 4,
      'rollout__group_size': 4, 'rollout__max_completion_tokens': 8, 'eval__limit': 8,
      'data__max_prompt_tokens': 16, 'optimizer__learning_rate': 3e-3, 'log__compile_cache': cache,
      **settings}
  return ['--algo=grpo', f'--model={model}', f'--out_dir={out_dir}', '--steps=2',
          '--dataset=arithmetic:max_operand=19',
          *(f'--set={name.replace("__", ".")}={value}' for name, value in settings.items()),
          *([] if any(a.startswith('--reward') for a in more) else ['--reward=length(target=4)']),
          *more]


def launch_here(argv, devices=1):
  """Calls the launcher in this process on some of its devices; returns the exit code."""
  make_mesh, cache = sharding.make_mesh, jax.config.jax_compilation_cache_dir
  sharding.make_mesh = lambda text='': make_mesh(text, jax.devices()[:devices])
  try:
    with flagsaver.flagsaver():
      return launch.main(['ptjax', *argv])
  finally:
    sharding.make_mesh = make_mesh
    jax.config.update('jax_compilation_cache_dir', cache)


def environment(devices=1):
  """The variables of a process with some CPU devices, which compiles as this test session does."""
  flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ['XLA_FLAGS'])
  if devices > 1:  # one is what there is without the flag, and then a plan may ask for more
    flags += f' --xla_force_host_platform_device_count={devices}'
  return {**os.environ, 'PYTHONPATH': str(REPOSITORY), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}


def start(argv, *, devices=1):
  """Starts `python -m ptjax.launch` as a user does; returns the Popen, its output in pipes."""
  return subprocess.Popen(
      [sys.executable, '-m', 'ptjax.launch', *argv], stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, text=True, env=environment(devices))


def finish(process, code=0, timeout=300):
  """Waits for a run; returns its (stdout, stderr) after checking its exit code."""
  try:
    out, err = process.communicate(timeout=timeout)
  finally:
    process.kill()
  assert process.returncode == code, f'exit code {process.returncode}\n{out}\n{err}'
  return out, err


def wait_for_step(process, out_dir, step, timeout=300):
  """Returns as soon as the record of `step` is in metrics.jsonl."""
  deadline = time.monotonic() + timeout
  while not any(record['step'] >= step for record in metrics(out_dir)):
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline, f'no step {step} after {timeout} s'
    time.sleep(0.002)


def metrics(out_dir, timing=False):
  """The records of metrics.jsonl, without what a clock or a compiler counted."""
  path = pathlib.Path(out_dir) / 'metrics.jsonl'
  lines = path.read_text().split('\n')[:-1] if path.exists() else []  # a torn last line is not one
  return [{name: value for name, value in json.loads(line).items()
           if timing or not name.startswith(_TIMING)} for line in lines]


def samples(out_dir):
  """What was drawn and what it earned, by samples.jsonl; rounding shows in none of it."""
  names = ('step', 'prompt', 'completion', 'reward', 'rewards', 'completion_tokens', 'truncated')
  lines = (pathlib.Path(out_dir) / 'samples.jsonl').read_text().splitlines()
  return [{name: json.loads(line)[name] for name in names} for line in lines]


def weights(out_dir):
  """The tensors of the exported model, by name."""
  return safetensors.numpy.load_file(pathlib.Path(out_dir) / 'model' / 'model.safetensors')


def assert_same_run(one, other):
  """Two run folders hold the same numbers, to the bit."""
  assert metrics(one) == metrics(other)
  first, second = weights(one), weights(other)
  assert first.keys() == second.keys()
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)
