"""Runs tasks of lm-evaluation-harness on a model of ours (needs `pip install lm_eval`).

  python scripts/run_lm_eval.py --model=runs/grpo/model --tasks=arc_easy,hellaswag --limit=200
  python scripts/run_lm_eval.py --model=DIR --tasks=my_task --include_path=folder/of/yaml

Prints the harness's own table and, with --out, writes its results as JSON.
"""

import functools
import json
import pathlib
import sys

from absl import flags
import script_main

from ptjax import asking
from ptjax import assembly
from ptjax import config as settings
from ptjax import keys
from ptjax.rollout import sampler


def define_flags():
  """Returns the flags, in a set of their own."""
  found = flags.FlagValues()
  text = functools.partial(flags.DEFINE_string, flag_values=found)
  whole = functools.partial(flags.DEFINE_integer, flag_values=found)
  text('model', None, 'A Hugging Face directory or a hub name.', required=True)
  flags.DEFINE_list('tasks', None, "The harness's names, with commas between.", flag_values=found,
                    required=True)
  text('include_path', None, 'A folder with task files of your own.')
  text('out', None, 'A JSON file for the results.')
  whole('num_fewshot', None, "Examples in the prompt. Default: the task's own.")
  whole('limit', None, 'Rows per task, at most.', lower_bound=1)
  whole('batch_size', 64, 'Completions computed together.', lower_bound=1)
  whole('max_tokens', 1024, 'Of a prompt and its completion together.', lower_bound=2)
  whole('seed', 0, 'Of sampled completions.', lower_bound=0)
  flags.DEFINE_boolean('chat_template', False, 'Whether prompts are messages.', flag_values=found)
  flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of the activations.',
                    flag_values=found)
  return found


def make_generate(policy, params, mesh, options):
  """Returns `generate(prompts, *, max_tokens, stop_strings, temperature) -> texts`."""
  def generate(prompts, *, max_tokens, stop_strings, temperature):
    max_prompt_tokens = options.max_tokens - max_tokens
    if max_prompt_tokens < 1:
      raise settings.UserError(f'--max_tokens={options.max_tokens}: a task asks for completions of '
                               f'{max_tokens} tokens, which leaves no room for prompts')
    drawing = sampler.SamplingOptions(max_tokens=max_tokens, temperature=temperature,
                                      stop_ids=policy.stop_ids, stop_strings=stop_strings)
    texts = {row: answers[0] for batch in asking.sample(
        policy, params, mesh, [{'prompt': prompt} for prompt in prompts], drawing,
        max_prompt_tokens=max_prompt_tokens, overlong='truncate', batch_size=options.batch_size,
        key=keys.stream(options.seed, 'lm_eval')) for row, answers, _ in batch}
    if len(texts) < len(prompts):
      raise settings.UserError('a task asks for the continuation of an empty prompt')
    return [texts[row] for row in range(len(prompts))]
  return generate


def run(options):
  """Returns the harness's results."""
  from ptjax.evaluation import harness
  import lm_eval
  from lm_eval import tasks

  policy = assembly.load_policy(settings.Config(
      model=options.model, model_settings=settings.ModelSettings(dtype=options.dtype)))
  mesh, params = script_main.load_weights(policy)
  max_tokens = min(options.max_tokens, policy.config.max_length)
  log_likelihood = asking.make_log_likelihood(
      policy, mesh, max_tokens=max_tokens, batch_size=options.batch_size)
  options.max_tokens = max_tokens
  model = harness.HarnessModel(
      functools.partial(log_likelihood, params), make_generate(policy, params, mesh, options),
      policy.tokenizer)
  return lm_eval.simple_evaluate(
      model=model, tasks=options.tasks, num_fewshot=options.num_fewshot, limit=options.limit,
      apply_chat_template=options.chat_template,
      task_manager=tasks.TaskManager(include_path=options.include_path))


def report(options):
  """Runs the tasks, prints the table and writes the results."""
  results = run(options)
  from lm_eval import utils
  print(utils.make_table(results))
  if options.out:
    text = json.dumps(results['results'], indent=2, default=str)
    pathlib.Path(options.out).write_text(text + '\n', encoding='utf-8')


def main(argv):
  """Runs the script; returns the exit code."""
  return script_main.run('run_lm_eval', __doc__, define_flags(), argv, report)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
