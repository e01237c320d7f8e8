"""Random streams: a function of seed, name and counters, and different for each."""

import jax
import jax.numpy as jnp
import numpy as np

from ptjax import keys


KNOWN = (1187823272, 316993317)  # of seed 0, 'rollout', 7


def bits(key):
  return tuple(np.asarray(jax.random.key_data(key)).reshape(-1).tolist())


def test_every_seed_name_and_counter_is_another_stream():
  streams = [bits(keys.stream(seed, name, *counters)) for seed in (0, 1)
             for name in ('rollout', 'init') for counters in ((), (0,), (1,), (0, 1), (1, 0))]
  assert len(set(streams)) == len(streams)
  assert bits(keys.stream(3, 'init', 5)) == bits(keys.stream(3, 'init', 5))


def test_known_streams_stay_as_they_are():
  # Another value here makes resumed and repeated runs differ from what they were.
  assert bits(keys.stream(0, 'rollout', 7)) == KNOWN


def test_counters_may_be_traced():
  traced = jax.jit(lambda step: jax.random.key_data(keys.stream(0, 'rollout', step)))(7)
  assert tuple(np.asarray(traced).tolist()) == KNOWN


def test_a_sequence_keeps_its_key_in_any_batch_and_order():
  key = keys.stream(0, 'rollout', 1)
  ids, samples = jnp.array([5, 9, 2]), jnp.array([[0, 1], [0, 1], [4, 3]])
  whole = jax.random.key_data(keys.per_sequence(key, ids, samples))
  assert whole.shape[0] == 6 and len({tuple(row) for row in np.asarray(whole).tolist()}) == 6
  alone = jax.random.key_data(keys.per_sequence(key, ids[2:], samples[2:, ::-1]))
  np.testing.assert_array_equal(alone, whole[4:][::-1])
