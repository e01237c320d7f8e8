"""PRNG streams: every random number is a function of (seed, stream name, counters).

No key is ever stored, so a resumed run draws exactly what the uninterrupted run would have drawn.
"""

import zlib

import jax


def stream(seed, name, *counters):
  """Returns the key of stream `name`, folded with each of `counters` in turn.

  Args:
    seed: int, the run's seed.
    name: what the numbers are for, e.g. `'rollout'`; streams of different names are independent.
    *counters: ints (Python or traced), e.g. the step.
  """
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
  for counter in counters:
    key = jax.random.fold_in(key, counter)
  return key


def per_sequence(key, prompt_ids, sample_ids):
  """One key per completion, from its prompt and sample number alone.

  Args:
    key: the step's key, e.g. `stream(seed, 'rollout', step)`.
    prompt_ids: [P] int32; which prompt, the same in any batch or order.
    sample_ids: [P, G] int32; which of the prompt's samples.
  Returns:
    [P * G] keys, prompt-major.
  """
  def one(prompt_id, samples):
    prompt_key = jax.random.fold_in(key, prompt_id)
    return jax.vmap(lambda sample: jax.random.fold_in(prompt_key, sample))(samples)
  return jax.vmap(one)(prompt_ids, sample_ids).reshape(-1)
