"""Charts keep what the eye would miss and draw every range."""

import math
import re

import pytest

from ptjax.training import charts


def test_thinning_keeps_ends_and_extremes():
  points = [(i, math.sin(i / 50)) for i in range(5000)]
  points[1234] = (1234, 99.0)
  points[4321] = (4321, -99.0)
  kept = charts.thin(points, 100)
  assert len(kept) <= 100 and set(kept) <= set(points)
  assert {points[0], points[-1], points[1234], points[4321]} <= set(kept)
  assert kept == sorted(kept) and charts.thin(points[:7], 7) == points[:7]


@pytest.mark.parametrize('points', [
    [(3, 5.0)], [(1, 0.0), (2, 0.0)], [(1, 1e-300), (2, 3e-300)], [(1, -1e30), (2, 1e30)],
    [(0, 7), (10**9, 7)], [(1, 1.0), (2, 1.0 + 1e-15)]])
def test_odd_ranges_are_drawn(points):
  svg = charts.line_chart('m', [points])
  for number in re.findall(r' c?[xy][12]?="([^"]*)"', svg) + re.findall(
      r'-?[\d.]+,-?[\d.]+', svg):
    for part in number.split(','):
      assert -5 <= float(part) <= charts.WIDTH + 5
  assert 1 <= svg.count('class="grid"') <= 8


@pytest.mark.parametrize('low,high,expected', [
    (0, 10, [0, 2.5, 5, 7.5, 10]), (-0.1, 1.1, [0, 0.5, 1]),
    (95, 105, [95, 97.5, 100, 102.5, 105])])
def test_ticks_are_round(low, high, expected):
  assert charts.ticks(low, high) == pytest.approx(expected)
