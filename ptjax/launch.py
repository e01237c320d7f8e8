"""The front door: `python -m ptjax.launch --algo=grpo`. All absl flags, no logic of its own."""

import dataclasses
import sys
import traceback

from absl import flags

from ptjax import config as settings
from ptjax import experiment
from ptjax import gpu
from ptjax import huge_pages
from ptjax import overrides

FLAGS = flags.FLAGS

flags.DEFINE_string('algo', None, "An algorithm's name, or file.py:function; `list` prints all. "
                    'Several, as in sft,dpo, run one after the other. Default grpo.')
flags.DEFINE_string('model', None, 'A preset, a Hugging Face directory or a hub name. Default '
                    'tiny: about a million parameters, trained from scratch.')
flags.DEFINE_string('dataset', None, 'A built-in task, a .jsonl/.json/.csv/.parquet file, a '
                    'directory, or a hub name `name:config@split`. Default arithmetic.')
flags.DEFINE_multi_string('reward', None, 'A reward by name, path/to/file.py:function, or by a '
                          'model: model:DIR, process:DIR, judge:DIR; an optional weight after '
                          "`*`, e.g. length*0.5. Repeatable. Default: the task's own.")
flags.DEFINE_string('teacher', None, 'A model to learn from, for distillation.')
flags.DEFINE_string('judge', None, 'Who says which of two completions is better: a model directory '
                    "(a language model, a reward model, DIR(pairs=True) for a pair judge), or an "
                    "OpenAI-compatible endpoint, http://host/v1(model='name').")
flags.DEFINE_string('eval_dataset', None, 'Rows to evaluate on. Default: the task\'s own.')
flags.DEFINE_integer('eval_every', None, 'Optimizer steps between evaluations; 0: before and '
                     'after alone.')
flags.DEFINE_integer('steps', None, 'Optimizer steps.')
flags.DEFINE_integer('seed', None, 'Every random number follows from it. Default 0.')
flags.DEFINE_string('out_dir', None, 'Where the run leaves its files. Default '
                    'runs/<algo>-<model>-<dataset>-<seed>.')
flags.DEFINE_string('config', None, 'An experiment file with get_config().')
flags.DEFINE_multi_string('set', None, 'A typed override, e.g. optimizer.learning_rate=1e-6. '
                          'Repeatable.')
flags.DEFINE_enum('resume', None, ['auto', 'never'], 'auto continues an out_dir that holds a '
                  'checkpoint of the same config; never refuses to overwrite it. Default auto.')
flags.DEFINE_boolean('plan', False, 'Print config, memory, FLOPs and time per step; run nothing.')
flags.DEFINE_string('mesh', None, 'E.g. data=1,fsdp=8,tensor=1; one size may be -1. Default: all '
                    'devices on fsdp.')
flags.DEFINE_boolean('json', False, 'With --algo=list: print JSON.')
flags.DEFINE_string('coordinator', None, 'host:port of process 0, for a run of several processes.')
flags.DEFINE_integer('num_processes', None, 'How many processes take part in the run.')
flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.')


def help_text():
  """Returns the usage with every flag."""
  lines = [__doc__, '', 'Flags:']
  for flag in sorted(FLAGS.get_flags_for_module(sys.modules[__name__]), key=lambda f: f.name):
    lines.append(f'  --{flag.name}: {flag.help}')
  return '\n'.join(lines)


def resolve(values):
  """Builds the config: defaults, then the experiment file, then flags, then --set.

  Args:
    values: dict of flag values, None where not given.
  """
  if values['config']:
    config = experiment.from_file(values['config'])
  else:
    config = experiment.default_for(values['model'] or settings.Config.model,
                                    values['dataset'] or settings.Config.dataset)
  direct = {name: values[name] for name in
            ('algo', 'model', 'dataset', 'teacher', 'judge', 'seed', 'out_dir', 'resume', 'mesh')
            if values[name] is not None}
  if values['reward']:
    direct['reward'] = tuple(values['reward'])
  config = settings.replace(config, direct)
  for flag, path in (('steps', 'training.steps'), ('eval_dataset', 'eval.dataset'),
                     ('eval_every', 'eval.every_steps')):
    if values[flag] is not None:
      config = overrides.override(config, f'{path}={values[flag]}')
  for assignment in values['set'] or ():
    config = overrides.override(config, assignment)
  return config


def main(argv):
  """Runs the launcher; returns the exit code."""
  try:
    if any(a in ('--help', '-h', '-help', '--helpfull') for a in argv[1:]):
      print(help_text())
      return 0
    rest = FLAGS(argv)[1:]
    if rest:
      raise settings.UserError(f'unexpected argument {rest[0]!r}; flags start with --')
    values = {f.name: f.value for f in FLAGS.get_flags_for_module(sys.modules[__name__])}
    if values['algo'] == 'list':
      from ptjax import algorithm_table
      print(algorithm_table.as_json() if values['json'] else algorithm_table.as_text())
      return 0
    config = resolve(values)
    gpu.prepare(dataclasses.replace(config.device, preallocate=False) if values['plan']
                else config.device)  # a job may be using the GPU that a plan is made on
    from ptjax import process
    process.start_processes(values['coordinator'], values['num_processes'], values['process_id'])
    if values['plan']:
      from ptjax.plan import planner
      print(planner.plan(config))
      return 0
    from ptjax import job
    job.run(config, argv=argv)
    return 0
  except (settings.UserError, flags.Error) as error:
    print(f'ptjax: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:  # before training, or a second time while the first is obeyed
    print('ptjax: interrupted', file=sys.stderr)
    return 130
  except Exception as error:  # the one place that turns a failure into an exit code
    notes = getattr(error, '__notes__', [])
    if not notes:  # it failed before there was a folder for the traceback
      traceback.print_exc()
    cause = str(error).strip().splitlines() or ['']
    print(f'ptjax: run failed: {type(error).__name__}: {" ".join([cause[0], *notes])}',
          file=sys.stderr)
    return 1


if __name__ == '__main__':
  huge_pages.restart()
  sys.exit(main(sys.argv))
