"""The named core learns: what each method optimises improves on held-out text, beyond noise.

All train the real small model on real sentences. What is preferred is a trait that the model is
indifferent to at first and that the text alone tells: speech before narration. Training and
held-out rows come from different stories.

The margin: held-out numbers come with their standard errors, and a change counts when it exceeds
four standard errors of the difference (of independent measurements; these are of the same rows,
which makes it stricter). With eight batches behind each error one run in a thousand passes by luck.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import random
import re
import sys

import jax
import pytest

from ptjax.models import hub
from ptjax.models import transformer

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import job_runs

STANDARD_ERRORS = 4.0
HELD_OUT = 64  # rows
MODEL = 'models/stories260K'


@pytest.fixture(scope='module')
def files(shared_data, tmp_path_factory):
  """A folder of rows: `NAME.jsonl` to train on and `NAME_held_out.jsonl`."""
  folder = tmp_path_factory.mktemp('learning')
  text = (shared_data / 'tinystories' / 'tinystories_val_a.txt').read_text()
  pieces = [piece.replace('\n', ' ') for piece in text.split('\n\n') if len(piece) > 40]
  half = len(pieces) * 3 // 4
  for part, own in (('', pieces[:half]), ('_held_out', pieces[half:])):
    for name, rows in _stories(own).items():
      rows = rows[:HELD_OUT] if part else rows
      (folder / f'{name}{part}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  poems = (shared_data / 'shakespeare' / 'sonnets.txt').read_text().splitlines()
  lines = [line.strip() for line in poems if len(line.strip()) > 20]
  couples = [{'prompt': one, 'completion': ' ' + other} for one, other in zip(lines, lines[1:])]
  for part, own in (('', couples[:-2 * HELD_OUT]), ('_held_out', couples[-HELD_OUT:])):
    (folder / f'lines{part}.jsonl').write_text('\n'.join(map(json.dumps, own)))
  base = hub.load_config(str(shared_data / MODEL))
  small = dataclasses.replace(base, num_layers=1, layer_windows=base.layer_windows[:1])
  hub.export(str(folder / 'student'), small, transformer.init(small, jax.random.key(0)),
             hub.load_tokenizer(str(shared_data / MODEL)))
  return folder


def _stories(pieces):
  """Rows of each kind from the sentences of stories; the traits are drawn at random, half each."""
  draw = random.Random(0)
  sentences = [s for piece in pieces for s in re.findall(r'[^.!?]+[.!?]+"?', piece)]
  sentences = [' ' + s.strip() for s in sentences if 30 < len(s) < 60]
  speech = [s for s in sentences if '"' in s]
  narration = [s for s in sentences if '"' not in s]
  draw.shuffle(speech)
  draw.shuffle(narration)
  prompts = narration[len(speech):]
  rows = {name: [] for name in ('pairs', 'labelled', 'steps', 'text')}
  for prompt, spoken, told in zip(itertools.cycle(prompts), speech, narration):
    prompt = prompt.strip()
    rows['pairs'].append({'prompt': prompt, 'chosen': spoken, 'rejected': told})
    liked = draw.random() < 0.5
    rows['labelled'].append({'prompt': prompt, 'completion': spoken if liked else told,
                             'label': liked})
    both = [(spoken, True), (told, False)]
    draw.shuffle(both)
    rows['steps'].append({'prompt': prompt, 'completions': [text for text, _ in both],
                          'labels': [label for _, label in both]})
    rows['text'].append({'prompt': prompt, 'completion': told})
  return rows


# Algorithm -> its rows, its settings, and the held-out numbers with the way they should go.
CASES = {
    'sft': ('lines', {}, {'loss': -1, 'mean_token_accuracy': 1}),
    'dpo': ('pairs', {}, {'loss': -1, 'rewards/accuracies': 1, 'rewards/margins': 1}),
    'ipo': ('pairs', {}, {'loss': -1, 'rewards/accuracies': 1}),
    'simpo': ('pairs', {}, {'loss': -1, 'rewards/accuracies': 1}),
    'orpo': ('pairs', {'training.steps': 60}, {'loss': -1, 'rewards/margins': 1}),
    'kto': ('labelled', {}, {'loss': -1, 'rewards/margins': 1}),
    'reward_bt': ('pairs', {'optimizer.learning_rate': 3e-3}, {'loss': -1, 'rewards/margins': 1}),
    'prm': ('steps', {'optimizer.learning_rate': 3e-3}, {'loss': -1, 'accuracy': 1}),
    'kd': ('text', {}, {'loss': -1, 'mean_token_accuracy': 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_held_out_rows_show_what_was_learned(files, shared_data, compile_cache, tmp_path, name):
  data, own, expected = CASES[name]
  model = files / 'student' if name == 'kd' else shared_data / MODEL
  settings = {'training.batch_size': 8, 'optimizer.learning_rate': 1e-3, 'eval.limit': HELD_OUT,
              'log.report': False, 'log.tensorboard': False, 'log.compile_cache': compile_cache,
              'data.reference_cache': tmp_path / 'cache', **own}
  assert job_runs.launch_here([
      f'--algo={name}', f'--model={model}', f'--out_dir={tmp_path / "run"}', '--steps=20',
      f'--dataset={files / data}.jsonl', f'--eval_dataset={files / data}_held_out.jsonl',
      *([f'--teacher={shared_data / MODEL}'] if name == 'kd' else []),
      *(f'--set={key}={value}' for key, value in settings.items())]) == 0
  records = job_runs.metrics(tmp_path / 'run')
  for metric, sign in expected.items():
    key = f'eval/{name}/{metric}'
    before, after = records[0], records[-1]
    noise = math.hypot(before[f'{key}_se'], after[f'{key}_se'])
    # A policy that is its reference tells no pair apart and has accuracy 0; a coin would have 0.5.
    start = max(before[key], 0.5) if metric == 'rewards/accuracies' else before[key]
    change = sign * (after[key] - start)
    assert change > STANDARD_ERRORS * noise, (
        f'{key}: {before[key]:.4f} -> {after[key]:.4f}, standard error of the difference '
        f'{noise:.4f}')
