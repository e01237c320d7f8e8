"""Makes preference pairs where nobody has stated a preference, as JSON lines to train on.

  # The right label against another one (Quora, ARC, HellaSwag, prompt/choices/label):
  python scripts/make_preferences.py --pairs=labels --dataset=quora.csv --out=pairs.jsonl

  # The true ending against what a model writes (prompt/completion, sonnets.txt):
  python scripts/make_preferences.py --pairs=endings --dataset=sonnets.txt --model=DIR --samples=1 \
      --out=pairs.jsonl

  # The best against the worst of 16 samples, by reward:
  python scripts/make_preferences.py --pairs=best_of_n --dataset=gsm8k/train.jsonl --model=DIR \
      --reward=gsm8k_flexible --out=pairs.jsonl

  # The same from samples that are scored already (prompt, text or completion, reward or score):
  python scripts/make_preferences.py --pairs=scored --dataset=imdb_reward.jsonl --separator=' ' \
      --out=pairs.jsonl

Samples are kept in OUT.samples.jsonl as they are drawn; the same command goes on from there. OUT
itself is written at the end, whole or not at all.
"""

import contextlib
import json
import pathlib
import sys

from absl import flags
import script_main
import tqdm

from ptjax import config as settings
from ptjax.data import pairing


def define_flags():
  """Returns the flags, in a set of their own."""
  found = flags.FlagValues()
  text = lambda name, default, words, **more: flags.DEFINE_string(
      name, default, words, flag_values=found, **more)
  several = lambda name, words: flags.DEFINE_multi_string(name, [], words, flag_values=found)
  whole = lambda name, default, words: flags.DEFINE_integer(
      name, default, words, lower_bound=0, flag_values=found)
  number = lambda name, default, words: flags.DEFINE_float(
      name, default, words, flag_values=found)
  switch = lambda name, words: flags.DEFINE_boolean(name, False, words, flag_values=found)
  choice = lambda name, values, words, **more: flags.DEFINE_enum(
      name, None if more else values[0], values, words, flag_values=found, **more)
  choice('pairs', ['labels', 'endings', 'best_of_n', 'scored'],
         'What makes one answer better than another.', required=True)
  text('dataset', None, 'As for the launcher: a file, a folder, a hub name or a task.',
       required=True)
  text('out', None, 'The JSON lines file to write.', required=True)
  several('columns', 'ours=theirs, e.g. prompt=question. Repeatable.')
  whole('limit', None, 'Rows read at most.')
  whole('seed', 0, 'Every random number follows from it.')
  text('model', None, 'Whose samples: a preset, a directory or a hub name.')
  several('reward', "As for the launcher. Default: the data set's own.")
  whole('samples', 16, 'Completions per prompt.')
  number('temperature', 1.0, 'Of the samples.')
  number('top_p', 1.0, 'Of the samples.')
  whole('max_prompt_tokens', 512, 'Longer prompts are left out.')
  whole('max_completion_tokens', 256, 'Longer samples are cut.')
  switch('keep_truncated', 'Whether samples that were cut take part.')
  whole('batch_size', 8, 'Prompts sampled together.')
  number('min_gap', 0.0, 'Difference in score that a pair needs at least.')
  whole('most', 1, 'Pairs per prompt, at most, where there are scores.')
  switch('every_label', 'A pair for each of the other labels, not for one.')
  text('separator', '', 'Put before each scored sample.')
  choice('resume', ['auto', 'never'], 'never draws all samples anew.')
  choice('dtype', ['float32', 'bfloat16'], 'Of the activations.')
  return found


# What decides the samples; a file of samples drawn with other values is refused.
_DECIDING = ('pairs', 'dataset', 'columns', 'limit', 'seed', 'model', 'reward', 'samples',
             'temperature', 'top_p', 'max_prompt_tokens', 'max_completion_tokens', 'dtype')


def make_pairs(options, rows):
  """Returns the `pairing.Pairs` that the flags ask for."""
  if options.pairs == 'labels':
    return pairing.from_labels(rows, seed=options.seed, every=options.every_label)
  if options.pairs == 'scored':
    return pairing.from_scored_rows(rows, min_gap=options.min_gap, most=options.most,
                                    separator=options.separator)
  if options.model is None:
    raise settings.UserError(f'--pairs={options.pairs} samples from a model: name one with --model')
  drawn = draw(options, rows)
  kept = [i for i in range(len(rows)) if i in drawn]
  texts = [_used(options, drawn[i], drawn[i]['completions']) for i in kept]
  if options.pairs == 'endings':
    return pairing.from_endings([rows[i] for i in kept], texts)
  scores = [_used(options, drawn[i], drawn[i]['scores']) for i in kept]
  return pairing.from_scores([rows[i]['prompt'] for i in kept], texts, scores,
                             min_gap=options.min_gap, most=options.most)


def _used(options, record, values):
  """What belongs to the samples that take part."""
  return [value for value, cut in zip(values, record['truncated'])
          if options.keep_truncated or not cut]


