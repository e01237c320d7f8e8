"""A run whose completions share rows trains as one whose rows are padded."""

import pathlib
import sys

import numpy as np
import pytest

from ptjax.training import packing

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import job_runs


@pytest.mark.slow
def test_packed_and_padded_runs_agree(tmp_path, compile_cache, monkeypatch):
  packed = []

  class Watched(packing.Packer):

    def __init__(self, **options):
      super().__init__(**{**options, 'always': True})

    def __call__(self, batch):
      found = super().__call__(batch)
      packed.append(found.packed)
      return found
  monkeypatch.setattr(packing, 'Packer', Watched)

  model = job_runs.export_model(tmp_path / 'model', num_layers=1)
  runs = {}
  for setting in ('true', 'false'):
    # The reference and recomputed old log-probs are passes over packed rows too.
    assert job_runs.launch_here(job_runs.arguments(
        model, tmp_path / setting, compile_cache, '--steps=4', data__packing=setting,
        rollout__max_completion_tokens=24, training__mini_batches=2, training__epochs=2,
        loss__kl_coefficient=0.04, eval__limit=4)) == 0
    runs[setting] = job_runs.metrics(tmp_path / setting)
  assert len(packed) == 6 and all(packed)  # two passes and four updates, where packing is on
  assert len(runs['true']) == len(runs['false']) == 5
  for one, other in zip(runs['true'][1:], runs['false'][1:]):
    assert one['reward'] == other['reward']  # the same completions
    for name, value in other.items():
      if isinstance(value, float) and not name.startswith(('timing_s/', 'perf/', 'step_time')):
        # Adam divides by gradients so small that float32's rounding shows in a few weights.
        np.testing.assert_allclose(one[name], value, rtol=2e-3, atol=2e-5, err_msg=name)
