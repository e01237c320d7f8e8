"""Standard errors and confidence intervals of evaluation numbers.

Samples of one prompt are alike, so the prompt, not the sample, is what is drawn independently:
standard errors are clustered by prompt.
"""

import dataclasses
import math

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean with its standard error."""
  mean: float
  se: float  # NaN for a single cluster, of which no spread is known
  num_clusters: int


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
  sums = np.array([np.sum(cluster, dtype=np.float64) for cluster in clusters])
  mean = sums.sum() / sizes.sum()
  if len(sizes) == 1:
    return Estimate(float(mean), math.nan, 1)
  residuals = sums - sizes * mean
  variance = len(sizes) / (len(sizes) - 1) * np.sum(residuals**2) / sizes.sum()**2
  return Estimate(float(mean), float(np.sqrt(variance)), len(sizes))


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
  z = stats.norm.ppf(0.5 + level / 2)
  centre = (fraction + z**2 / (2 * count)) / (1 + z**2 / count)
  half = z / (1 + z**2 / count) * math.sqrt(
      fraction * (1 - fraction) / count + z**2 / (4 * count**2))
  low = 0.0 if fraction == 0.0 else float(centre - half)  # exact, where rounding would not be
  return low, 1.0 if fraction == 1.0 else float(centre + half)


def student(estimate, level=0.95):
  """Returns the t-interval of an `Estimate`; (NaN, NaN) for a single cluster."""
  if estimate.num_clusters < 2:
    return math.nan, math.nan
  half = stats.t.ppf(0.5 + level / 2, estimate.num_clusters - 1) * estimate.se
  return float(estimate.mean - half), float(estimate.mean + half)