def draw(options, rows):
  """Draws and scores what OUT.samples.jsonl does not hold yet; returns row number -> record."""
  # Only these pairs need a model, whose libraries take seconds to load.
  from ptjax import asking
  from ptjax import assembly
  from ptjax import keys
  from ptjax.rollout import sampler

  pairing.require(rows, ('prompt', 'completion') if options.pairs == 'endings' else ('prompt',),
                  'sampled pairs')
  rewards = load_rewards(options, rows) if options.pairs == 'best_of_n' else None
  config = settings.Config(model=options.model, dataset=options.dataset, seed=options.seed,
                           model_settings=settings.ModelSettings(dtype=options.dtype))
  policy = assembly.load_policy(config)
  drawing = sampler.SamplingOptions(
      max_tokens=options.max_completion_tokens, group_size=options.samples, top_p=options.top_p,
      temperature=options.temperature, stop_ids=policy.stop_ids)
  done, file = open_samples(options, pathlib.Path(f'{options.out}.samples.jsonl'))
  if len(done) == len(rows):
    file.close()
    return done
  mesh, params = script_main.load_weights(policy)
  with contextlib.ExitStack() as stack:
    stack.enter_context(file)
    if rewards is not None:
      stack.enter_context(rewards)  # ends its worker processes
    bar = stack.enter_context(tqdm.tqdm(total=len(rows), initial=len(done), unit='prompt'))
    for batch in asking.sample(
        policy, params, mesh, rows, drawing, max_prompt_tokens=options.max_prompt_tokens,
        key=keys.stream(options.seed, 'preferences'), batch_size=options.batch_size, skip=done):
      records = [{'row': row, 'completions': texts, 'truncated': truncated}
                 for row, texts, truncated in batch]
      if rewards is not None:
        score(rewards, rows, records)
      for record in records:
        file.write(json.dumps(record) + '\n')
        done[record['row']] = record
      file.flush()
      bar.update(len(records))
  return done


def load_rewards(options, rows):
  """Returns the `combine.RewardSet` of --reward, or the data set's own."""
  from ptjax.evaluation import tasks
  from ptjax.rewards import combine
  specs = options.reward or combine.default_specs(tasks.recognise(options.dataset, rows))
  if not specs:
    raise settings.UserError(f'--dataset={options.dataset} is no task with a reward of its own; '
                             'name one, e.g. --reward=path/to/file.py:function')
  rewards = combine.load(specs)
  rewards.check_columns([name for name in rows.columns if name != 'prompt'])
  return rewards


def score(rewards, rows, records):
  """Adds `scores` to the records of a batch; None where a reward has no opinion."""
  prompts, texts, columns = [], [], {}
  for record in records:
    row, count = rows[record['row']], len(record['completions'])
    texts += record['completions']
    prompts += [row['prompt']] * count
    for name in rows.columns:
      if name not in ('prompt', 'prompts', 'completions'):
        columns.setdefault(name, []).extend([row[name]] * count)
  table = rewards.score(prompts, texts, columns)
  values = iter([float(total) if known else None
                 for total, known in zip(table.total, table.scored)])
  for record in records:
    record['scores'] = [next(values) for _ in record['completions']]


def open_samples(options, path):
  """Opens the file of samples to go on with it.

  Returns:
    (row number -> record, the file open for appending).
  Raises:
    UserError: it was drawn with other settings.
  """
  ours = {name: getattr(options, name) for name in _DECIDING}
  if path.exists() and options.resume == 'auto':
    with open(path, 'rb+') as file:
      lines = file.read().split(b'\n')
      file.truncate(sum(len(line) + 1 for line in lines[:-1]))  # a kill may have torn the last
    records = [json.loads(line) for line in lines[:-1]]
    if records:
      theirs = records[0].get('settings', {})
      different = [name for name in ours if theirs.get(name) != ours[name]]
      if different:
        name = different[0]
        raise settings.UserError(
            f'{path} was drawn with {name}={theirs.get(name)!r}, not {ours[name]!r}; choose '
            'another --out, or --resume=never to draw anew')
      return {record['row']: record for record in records[1:]}, open(path, 'a', encoding='utf-8')
  file = open(path, 'w', encoding='utf-8')
  file.write(json.dumps({'settings': ours}) + '\n')
  file.flush()
  return {}, file


def make(options):
  """Makes the pairs and writes them."""
  out = script_main.output(options.out)
  pairs = make_pairs(options, script_main.load_rows(options))
  if not pairs.rows:
    hint = '' if options.pairs in ('labels', 'scored') else (
        '; samples that --max_completion_tokens cut take no part without --keep_truncated')
    raise settings.UserError(f'{options.dataset}: no pairs: {pairs}{hint}')
  script_main.write_rows(out, pairs.rows)
  print(f'{out}: {pairs}')


def main(argv):
  """Runs the script; returns the exit code."""
  return script_main.run('make_preferences', __doc__, define_flags(), argv, make)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
