"""The peer of bench_update.py: a lean torch update of a `transformers` model, started by it.

Lean: logits of completion positions alone, the policy's own log-probs as old ones, fused AdamW,
neither entropy nor metrics. Every row is a prompt and one completion, padded to the longest.
"""

import json
import sys
import time

import torch

import bench_torch
import bench_update


def worker(kind, shape):
  """One line out when warm, then one update and one line out per line in."""
  torch.manual_seed(shape.seed)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model = bench_torch.qwen2(shape).to(device, torch.float32)
  optimizer = torch.optim.AdamW(
      model.parameters(), lr=shape.learning_rate, weight_decay=0.0, fused=True)
  found = {name: torch.from_numpy(x).to(device)
           for name, x in bench_update.arrays(shape, kind).items()}
  tokens, mask = found['tokens'].long(), found['loss_mask']
  prompts = found['prompts'].long().repeat_interleave(shape.group, 0)
  rows = torch.cat([prompts, tokens], 1)  # padding stands behind, where causality hides it

  def update():
    started, cpu = time.perf_counter(), time.process_time()
    logits = model(rows, logits_to_keep=tokens.shape[1] + 1, use_cache=False).logits[:, :-1]
    log_probs = logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)
    ratio = (log_probs - log_probs.detach()).exp()
    gain = torch.minimum(ratio * found['advantages'][:, None],
                         ratio.clip(0.8, 1.2) * found['advantages'][:, None])
    (-((gain * mask).sum(1) / mask.sum(1)).mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device == 'cuda':
      torch.cuda.synchronize()
    return {'seconds': time.perf_counter() - started, 'cpu_seconds': time.process_time() - cpu}

  update()
  print(json.dumps({
      **bench_torch.facts('hf', model), 'tokens': int(mask.sum()),
      'forward_tokens': rows.numel()}), flush=True)
  for _ in sys.stdin:
    print(json.dumps(update()), flush=True)


if __name__ == '__main__':
  arguments, shapes = bench_update.parse()
  worker(arguments.worker, shapes)
