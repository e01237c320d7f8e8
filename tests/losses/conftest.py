"""No implicit promotion of dtypes in this room: a float64 or integer that slips in is a fault."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_dtypes():
  with jax.numpy_dtype_promotion('strict'):
    yield
