"""The peer of bench_grpo.py: `transformers`' generate and a lean torch update, started by it.

Lean: logits of completion positions alone, the policy's own log-probs as old ones (no second
forward pass), fused AdamW, neither entropy nor metrics.
"""

import contextlib
import time

import torch
import transformers

import bench_common
import bench_grpo
import bench_torch


def worker(job):
  """The peer's side."""
  turns = bench_common.Turns()
  wanted = turns.wait()
  torch.manual_seed(job.seed)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model = transformers.AutoModelForCausalLM.from_pretrained(
      f'{job.folder}/model', dtype=torch.float32).to(device)
  precision = contextlib.nullcontext if job.dtype == 'float32' else (
      lambda: torch.autocast(device, torch.bfloat16))
  optimizer = torch.optim.AdamW(
      model.parameters(), lr=job.learning_rate, weight_decay=0.0, fused=True)
  ends = bench_torch.Ends(job, bench_torch.END)
  geometric = job.lengths == 'geometric'
  generation = transformers.GenerationConfig(
      do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=job.completion,
      num_return_sequences=job.group, pad_token_id=0,
      eos_token_id=bench_torch.END if geometric else None)
  model.generation_config = generation
  processors = transformers.LogitsProcessorList([ends] if geometric else [])
  prompts = torch.tensor(bench_grpo.prompt_ids(job), device=device)
  everything = torch.ones_like(prompts)
  vocab = [job.vocab] * (job.prompts * job.group)

  def step(wanted):
    started = time.perf_counter()
    ends.lengths = wanted
    with torch.inference_mode(), precision():
      rows = model.generate(prompts, attention_mask=everything, generation_config=generation,
                            logits_processor=processors)
    rows = rows.clone()  # out of inference mode
    tokens = rows[:, job.prompt:]
    on_host = [row[:length] for row, length in zip(tokens.tolist(), wanted)]
    rollout = time.perf_counter() - started
    rewards = torch.tensor(bench_grpo.low_ids(
        None, None, completion_ids=on_host, vocab=vocab)).reshape(-1, job.group)
    weights = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    weights = weights.reshape(-1, 1).to(device)
    lengths = torch.tensor(wanted, device=device)[:, None]
    mask = torch.arange(tokens.shape[1], device=device)[None] < lengths
    attention = torch.cat([torch.ones_like(rows[:, :job.prompt]), mask.long()], 1)
    with precision():
      logits = model(rows, attention_mask=attention, logits_to_keep=tokens.shape[1] + 1,
                     use_cache=False).logits[:, :-1].float()
    log_probs = logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)
    ratio = (log_probs - log_probs.detach()).exp()
    gain = torch.minimum(ratio * weights, ratio.clip(0.8, 1.2) * weights) * mask
    (-(gain.sum(1) / lengths[:, 0]).mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [len(row) for row in on_host], rollout

  while True:
    lengths, rollout = step(wanted)
    turns.done(**bench_torch.facts('hf generate', model), lengths=lengths, rollout=rollout,
               prompt_tokens=prompts.numel())
    wanted = turns.wait()


if __name__ == '__main__':
  worker(bench_grpo.parse()[1])
