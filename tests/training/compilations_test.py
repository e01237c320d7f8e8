"""A step that compiles again says which array of its batch changed."""

import logging

import jax
import numpy as np

from ptjax.training import compilations


def _batch(rows, width, dtype=np.float32):
  return {'tokens': np.zeros((rows, width), dtype), 'lengths': np.zeros(rows, np.int32)}


def test_a_new_shape_is_named(caplog):
  counter = compilations.Compilations()
  step = counter.watched(jax.jit(lambda state, batch: state + batch['tokens'].sum()))
  with caplog.at_level(logging.WARNING):
    step(0.0, _batch(2, 8))
    step(0.0, _batch(2, 16))  # the second call is still warming up
    step(0.0, _batch(2, 8))
    assert not caplog.messages
    step(0.0, _batch(2, 24))
    step(0.0, _batch(2, 24))
  assert counter.count >= 3
  message, = caplog.messages
  assert 'tokens float32[2,8] -> float32[2,24]' in message and 'lengths' not in message


def test_a_new_dtype_and_a_new_combination_are_named(caplog):
  step = compilations.Compilations().watched(jax.jit(lambda state, batch: batch['tokens'].sum()))
  for batch in (_batch(2, 8), _batch(3, 16), _batch(2, 8, np.int32)):
    step(0.0, batch)
  assert 'float32[3,16] -> int32[2,8]' in caplog.messages[-1]
  step(0.0, {**_batch(2, 8), 'lengths': np.zeros(3, np.int32)})
  assert 'combination' in caplog.messages[-1]
