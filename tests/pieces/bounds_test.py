"""Range checks name the argument, what came and what was expected."""

import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.pieces import bounds


@pytest.mark.parametrize('call,message', [
    (lambda: bounds.positive(beta=0.0), 'beta=0.0: expected a number above 0'),
    (lambda: bounds.positive(beta=float('nan')), 'beta=nan'),
    (lambda: bounds.within(0, 0.5, e=0.5), r'e=0.5: expected a number in \[0, 0.5\)'),
    (lambda: bounds.within(0, 0.5, e=-0.1), 'e=-0.1'),
    (lambda: bounds.within(None, 0.5, e=0.0), r'e=0.0: expected a number in \(0, 0.5\)'),
    (lambda: bounds.fraction(decay=1.1), r'decay=1.1: expected a number in \[0, 1\]'),
    (lambda: bounds.choice(('a', 'b'), kind='c'), "kind='c': expected one of a, b"),
    (lambda: bounds.boolean((2,), labels=np.ones(2)), r'labels is float.*: expected bool\[2\]'),
    (lambda: bounds.boolean((2,), labels=np.ones(3, bool)), r'labels is bool\[3\]'),
    (lambda: bounds.per_row((2,), jnp.float32, scores=None), 'scores: .*got nothing'),
    (lambda: bounds.per_row((2,), jnp.float32, scores=np.ones((2, 1))), r'scores: .*\[2, 1\]'),
    (lambda: bounds.two_rows(np.ones((1, 3)), 'pairs are compared'),
     'a batch of 1: expected at least 2, because pairs are compared'),
])
def test_refusals(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_what_is_allowed():
  bounds.positive(beta=1e-3, alpha=2)
  bounds.within(0, 0.5, e=0)
  bounds.within(None, 1, e=0.5)
  bounds.fraction(a=0, b=1)
  bounds.choice(('a', 'b'), kind='b')
  bounds.boolean((2,), labels=np.array([True, False]))
  bounds.two_rows(np.ones(2), '')
  first, second = bounds.per_row((2,), jnp.float32, first=np.array([1, 2]), second=np.ones(2))
  assert first.dtype == second.dtype == jnp.float32
  assert bounds.per_row((2,), jnp.float32, only=np.ones(2)).shape == (2,)
