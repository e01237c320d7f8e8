"""How much would fit: the largest micro-batch and the largest rollout in a device's memory.

Every answer is a size whose programs were compiled and found to fit. Which sizes to try follows
from two of them: caches and activations grow by as much with every prompt.
"""

import dataclasses

ROOM = 0.92  # of a device's memory that a run may fill; the rest is the allocator's and driver's
_TRIES = 3  # guesses compiled at most
_FULL = 0.97  # of what may be filled: a rollout that takes so much is large enough
KEPT = 'rollout, kept by the allocator'  # part of an update's memory, where a CPU runs it
MOST = 64  # times the rollout asked for, past which nobody wants to know


@dataclasses.dataclass(frozen=True)
class Fit:
  """What fits into a device's memory.

  Attributes:
    limit: bytes of it that a run may fill.
    micro_batches: the fewest parts in which the update fits; None if it fits in none.
    prompts: prompts of such a part, or examples where rows hold several, of all devices together;
      None likewise.
    rollout: the largest rollout.num_prompts, in micro-batches no larger than the run's own; None
      for offline stages, 0 if not even the smallest fits.
  """
  limit: float
  micro_batches: int | None
  prompts: int | None
  rollout: int | None


def fit(plan, estimate, measure, devices, memory):
  """Finds what fits.

  Args:
    plan: stages.StagePlan.
    estimate: planner.StageEstimate of it.
    measure: `measure(plan, parts) -> planner.StageEstimate` of a changed plan.
    devices: into how many parts a batch is split over them.
    memory: GiB of a device; None: not known.
  Returns:
    Fit, or None where the memory is not known.
  """
  if memory is None:
    return None
  limit = ROOM * memory * 2**30
  training = plan.config.training
  whole = plan.config.rollout.num_prompts // training.mini_batches if plan.online else (
      training.batch_size)
  count = _fewest_parts(plan, estimate, measure, whole // devices, limit)
  rollout = _largest_rollout(plan, estimate, measure, devices, limit) if plan.online else None
  return Fit(limit, count, None if count is None else whole // count, rollout)


def _phase_peak(estimate, wanted):
  """Bytes on a device in the fullest of the phases whose name `wanted` says yes to."""
  return sum(estimate.resident.values()) + max(
      sum(parts.values()) for name, parts in estimate.phases.items() if wanted(name))


def _fewest_parts(plan, estimate, measure, rows, limit):
  """The fewest micro-batches whose update fits; `rows` of a device are to be divided."""
  is_update = lambda name: name == 'update'
  now = plan.config.training.micro_batches
  counts = divisors(rows)
  known = {now: _phase_peak(estimate, is_update)}
  kept = estimate.phases['update'].get(KEPT, 0)

  def fits(count):
    if count not in known:
      known[count] = kept + _phase_peak(
          measure(changed(plan, micro_batches=count), ('update',)), is_update)
    return known[count] <= limit
  low, high = 0, len(counts)  # the answer lies in counts[low:high + 1]; high: none fits
  if now in counts:  # asked first, for it is known
    low, high = (0, counts.index(now)) if fits(now) else (counts.index(now) + 1, high)
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if fits(counts[middle]) else (middle + 1, high)
  return counts[low] if low < len(counts) else None


def _largest_rollout(plan, estimate, measure, devices, limit):
  """The largest rollout.num_prompts that can be drawn and passed over."""
  config = plan.config
  unit = devices * config.training.mini_batches
  now, most = config.rollout.num_prompts, MOST * config.rollout.num_prompts
  part = now // (config.training.mini_batches * config.training.micro_batches)
  in_rollout = lambda name: name != 'update'
  update = estimate.phases['update']
  beside = sum(size for part, size in update.items() if part != KEPT) if KEPT in update else 0
  known = {now: beside + _phase_peak(estimate, in_rollout)}

  def peak(size):
    if size not in known:
      rows = size // config.training.mini_batches
      parts = next(n for n in divisors(rows // devices) if rows // n <= part)
      sized = changed(plan, micro_batches=parts, num_prompts=size)
      known[size] = beside + _phase_peak(measure(sized, ('rollout', 'passes')), in_rollout)
    return known[size]

  peak(2 * now)
  for _ in range(_TRIES):
    if any(_FULL * limit <= held <= limit for held in known.values()):
      break
    # The line through the two sizes nearest to the limit; its guess is compiled in its turn.
    nearest = sorted(known.items(), key=lambda item: abs(item[1] - limit))[:2]
    (small, low), (large, high) = sorted(nearest)
    slope = (high - low) / (large - small)
    guess = most if slope <= 0 else min(most, small + (limit - low) / slope)
    guess = int(guess) // unit * unit
    if guess < unit or guess in known:
      break
    peak(guess)
  return max((size for size, held in known.items() if held <= limit), default=0)


def changed(plan, *, micro_batches, num_prompts=None):
  """The plan of a stage in which a run would change only these."""
  config = plan.config
  config = dataclasses.replace(
      config, training=dataclasses.replace(config.training, micro_batches=micro_batches))
  if num_prompts is not None:
    config = dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, num_prompts=num_prompts))
  return dataclasses.replace(plan, config=config)


def divisors(number):
  """Returns all divisors, ascending."""
  return [n for n in range(1, number + 1) if number % n == 0]
