#!/usr/bin/env python
"""How long every loss takes: to trace and compile, and to run with its gradient.

  python scripts/bench_losses.py
  python scripts/bench_losses.py --repeats=31 grpo dpo kto

Each row of the algorithm table gets random inputs, 512 completions of 1024 tokens (256 pairs, for
the losses on pairs), and is called as the train step calls it. Times are of the jitted value and
gradient by everything a model would differentiate. The bars are 1 s and 20 ms on two cores. On a
machine shared with others the CPU seconds of compiling and the least time say more than the clock
and the median.
"""

import argparse
import inspect
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from ptjax import algorithms
from ptjax import types
from ptjax.training import algorithm
from ptjax.training import step as training_step

COMPILE_SECONDS, RUN_MILLISECONDS = 1.0, 20.0
ATTACHED = ('log_probs', 'entropy', 'values', 'divergence', 'step_logits', 'chosen_rewards',
            'rejected_rewards', 'preference_logits')


def make_inputs(completions, tokens):
  """Every array a loss may name, by its name."""
  rng = np.random.default_rng(0)
  pairs = completions // 2
  shapes = {
      **dict.fromkeys((
          'log_probs', 'entropy', 'divergence', 'values', 'old_values', 'returns', 'old_log_probs',
          'reference_log_probs', 'teacher_log_probs', 'mismatched_log_probs',
          'mismatched_reference_log_probs'), (completions, tokens)),
      **dict.fromkeys(('advantages', 'rewards', 'desirable_probabilities', 'margins',
                       'preference_logits', 'chosen_rewards', 'rejected_rewards'), (completions,)),
      **dict.fromkeys(('chosen_scores', 'rejected_scores', 'chosen_win_probabilities',
                       'rejected_win_probabilities'), (pairs,)),
      **dict.fromkeys(('chosen_sum_squares', 'rejected_sum_squares', 'demonstration_log_probs',
                       'corrupted_log_probs', 'corrupted_reference_log_probs'), (pairs, tokens)),
      'step_logits': (completions, tokens, 2)}
  inputs = {name: rng.uniform(-2.0, 0.0, shape).astype(np.float32)
            for name, shape in shapes.items()}
  mask = lambda rows: np.arange(tokens) < rng.integers(1, tokens + 1, (rows, 1))
  flag = lambda rows: rng.uniform(size=rows) < 0.5
  demonstration = np.arange(completions) % 8 == 7
  return {
      **inputs, 'loss_mask': mask(completions), 'mismatched_loss_mask': mask(completions),
      'demonstration_loss_mask': mask(pairs), 'step_mask': mask(completions),
      'step_labels': mask(completions), 'labels': flag(completions),
      'reference_drew_chosen': flag(pairs), 'demonstration': demonstration,
      'from_rollouts': ~demonstration, 'imitated': demonstration & flag(completions),
      'off_policy': demonstration & flag(completions)}


def objective_of(row, inputs):
  """Returns `(attached, rest) -> loss` and its two arguments."""
  loss = algorithm.bind(row, {}).loss
  first, *others = inspect.signature(loss).parameters
  names = {first, *others, 'reference_log_probs', 'loss_mask'}
  if first in ('pair', 'side'):
    names.add('log_probs')
  chosen = {name: x for name, x in inputs.items() if name in names}
  if row.name == 'reward_kwise':  # 4 ranked responses per prompt
    chosen['rewards'] = chosen['rewards'].reshape(-1, 4)
    chosen['ranks'] = np.tile(np.arange(4, dtype=np.int32), (len(chosen['rewards']), 1))
  attached = {n: chosen.pop(n) for n in (*ATTACHED, first) if n in chosen}
  mask = chosen.pop('loss_mask')
  def objective(attached, rest, mask, key):
    batch = types.TokenBatch(prompt_tokens=None, prompt_lengths=None, tokens=None,
                             loss_mask=mask, on_policy=None, inputs=rest)
    return training_step.call(loss, attached, batch, key=key)[0]
  return objective, (*jax.tree.map(jnp.asarray, (attached, chosen, mask)), jax.random.key(0))


def measure(row, inputs, repeats):
  """Returns seconds to trace and compile, CPU seconds of it, and milliseconds of each run."""
  objective, arguments = objective_of(row, inputs)
  started, busy = time.perf_counter(), time.process_time()
  program = jax.jit(jax.value_and_grad(objective)).lower(*arguments).compile()
  compiled, busy = time.perf_counter() - started, time.process_time() - busy
  jax.block_until_ready(program(*arguments))
  runs = []
  for _ in range(repeats):
    started = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    runs.append(1e3 * (time.perf_counter() - started))
  return compiled, busy, runs


def main(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('names', nargs='*', help='rows of the table; default all')
  parser.add_argument('--repeats', type=int, default=15)
  parser.add_argument('--completions', type=int, default=512)
  parser.add_argument('--tokens', type=int, default=1024)
  options = parser.parse_args(arguments)
  inputs = make_inputs(options.completions, options.tokens)
  print(f'[{options.completions}, {options.tokens}] float32, {os.cpu_count()} cores, load '
        f'{os.getloadavg()[0]:.1f}, JAX {jax.__version__} on {jax.default_backend()}')
  print('| loss | compile s | of it CPU | median ms | least ms | over the bar |\n'
        '| --- | ---: | ---: | ---: | ---: | --- |')
  seen, over, unhurried = {}, 0, 0
  for name in options.names or algorithms.names():
    row = algorithms.get(name)
    key = (row.loss, str(sorted(row.hyperparameters().items())))
    if seen.setdefault(key, name) != name:
      continue  # the same loss on other data
    compiled, busy, runs = measure(row, inputs, options.repeats)
    median = statistics.median(runs)
    slow_compile, slow_run = compiled > COMPILE_SECONDS, median > RUN_MILLISECONDS
    over += slow_compile or slow_run
    unhurried += busy > COMPILE_SECONDS or min(runs) > RUN_MILLISECONDS
    misses = ', '.join(['compile'] * slow_compile + ['run'] * slow_run)
    print(f'| {name} | {compiled:.2f} | {busy:.2f} | {median:.1f} | {min(runs):.1f} '
          f'| {misses} |', flush=True)
  print(f'\n{len(seen)} losses: {over} over a bar by the clock, '
        f'{unhurried} by CPU seconds or least time')


if __name__ == '__main__':
  main()
