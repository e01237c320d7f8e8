"""Rates given, of a data sheet, or measured."""

import pytest

import jax

from ptjax import config as settings
from ptjax import overrides
from ptjax import sharding
from ptjax.models import presets
from ptjax.plan import rates

SMALL = presets.get('tiny')
HALF = presets.get('tiny', dtype='bfloat16')


@pytest.fixture(scope='module')
def one():
  return sharding.make_mesh('', jax.devices()[:1])


def test_measured_rates_are_those_of_a_computer(one):
  found = rates.assumed(settings.PlanSettings(), SMALL, one)
  assert 1e8 < found.flops < 1e16 and 1e7 < found.bytes < 1e14
  assert 0.5 < found.memory < 1e5
  assert found.name == 'products and copies measured here now'


def test_several_virtual_devices_stand_for_gpus():
  mesh = sharding.make_mesh('fsdp=8')
  single, half = (rates.assumed(settings.PlanSettings(), model, mesh) for model in (SMALL, HALF))
  assert (single.flops, half.flops) == (0.4 * 494e12, 0.4 * 989e12)
  assert (half.bytes, half.link, half.memory) == (0.4 * 3.35e12, 0.4 * 450e9, 80)
  assert half.name == '40% of the data sheet of H100'


def test_what_is_given_wins(one):
  options = settings.PlanSettings(
      device='H200', peak_tflops=700.0, link_gb_per_second=100.0, efficiency=0.5, memory_gib=40.0)
  found = rates.assumed(options, HALF, one)
  assert (found.flops, found.bytes, found.link) == (350e12, 0.5 * 4.8e12, 50e9)
  assert found.memory == 40.0 and found.network == 25e9
  assert found.name == '50% of the peaks given, else 50% of the data sheet of H200'


def test_an_unknown_device_is_refused(one):
  with pytest.raises(settings.UserError, match='plan.device=H300: no data sheet; did you mean H'):
    rates.assumed(settings.PlanSettings(device='H300'), SMALL, one)


@pytest.mark.parametrize('assignment', ['plan.peak_tflops=0', 'plan.efficiency=1.5'])
def test_rates_that_cannot_be_are_refused(assignment):
  with pytest.raises(settings.UserError, match=assignment.partition('=')[0]):
    overrides.override(settings.Config(), assignment)
