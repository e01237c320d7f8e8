"""Labels the steps of solutions by what follows from them, for `--algo=math_shepherd` and `prm`.

  # Sample two solutions per problem and eight continuations from the end of each of their steps:
  python scripts/make_step_labels.py --dataset=gsm8k/train.jsonl --model=DIR --solutions=2 \\
      --continuations=8 --out=steps.jsonl
  python -m ptjax.launch --algo=math_shepherd --model=DIR --dataset=steps.jsonl

  # Label the solutions that the rows have (prompt/completion):
  python scripts/make_step_labels.py --dataset=solved.jsonl --model=DIR --reward=math \\
      --out=steps.jsonl

A step is a line. Its label is the fraction of continuations whose whole solution earns the full
reward (or, with --labels=hard, whether any does); the last step's is whether the solution itself
does. Source: Math-Shepherd, arXiv:2312.08935, section 3.3.

Labelling samples from a language model and what trains on it is a score head, so it is a step of
its own and no door of the launcher.
"""

import sys

from absl import flags
import numpy as np
import script_main

from ptjax import config as settings

SEPARATOR = '\n'  # behind each step, as the stepwise door puts it


def define_flags():
  """Returns the flags, in a set of their own."""
  found = flags.FlagValues()
  text = lambda name, default, words, **more: flags.DEFINE_string(
      name, default, words, flag_values=found, **more)
  whole = lambda name, default, words, least=0: flags.DEFINE_integer(
      name, default, words, lower_bound=least, flag_values=found)
  text('dataset', None, 'As for the launcher: a file, a folder, a hub name or a task.',
       required=True)
  text('out', None, 'The JSON lines file to write.', required=True)
  text('model', None, 'Who solves and continues: a preset, a directory or a hub name.',
       required=True)
  flags.DEFINE_multi_string('reward', [], "As for the launcher. Default: the data set's own.",
                            flag_values=found)
  flags.DEFINE_multi_string('columns', [], 'ours=theirs, e.g. prompt=question. Repeatable.',
                            flag_values=found)
  flags.DEFINE_enum('labels', 'soft', ['soft', 'hard'], 'Fractions, or whether any succeeded.',
                    flag_values=found)
  whole('limit', None, 'Rows read at most.')
  whole('seed', 0, 'Every random number follows from it.')
  whole('solutions', 0, "Solutions sampled per prompt; 0 labels the rows' own `completion`.")
  whole('continuations', 8, 'Samples from the end of each step.', 1)
  whole('max_prompt_tokens', 512, 'Longer prompts, with the steps so far, are left out.', 1)
  whole('max_completion_tokens', 256, 'Longer samples are cut.', 1)
  whole('batch_size', 8, 'Prompts sampled together.', 1)
  flags.DEFINE_float('temperature', 1.0, 'Of the samples.', flag_values=found)
  flags.DEFINE_float('full_reward', 1.0, 'The least reward of a success.', flag_values=found)
  flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of the activations.',
                    flag_values=found)
  return found


def steps_of(solution):
  """The steps of a solution: its lines, empty ones left out."""
  return [line for line in solution.split(SEPARATOR) if line.strip()]


def prefixes(solutions):
  """Where continuations start.

  Args:
    solutions: list of (row number, steps).
  Returns:
    List of (solution number, steps so far), one for each step but a solution's last.
  """
  return [(number, count) for number, (_, steps) in enumerate(solutions)
          for count in range(1, len(steps))]


def labels(solutions, starts, successes, whole, *, hard=False):
  """The label of every step.

  Args:
    solutions: list of (row number, steps).
    starts: as `prefixes` gives them.
    successes: dict from a place in `starts` to a list of K bools; one that is missing was too long
      to be continued.
    whole: bools, of the solutions themselves.
    hard: whether any success makes a good step; else its label is their fraction.
  Returns:
    List of lists of floats; None for a solution with a step that has no label.
  """
  found = [[None] * (len(steps) - 1) + [float(good)]
           for (_, steps), good in zip(solutions, whole)]
  for place, (number, count) in enumerate(starts):
    if place in successes:
      share = float(np.mean(successes[place]))
      found[number][count - 1] = float(share > 0) if hard else share
  return [None if None in own else own for own in found]


