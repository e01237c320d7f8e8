"""The peer of bench_grpo.py: TRL's GRPOTrainer with transformers' generate, started by it."""

import functools
import time

import datasets
import torch
import transformers
import trl

import bench_common
import bench_grpo
import bench_torch


def worker(job):
  """The peer's side, logging to nobody and saving nothing."""
  turns = bench_common.Turns()
  ends = bench_torch.Ends(job, bench_torch.END)
  ends.lengths = turns.wait()
  tuned = job.setting == 'tuned'
  geometric = job.lengths == 'geometric'
  rows = job.prompts * job.group
  model = transformers.AutoModelForCausalLM.from_pretrained(
      f'{job.folder}/model', dtype=torch.float32)
  model.generation_config.eos_token_id = bench_torch.END  # not the many that end ours
  options = trl.GRPOConfig(
      output_dir=f'{job.folder}/trl', per_device_train_batch_size=rows,
      num_generations=job.group, max_completion_length=job.completion, beta=0.0, loss_type='grpo',
      learning_rate=job.learning_rate, lr_scheduler_type='constant', max_steps=10**6,
      bf16=job.dtype == 'bfloat16', report_to='none', logging_strategy='no', save_strategy='no',
      disable_tqdm=True, seed=job.seed,
      generation_kwargs={} if geometric else {'min_new_tokens': job.completion},
      **({'gradient_checkpointing': False} if tuned else {}))
  trainer = trl.GRPOTrainer(
      model=model, args=options, reward_funcs=bench_grpo.low_ids,
      train_dataset=datasets.load_dataset(
          'json', data_files=f'{job.folder}/prompts.jsonl', split='train'),
      processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(
          f'{job.folder}/model', padding_side='left'))
  if geometric:
    model.generate = functools.partial(
        model.generate, logits_processor=transformers.LogitsProcessorList([ends]))
  generate = trainer._generate_single_turn
  seconds, lengths = [], []

  def timed(*args, **kwargs):
    started = time.perf_counter()
    found = generate(*args, **kwargs)
    seconds.append(time.perf_counter() - started)
    lengths.append([len(ids) for ids in found[0]])
    return found

  trainer._generate_single_turn = timed

  class Steps(transformers.TrainerCallback):
    """Reports every optimizer step."""

    def on_step_end(self, args, state, control, **kwargs):
      turns.done(**bench_torch.facts('trl ' + job.setting, model, trl=trl.__version__),
                 lengths=lengths.pop(), rollout=seconds.pop(),
                 prompt_tokens=job.prompts * job.prompt)
      ends.lengths = turns.wait()

  trainer.add_callback(Steps())
  trainer.train()


if __name__ == '__main__':
  worker(bench_grpo.parse()[1])
