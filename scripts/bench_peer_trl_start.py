"""The peer of bench_startup.py: one step of TRL's GRPOTrainer, started by it."""

import json
import sys
import time

import datasets
import torch
import transformers
import trl

import bench_common
import bench_startup

PROMPTS, GROUP, COMPLETION_TOKENS = 64, 8, 2  # of the default job


def worker(folder):
  """Trains one step, float32, and says when it is done."""
  out = bench_common.own_output()
  model = transformers.AutoModelForCausalLM.from_pretrained(f'{folder}/model', dtype=torch.float32)
  tokenizer = transformers.AutoTokenizer.from_pretrained(f'{folder}/model')
  rows = datasets.Dataset.from_list(
      [{'prompt': f'w{i % 16} w{i // 16} w1 w2'} for i in range(PROMPTS)])
  options = trl.GRPOConfig(
      output_dir=f'{folder}/trl', per_device_train_batch_size=PROMPTS * GROUP,
      num_generations=GROUP, max_completion_length=COMPLETION_TOKENS, max_steps=1, bf16=False,
      report_to='none', save_strategy='no', disable_tqdm=True, gradient_checkpointing=False)

  def reward(completions, **columns):
    return [float(len(completion)) for completion in completions]

  trainer = trl.GRPOTrainer(model=model, reward_funcs=reward, args=options, train_dataset=rows,
                            processing_class=tokenizer)

  class Report(transformers.TrainerCallback):

    def on_step_end(self, args, state, control, **kwargs):
      print(json.dumps({
          'seconds': time.time() - bench_common.process_started(), 'cpu': time.process_time(),
          'versions': {name: module.__version__ for name, module in (
              ('trl', trl), ('torch', torch), ('transformers', transformers))}}),
            file=out, flush=True)

  trainer.add_callback(Report())
  trainer.train()


if __name__ == '__main__':
  sys.exit(worker(bench_startup.parse().folder))
