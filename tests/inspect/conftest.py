"""Every row of the table taken apart once, in float64; shared by the slow tests here."""

import jax
import pytest

from ptjax import algorithms
from ptjax import inspect
from ptjax.inspect import example


@pytest.fixture(scope='session')
def taken_apart():
  """`taken_apart(name)` is the Inspection of a row on the built-in batch."""
  found = {}

  def one(name):
    if name not in found:
      with jax.enable_x64(True):
        row = algorithms.TABLE[name]
        found[name] = inspect.inspect_loss(
            row, example.batch(row.loss), tokens=example.tokens(), pull_back=example.pull_back)
    return found[name]
  return one
