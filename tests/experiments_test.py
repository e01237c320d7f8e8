"""Every experiment file is a page that says what it is, holds a sound config and can be planned."""

import ast
import os
import pathlib
import re
import subprocess
import sys

from absl.testing import flagsaver
import jax
import pytest

from ptjax import assembly
from ptjax import experiment
from ptjax import launch
from ptjax import stages
from ptjax.plan import planner
from ptjax.training import algorithm as binding

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / 'experiments').glob('*.py'))
PLANNED = {  # file -> what its plan must say
    'grpo_arithmetic': ('stage sft', 'stage grpo', '0.8 M parameters', 'planned on 1 cpu device\n',
                        'measured here now'),
    'grpo_gsm8k_qwen2_5_0_5b': ('494.0 M parameters', '64 prompts x 8, up to 256 + 512 tokens',
                                'planned on 1 cpu device\n', 'data sheet of H100'),
    'grpo_gsm8k_qwen2_5_7b': ('7,615.6 M parameters', '128 prompts x 8, up to 256 + 1024 tokens',
                              'fsdp=8, tensor=1, planned on 8 cpu devices', 'data sheet of H100'),
    'hybrid_arithmetic': ('stage hpt', '0.8 M parameters', 'planned on 1 cpu device\n'),
    'gpt2_sft_dpo_lora': ('stage sft', 'stage dpo', '124.4 M parameters', 'packed rows of'),
}


@pytest.fixture(scope='module', autouse=True)
def eight_devices():
  """Planning asks for as many devices as a mesh names, unless there are some already."""
  assert len(jax.devices()) == 8


def test_every_experiment_has_a_planned_row():
  assert {path.stem for path in FILES} == set(PLANNED)


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_the_page_says_how_and_how_far(path):
  text = ast.get_docstring(ast.parse(path.read_text()))
  for heading in ('Command: ', 'Hardware: ', 'Expected time: ', 'Number to reach: '):
    assert heading in text, heading
  assert f'--config=experiments/{path.name}' in text
  for heading in ('Expected time: ', 'Number to reach: '):
    said = text.partition(heading)[2]
    assert re.match(r'not yet run|[^\n]*(\d|minutes|hours)', said), (heading, said)


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_the_config_is_sound(path):
  config = experiment.from_file(str(path))
  mesh = planner.planning_mesh(config.mesh or 'fsdp=1')
  plans = stages.stage_plans(config)
  policies = assembly.load_policies(config, plans, load=planner.load_policy)
  assembly.check(plans, policies['policy'].config, mesh)
  for plan in plans:
    binding.bind(plan.row, plan.hyperparameters)


@pytest.mark.slow
@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_the_launcher_plans_it_without_the_hardware(path, tmp_path):
  """As a user would, on a machine without network, weights or GPU."""
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu',
                 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path / 'hub')}
  environment.pop('XLA_FLAGS')  # of this test run, with its eight devices
  done = subprocess.run(
      [sys.executable, '-m', 'ptjax.launch', '--plan', f'--config={path}',
       '--set=log.compile_cache=none'],
      cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  phases = ['KV cache of completions'] if 'gpt2' not in path.stem else []
  for words in (*PLANNED[path.stem], *phases, '"num_prompts"', 'update: gradients', 'together'):
    assert words in done.stdout, words
  assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize('arguments, message', [
    (['--mesh=data=1,fsdp=7,tensor=1'], 'does not split over data x fsdp = 7 devices'),
    (['--mesh=fsdp=8,tensors=1'], 'did you mean tensor'),
    (['--config=experiments/none.py'], 'no such file'),
    (['--model=owner/unknown-model'], 'there is no directory owner/unknown-model'),
])
def test_the_launcher_refuses_in_one_line(arguments, message, capsys):
  cache = jax.config.jax_compilation_cache_dir
  with flagsaver.flagsaver():
    assert launch.main(['ptjax', '--plan', *arguments]) == 2
  jax.config.update('jax_compilation_cache_dir', cache)
  out, err = capsys.readouterr()
  assert message in err and not out and len(err.strip().splitlines()) == 1, err
