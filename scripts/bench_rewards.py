"""What a slow reward costs beside drawing: rollouts in one part, and in several.

    python scripts/bench_rewards.py                       # a reward of 200 ms per rollout
    python scripts/bench_rewards.py --milliseconds=1000 --prompts=64

The reward sleeps, in proportion to the completions it is given, as one that asks a server or runs
tests does. Printed are the seconds of a rollout with its rewards, and as a fraction of what drawing
and scoring take one after the other.
"""

import argparse
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from ptjax import assembly
from ptjax import config as settings
from ptjax import doors
from ptjax import process
from ptjax import sharding
from ptjax import stage_run
from ptjax import stages
from ptjax.rewards import combine


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--milliseconds', type=float, default=200.0, help='per rollout')
  parser.add_argument('--prompts', type=int, default=32)
  parser.add_argument('--group', type=int, default=8)
  parser.add_argument('--tokens', type=int, default=64, help='per completion')
  parser.add_argument('--parts', type=int, nargs='+', default=[1, 2, 4])
  parser.add_argument('--repeats', type=int, default=7)
  arguments = parser.parse_args()
  count = arguments.prompts * arguments.group

  def slow(prompts, completions):
    time.sleep(arguments.milliseconds / 1e3 * len(completions) / count)
    return [float(len(text)) for text in completions]

  config = settings.Config(
      rollout=settings.RolloutSettings(num_prompts=arguments.prompts, group_size=arguments.group,
                                       max_completion_tokens=arguments.tokens))
  process.use_compile_cache(config.log.compile_cache)
  plan, = stages.stage_plans(config)
  policies = assembly.load_policies(config, [plan])
  mesh = sharding.make_mesh()
  data = doors.load_data(config, [plan], policies['policy'])
  with tempfile.TemporaryDirectory() as folder, combine.load([slow]) as rewards:
    made = stage_run.StageRun(plan, policies, data, mesh, pathlib.Path(folder))
    params = made.begin(None).params
    collectors = {parts: made.collector(data.doors[0], made.samplers(), {}, rewards)
                  for parts in arguments.parts}
    for parts, collector in collectors.items():
      collector.overlap = parts
      collector(params, 0)  # compiles
    drawing, seconds = [], {parts: [] for parts in arguments.parts}
    for repeat in range(arguments.repeats):  # in turns, so that a busy machine slows all alike
      for parts, collector in collectors.items():
        start = time.perf_counter()
        metrics = collector(params, 1 + repeat).metrics
        seconds[parts].append(time.perf_counter() - start)
        if parts == 1:
          drawing.append(metrics['timing_s/rollout'])
  if drawing:
    print(f'drawing alone {min(drawing):.3f} s, reward {arguments.milliseconds / 1e3:.3f} s')
  # The least of several: whatever else the machine does only adds.
  serial = min(seconds[arguments.parts[0]])
  print('parts  seconds  of the first')
  for parts, found in seconds.items():
    print(f'{parts:5}  {min(found):7.3f}  {min(found) / serial:.2f}')


if __name__ == '__main__':
  main()
