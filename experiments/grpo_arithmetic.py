"""The default job: a tiny model from scratch learns to add, first by imitation, then by GRPO.

Command: python -m ptjax.launch --config=experiments/grpo_arithmetic.py
  (the same run as `python -m ptjax.launch --algo=grpo`)
Hardware: two CPU cores.
Expected time: about two minutes.
Number to reach: held-out accuracy below 0.5 after the warm start, above 0.9 after GRPO.
"""

from ptjax import experiment


def get_config():
  return experiment.tiny_job()
