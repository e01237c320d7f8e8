"""The peer of bench_offline.py: TRL's SFTTrainer and DPOTrainer, started by it."""

import datasets
import torch
import transformers
import trl

import bench_offline
import bench_torch


def worker(job):
  """The peer's side, float32, logging to nobody and saving nothing."""
  tuned = job.setting != 'default'
  options = {
      'output_dir': f'{job.folder}/trl', 'per_device_train_batch_size': job.batch,
      'learning_rate': job.learning_rate, 'lr_scheduler_type': 'constant', 'max_steps': 10**6,
      'max_length': job.prompt + job.completion, 'bf16': False, 'report_to': 'none',
      'save_strategy': 'no', 'seed': job.seed, 'disable_tqdm': True,
      'gradient_checkpointing': not tuned}
  rows = datasets.load_dataset('json', data_files=job.dataset, split='train')
  tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
  model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
  packs = job.method == 'sft' and job.setting == 'tuned'
  if packs:
    # One packed row at a time: its rows of a batch would else attend to each other as one.
    options.update(packing=True, max_length=job.row_tokens, per_device_train_batch_size=1,
                   gradient_accumulation_steps=job.row_count)
  elif tuned and job.method == 'sft':  # DPOTrainer's rows know no length to group by
    options.update(train_sampling_strategy='group_by_length')
    rows = rows.map(lambda row: {'length': len(
        tokenizer(row['prompt'] + row['completion'])['input_ids'])})
  trainer_of, config_of = trl.SFTTrainer, trl.SFTConfig
  if job.method == 'dpo':
    trainer_of, config_of = trl.DPOTrainer, trl.DPOConfig
    options['precompute_ref_log_probs'] = job.setting == 'tuned'
  trainer = trainer_of(model=model, args=config_of(**options), train_dataset=rows,
                       processing_class=tokenizer)
  examples = job.row_count if packs else job.batch
  steps = -(-len(trainer.train_dataset) // examples)
  reporter = bench_offline.Reporter(lambda: steps, lambda: {
      **bench_torch.facts('trl', model, trl=trl.__version__),
      'row_tokens': job.row_tokens if packs else 0, 'row_count': job.row_count if packs else 0})
  trained = 0
  training_step = trainer.training_step

  def counted(model, inputs, *args, **kwargs):
    nonlocal trained
    trained += int((inputs['completion_mask'][:, 1:].sum() if job.method == 'dpo'
                    else (inputs['labels'][:, 1:] != -100).sum()))
    return training_step(model, inputs, *args, **kwargs)

  trainer.training_step = counted

  class Steps(transformers.TrainerCallback):
    """Reports every optimizer step."""

    def on_step_end(self, args, state, control, **kwargs):
      nonlocal trained
      tokens, trained = trained, 0
      wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
      if not reporter.step(tokens, wait):
        control.should_training_stop = True

  trainer.add_callback(Steps())
  trainer.train()


if __name__ == '__main__':
  worker(bench_offline.parse()[1])
