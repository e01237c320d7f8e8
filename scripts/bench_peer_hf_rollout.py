"""The peer of bench_rollout.py: `transformers`' generate, started by it."""

import torch
import transformers

import bench_common
import bench_rollout
import bench_torch


def worker(job):
  """The peer's side."""
  turns = bench_common.Turns()
  turns.wait()
  torch.manual_seed(job.seed)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model = bench_torch.qwen2(job, max(1024, job.prompt + job.completion)).to(
      device, getattr(torch, job.dtype)).eval()
  generation = transformers.GenerationConfig(
      do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=job.completion,
      min_new_tokens=job.completion, num_return_sequences=job.group, eos_token_id=None,
      pad_token_id=0)
  prompts = torch.from_numpy(bench_rollout.prompt_tokens(job)).long().to(device)
  everything = torch.ones_like(prompts)
  while True:
    with torch.inference_mode():
      rows = model.generate(prompts, attention_mask=everything, generation_config=generation)
    tokens = rows[:, job.prompt:].cpu()
    turns.done(**bench_torch.facts('hf generate', model), tokens=tokens.numel())
    turns.wait()


if __name__ == '__main__':
  worker(bench_rollout.parse()[1])