def run(options):
  """Returns the labelled rows and how many solutions were left out."""
  # A model's libraries take seconds to load.
  from ptjax import asking
  from ptjax import assembly
  from ptjax import keys
  from ptjax.evaluation import tasks
  from ptjax.rewards import combine
  from ptjax.rollout import sampler

  rows = _load_rows(options)
  specs = options.reward or combine.default_specs(tasks.recognise(options.dataset, rows))
  if not specs:
    raise settings.UserError(f'--dataset={options.dataset} is no task with a reward of its own; '
                             'name one, e.g. --reward=path/to/file.py:function')
  config = settings.Config(model=options.model, dataset=options.dataset, seed=options.seed,
                           model_settings=settings.ModelSettings(dtype=options.dtype))
  policy = assembly.load_policy(config)
  mesh, params = script_main.load_weights(policy)

  def draw(prompts, count, use):
    drawing = sampler.SamplingOptions(
        max_tokens=options.max_completion_tokens, group_size=count,
        temperature=options.temperature, stop_ids=policy.stop_ids)
    for batch in asking.sample(
        policy, params, mesh, prompts, drawing, max_prompt_tokens=options.max_prompt_tokens,
        key=keys.stream(options.seed, use), batch_size=options.batch_size):
      yield from ((number, texts) for number, texts, _ in batch)

  with combine.load(specs) as rewards:
    rewards.check_columns([name for name in rows.columns if name != 'prompt'])

    def succeeds(numbers, texts):
      columns = {name: [rows[i][name] for i in numbers] for name in rows.columns
                 if name not in ('prompt', 'prompts', 'completions')}
      table = rewards.score([rows[i]['prompt'] for i in numbers], texts, columns)
      return (table.scored & (table.total >= options.full_reward)).tolist()

    if options.solutions:
      drawn = [(number, text) for number, texts in draw(rows, options.solutions, 'solutions')
               for text in texts]
    else:
      drawn = [(number, row['completion']) for number, row in enumerate(rows)]
    solutions = [(number, steps_of(text)) for number, text in drawn if steps_of(text)]
    starts = prefixes(solutions)
    so_far = lambda number, count: ''.join(
        step + SEPARATOR for step in solutions[number][1][:count])
    prompts = [{'prompt': rows[solutions[number][0]]['prompt'] + so_far(number, count)}
               for number, count in starts]
    successes = {}
    for place, texts in (draw(prompts, options.continuations, 'continuations') if prompts else ()):
      number, count = starts[place]
      successes[place] = succeeds([solutions[number][0]] * len(texts),
                                  [so_far(number, count) + text for text in texts])
    whole = succeeds([number for number, _ in solutions],
                     [SEPARATOR.join(steps) for _, steps in solutions])
  found = labels(solutions, starts, successes, whole, hard=options.labels == 'hard')
  kept = [{'prompt': rows[number]['prompt'], 'completions': steps, 'labels': own}
          for (number, steps), own in zip(solutions, found) if own is not None]
  return kept, len(drawn) - len(kept)


def _load_rows(options):
  rows = script_main.load_rows(options)
  wanted = ('prompt',) if options.solutions else ('prompt', 'completion')
  for name in wanted:
    if name not in rows.columns:
      hint = '; or sample some with --solutions=2' if name == 'completion' else ''
      raise settings.UserError(f'{options.dataset}: no column {name!r}; found '
                               f'{", ".join(rows.columns)}; map one with '
                               f'--columns={name}=...{hint}')
  for number, row in enumerate(rows):
    for name in wanted:
      if not isinstance(row[name], str) or not row[name]:
        raise settings.UserError(
            f'{rows.where(number)}: {name}: expected text, which steps can be put behind')
  return rows


def make(options):
  """Labels the solutions and writes them."""
  out = script_main.output(options.out)
  rows, left_out = run(options)
  if not rows:
    raise settings.UserError(f'{options.dataset}: no solution with steps, or all of them too long')
  script_main.write_rows(out, rows)
  values = [label for row in rows for label in row['labels']]
  print(f'{out}: {len(rows)} solutions, {len(values)} steps, mean label {np.mean(values):.3f}; '
        f'{left_out} solutions left out')


def main(argv):
  """Runs the script; returns the exit code."""
  return script_main.run('make_step_labels', __doc__, define_flags(), argv, make)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
