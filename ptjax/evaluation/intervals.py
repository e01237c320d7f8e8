"""Standard errors and confidence intervals of evaluation numbers.

Samples of one prompt are alike, so the prompt, not the sample, is what is drawn independently:
standard errors are clustered by prompt. Fractions get Wilson's interval, means and ratios
Student's, and what is neither (F1, chrF, a calibration error) the bootstrap's.
"""

import dataclasses
import math

import numpy as np
from scipy import special  # its `stats` takes seconds to load


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean or a ratio with its standard error."""
  mean: float
  se: float  # NaN for a single cluster, of which no spread is known
  num_clusters: int


@dataclasses.dataclass(frozen=True)
class Metric:
  """A number with its standard error and interval; NaN where there is none."""
  value: float
  se: float
  low: float
  high: float


def clustered_mean(clusters):
  """Returns the mean over all values, with a standard error that treats clusters as the draws.

  Args:
    clusters: list of non-empty 1-D sequences, the values of each cluster (a prompt's samples).
  Returns:
    An `Estimate`. For clusters of one value each its error is the usual s / sqrt(n).
  Source: the cluster-robust (CR1) variance of a mean, e.g. Cameron and Miller 2015, section II.
  """
  sizes = np.array([len(cluster) for cluster in clusters], np.float64)
  if not len(sizes) or not sizes.all():
    raise ValueError('clustered_mean needs at least one cluster, and a value in each')
  return ratio_estimate([np.sum(cluster, dtype=np.float64) for cluster in clusters], sizes)


def ratio_estimate(numerators, denominators):
  """Returns sum(numerators) / sum(denominators), each pair of them one independent draw.

  Nats per token is such a ratio: what a document adds to both sums goes together.

  Args:
    numerators, denominators: [N] numbers; the denominators add up to more than 0.
  Returns:
    An `Estimate`.
  Source: the linearised variance of a ratio, Cochran 1977, eq. 6.13, with n / (n - 1).
  """
  numerators = np.asarray(numerators, np.float64)
  denominators = np.asarray(denominators, np.float64)
  count, total = len(denominators), denominators.sum()
  ratio = numerators.sum() / total
  if count == 1:
    return Estimate(float(ratio), math.nan, 1)
  residuals = numerators - denominators * ratio
  variance = count / (count - 1) * np.sum(residuals**2) / total**2
  return Estimate(float(ratio), float(np.sqrt(variance)), count)


def wilson(fraction, count, level=0.95):
  """Returns the Wilson score interval of a proportion; it stays inside [0, 1].

  It is also a (wide enough) interval for the mean of `count` values within [0, 1], such as each
  prompt's pass@k, since no such values spread more than zeros and ones of the same mean.

  Args:
    fraction: the observed proportion.
    count: the number of independent draws behind it.
    level: confidence, 0.95 for 95 %.
  Source: Wilson 1927; Brown, Cai and DasGupta 2001, section 3.1.1.
  """
  fraction = min(max(fraction, 0.0), 1.0)  # a mean of rounded values may stand just outside
  z = special.ndtri(0.5 + level / 2)
  centre = (fraction + z**2 / (2 * count)) / (1 + z**2 / count)
  half = z / (1 + z**2 / count) * math.sqrt(
      fraction * (1 - fraction) / count + z**2 / (4 * count**2))
  low = 0.0 if fraction == 0.0 else float(centre - half)  # exact, where rounding would not be
  return low, 1.0 if fraction == 1.0 else float(centre + half)


def student(estimate, level=0.95):
  """Returns the t-interval of an `Estimate`; (NaN, NaN) for a single cluster."""
  if estimate.num_clusters < 2:
    return math.nan, math.nan
  half = special.stdtrit(estimate.num_clusters - 1, 0.5 + level / 2) * estimate.se
  return float(estimate.mean - half), float(estimate.mean + half)


def proportion(clusters, level=0.95):
  """Returns the `Metric` of values within [0, 1], clustered, with Wilson's interval."""
  estimate = clustered_mean(clusters)
  return Metric(estimate.mean, estimate.se, *wilson(estimate.mean, estimate.num_clusters, level))


def mean(clusters, level=0.95):
  """Returns the `Metric` of any values, clustered, with the t-interval."""
  return _with_student(clustered_mean(clusters), level)


def ratio(numerators, denominators, level=0.95):
  """Returns the `Metric` of a `ratio_estimate`, with the t-interval."""
  return _with_student(ratio_estimate(numerators, denominators), level)


def bootstrap(statistic, count, level=0.95, *, resamples=1000, seed=0):
  """Returns the `Metric` of any statistic of independent draws, by resampling them.

  Args:
    statistic: `f(indices [count] int) -> float`, the value for those draws; NaN where it has none
      (such resamples are left out).
    count: the number of draws.
    level: of the percentile interval.
    resamples: how many.
    seed: of the resampling, so that equal draws have equal intervals.
  Source: Efron and Tibshirani 1993, chapters 6 and 13.
  """
  value = float(statistic(np.arange(count)))
  if count < 2:
    return Metric(value, math.nan, math.nan, math.nan)
  rng = np.random.default_rng(seed)
  values = np.array([statistic(rng.integers(count, size=count)) for _ in range(resamples)])
  values = values[~np.isnan(values)]
  if len(values) < 2:
    return Metric(value, math.nan, math.nan, math.nan)
  low, high = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])
  return Metric(value, float(values.std(ddof=1)), float(low), float(high))


def _with_student(estimate, level):
  return Metric(estimate.mean, estimate.se, *student(estimate, level))
