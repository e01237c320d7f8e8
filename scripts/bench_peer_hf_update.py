"""The peer of bench_update.py: a lean torch update of a `transformers` model, started by it.

Lean: logits of completion positions alone, the policy's own log-probs as old ones, fused AdamW,
neither entropy nor metrics. Every row is a prompt and one completion, padded to the longest.
"""

import json
import sys
import time

import torch
import transformers

import bench_update


def worker(kind, shape):
  """One line out when warm, then one update and one line out per line in."""
  torch.manual_seed(shape.seed)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
      vocab_size=shape.vocab, hidden_size=shape.width, intermediate_size=shape.mlp,
      num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
      num_key_value_heads=shape.kv_heads, max_position_embeddings=1024, rms_norm_eps=1e-6,
      tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
      pad_token_id=0)).to(device, torch.float32)
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
      'name': 'hf', 'tokens': int(mask.sum()), 'forward_tokens': rows.numel(),
      'versions': {'torch': torch.__version__, 'transformers': transformers.__version__},
      'device': torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
      'compile_seconds': 0.0, 'compilations': 0}), flush=True)
  for _ in sys.stdin:
    print(json.dumps(update()), flush=True)


if __name__ == '__main__':
  arguments, shapes = bench_update.parse()
  worker(arguments.worker, shapes)
