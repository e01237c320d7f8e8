"""Errors and intervals against scipy and closed forms."""

import math

import numpy as np
import pytest
from scipy import stats

from ptjax.evaluation import intervals


@pytest.mark.parametrize('successes, count', [(0, 10), (3, 10), (10, 10), (1, 1), (517, 1319)])
@pytest.mark.parametrize('level', [0.9, 0.95, 0.99])
def test_wilson_is_scipys(successes, count, level):
  expected = stats.binomtest(successes, count).proportion_ci(level, method='wilson')
  np.testing.assert_allclose(
      intervals.wilson(successes / count, count, level), [expected.low, expected.high],
      rtol=1e-12, atol=1e-15)


def test_wilson_of_a_mean_rounded_past_one():
  assert intervals.wilson(1 + 1e-16, 5) == intervals.wilson(1.0, 5)
  assert intervals.wilson(-1e-17, 5) == intervals.wilson(0.0, 5)


def test_student_is_scipys():
  values = np.random.default_rng(0).normal(size=12)
  estimate = intervals.clustered_mean(values[:, None])
  expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
  assert estimate.mean == pytest.approx(values.mean(), rel=1e-12)
  assert estimate.se == pytest.approx(stats.sem(values), rel=1e-12)
  np.testing.assert_allclose(intervals.student(estimate, 0.9), expected, rtol=1e-12)


def test_clusters_of_equal_size_count_as_their_means():
  values = np.random.default_rng(1).normal(size=(9, 4))
  estimate = intervals.clustered_mean(values)
  assert estimate.se == pytest.approx(stats.sem(values.mean(axis=1)), rel=1e-12)
  copies = intervals.clustered_mean(np.repeat(values, 5, axis=1))  # copies teach nothing
  assert copies.se == pytest.approx(estimate.se, rel=1e-12)


def test_clusters_of_unequal_size():
  clusters = [[1.0], [0.0, 2.0, 4.0], [3.0, 3.0]]
  estimate = intervals.clustered_mean(clusters)
  mean = 13 / 6
  residuals = [1 - mean, 6 - 3 * mean, 6 - 2 * mean]
  assert estimate.mean == pytest.approx(mean)
  assert estimate.se == pytest.approx(math.sqrt(1.5 * sum(r * r for r in residuals)) / 6)


def test_one_cluster_has_no_error():
  estimate = intervals.clustered_mean([[1.0, 0.0]])
  assert estimate.mean == 0.5 and math.isnan(estimate.se)
  assert all(math.isnan(bound) for bound in intervals.student(estimate))


@pytest.mark.parametrize('clusters', [[], [[1.0], []]])
def test_empty_clusters_are_an_error(clusters):
  with pytest.raises(ValueError, match='at least one cluster'):
    intervals.clustered_mean(clusters)


def test_a_ratio_is_the_slope_of_a_line_through_the_origin():
  rng = np.random.default_rng(2)
  tokens = rng.integers(5, 50, 40)
  nats = tokens * rng.normal(1.5, 0.2, 40)
  metric = intervals.ratio(nats, tokens)
  assert metric.value == pytest.approx(nats.sum() / tokens.sum(), rel=1e-12)
  # The delta method by hand: r = mean(nats) / mean(tokens).
  r, mean = metric.value, tokens.mean()
  cov = np.cov(nats, tokens, ddof=1)
  variance = (cov[0, 0] - 2 * r * cov[0, 1] + r**2 * cov[1, 1]) / mean**2 / 40
  assert metric.se == pytest.approx(math.sqrt(variance), rel=1e-9)
  half = stats.t.ppf(0.975, 39) * metric.se
  assert (metric.low, metric.high) == pytest.approx((r - half, r + half), rel=1e-12)


def test_the_bootstrap_of_a_mean_is_its_standard_error():
  values = np.random.default_rng(3).exponential(size=200)
  metric = intervals.bootstrap(lambda indices: values[indices].mean(), 200, resamples=4000)
  assert metric.value == pytest.approx(values.mean(), rel=1e-12)
  # The bootstrap's own spread: a standard deviation from 4000 draws is good to 1.1 %.
  assert metric.se == pytest.approx(values.std() / math.sqrt(200), rel=0.05)
  z = stats.norm.ppf(0.975)
  assert metric.low == pytest.approx(values.mean() - z * metric.se, abs=0.2 * metric.se)
  assert metric.high == pytest.approx(values.mean() + z * metric.se, abs=0.2 * metric.se)


def test_the_bootstrap_repeats_itself_and_narrows_with_the_level():
  values = np.arange(30.0)
  mean = lambda indices: values[indices].mean()
  assert intervals.bootstrap(mean, 30) == intervals.bootstrap(mean, 30)
  assert intervals.bootstrap(mean, 30) != intervals.bootstrap(mean, 30, seed=1)
  wide, narrow = intervals.bootstrap(mean, 30, 0.99), intervals.bootstrap(mean, 30, 0.8)
  assert wide.low < narrow.low < narrow.high < wide.high


def test_the_bootstrap_of_nothing_much():
  one = intervals.bootstrap(lambda indices: 4.0, 1)
  assert one.value == 4.0 and math.isnan(one.se) and math.isnan(one.low)
  # Resamples without a value are left out; with one value left there is no spread.
  none = intervals.bootstrap(lambda indices: math.nan, 5)
  assert math.isnan(none.value) and math.isnan(none.se)
