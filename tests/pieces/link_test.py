"""Links: values and slopes in float64 NumPy, and their behaviour far out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.pieces import link


def log_sigmoid(x):
  return -np.logaddexp(0.0, -x)


def sigmoid(x):
  return np.exp(log_sigmoid(x))


def smoothed(h, e):
  return -(1 - e) * log_sigmoid(h) - e * log_sigmoid(-h)


# name -> (link, its value in NumPy)
LINKS = {
    'logistic': (link.logistic, lambda h: -log_sigmoid(h)),
    'logistic smoothed': (lambda h: link.logistic(h, 0.1), lambda h: smoothed(h, 0.1)),
    'robust': (lambda h: link.robust(h, 0.1),
               lambda h: (-0.9 * log_sigmoid(h) + 0.1 * log_sigmoid(-h)) / 0.8),
    'hinge': (link.hinge, lambda h: np.maximum(0.0, 1 - h)),
    'exponential': (link.exponential, lambda h: np.exp(-h)),
    'squared': (link.squared, lambda h: (1 - h) ** 2),
    'truncated_quadratic': (link.truncated_quadratic, lambda h: np.maximum(0.0, 1 - h) ** 2),
    'savage': (link.savage, lambda h: sigmoid(-h) ** 2),
    'reverse_kl': (lambda h: link.reverse_kl(h, 0.1), lambda h: (
        sigmoid(h) * np.log(sigmoid(h) / 0.9) + sigmoid(-h) * np.log(sigmoid(-h) / 0.1))),
    'logistic_exponential': (lambda h: link.logistic_exponential(h, 0.5), lambda h: (
        -sigmoid(-h / 0.5) * log_sigmoid(h) + sigmoid(h / 0.5) * np.exp(-h))),
    'focal': (lambda h: link.focal(h, 0.7), lambda h: -sigmoid(h) ** 0.7 * log_sigmoid(h)),
    'squared_error': (lambda h: link.squared_error(h, 2.0), lambda h: (h - 2.0) ** 2),
    'silu': (link.silu, lambda h: -h * sigmoid(-h)),
    'probability': (link.probability, sigmoid),
}
H = np.array([-4.0, -1.3, -0.2, 0.1, 0.7, 1.9, 5.0])


@pytest.mark.parametrize('name', LINKS)
def test_value_and_slope(name):
  function, reference = LINKS[name]
  with jax.enable_x64(True):
    values, slopes = jax.vmap(jax.value_and_grad(function))(jnp.asarray(H))
  np.testing.assert_allclose(values, reference(H), rtol=1e-11, atol=1e-14)
  central = (reference(H + 1e-5) - reference(H - 1e-5)) / 2e-5
  np.testing.assert_allclose(slopes, central, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('name', LINKS)
def test_finite_far_out(name):
  values, slopes = jax.vmap(jax.value_and_grad(LINKS[name][0]))(
      jnp.array([-1e4, -200.0, -50.0, 0.0, 50.0, 200.0, 1e4]))
  assert np.isfinite(values).all() and np.isfinite(slopes).all()


def test_lowest_points():
  """EXO: 0 at log((1 - ε) / ε). cDPO: the same place. SPO: -0.2785 at 1.2785."""
  target = jnp.asarray(np.log(9.0), jnp.float32)
  for function in (lambda h: link.reverse_kl(h, 0.1), lambda h: link.logistic(h, 0.1)):
    np.testing.assert_allclose(jax.grad(function)(target), 0.0, atol=1e-6)
  np.testing.assert_allclose(link.reverse_kl(target, 0.1), 0.0, atol=1e-6)
  value, slope = jax.value_and_grad(link.silu)(1.2785)
  np.testing.assert_allclose([value, slope], [-0.2785, 0.0], atol=1e-4)


def test_probability_keeps_its_slope_in_both_tails():
  slopes = jax.vmap(jax.grad(link.probability))(jnp.array([-30.0, 30.0]))
  np.testing.assert_allclose(slopes, np.exp(-30.0), rtol=1e-4)


def test_kinks_belong_to_the_flat_side():
  assert jax.grad(link.hinge)(1.0) == jax.grad(link.truncated_quadratic)(1.0) == 0.0


@pytest.mark.parametrize('call,message', [
    (lambda: link.logistic(0.0, 0.5), r'label_smoothing=0.5.*\[0, 0.5\)'),
    (lambda: link.robust(0.0, -0.1), 'label_smoothing=-0.1'),
    (lambda: link.reverse_kl(0.0, 0.0), r'label_smoothing=0.0.*\(0, 0.5\)'),
    (lambda: link.logistic_exponential(0.0, -1.0), 'temperature=-1.0'),
    (lambda: link.focal(0.0, -1.0), 'exponent=-1.0'),
])
def test_bad_hyperparameters_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
