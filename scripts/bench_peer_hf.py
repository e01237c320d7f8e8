"""The peer of bench_grpo.py: `transformers`' generate and a lean torch update, started by it.

Lean: logits of completion positions alone, the policy's own log-probs as old ones (no second
forward pass), fused AdamW, neither entropy nor metrics.
"""

import time

import torch
import transformers

import bench_grpo


def worker(shape):
  """The peer's side, float32."""
  torch.manual_seed(shape.seed)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  config = transformers.Qwen2Config(
      vocab_size=shape.vocab, hidden_size=shape.width, intermediate_size=shape.mlp,
      num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
      num_key_value_heads=shape.kv_heads, max_position_embeddings=1024, rms_norm_eps=1e-6,
      tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0)
  model = transformers.Qwen2ForCausalLM(config).to(device, torch.float32)
  optimizer = torch.optim.AdamW(
      model.parameters(), lr=shape.learning_rate, weight_decay=0.0, fused=True)
  generation = transformers.GenerationConfig(
      do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=shape.completion,
      min_new_tokens=shape.completion, num_return_sequences=shape.group, eos_token_id=None,
      pad_token_id=0)
  prompts = torch.from_numpy(bench_grpo.prompt_tokens(shape)).long().to(device)
  everything = torch.ones_like(prompts)

  def step():
    started = time.perf_counter()
    with torch.inference_mode():
      rows = model.generate(prompts, attention_mask=everything, generation_config=generation)
    rows = rows.clone()  # out of inference mode
    tokens = rows[:, shape.prompt:]
    on_host = tokens.cpu().numpy()
    rollout = time.perf_counter() - started
    weights = torch.from_numpy(bench_grpo.advantages(on_host, shape.group)).to(device)
    logits = model(rows, logits_to_keep=shape.completion + 1, use_cache=False).logits[:, :-1]
    log_probs = (logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1))
    ratio = (log_probs - log_probs.detach()).exp()
    gain = torch.minimum(ratio * weights[:, None], ratio.clip(0.8, 1.2) * weights[:, None])
    (-gain.mean(1).mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device == 'cuda':
      torch.cuda.synchronize()
    return on_host, rollout

  bench_grpo.serve(step, lambda: {
      'name': 'hf generate', 'versions': {'torch': torch.__version__,
                                          'transformers': transformers.__version__},
      'device': torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
      'prompt_tokens': prompts.numel(),
      'parameters': sum(p.numel() for p in model.parameters()),
      'compile_seconds': 0.0, 'compilations': 0})


if __name__ == '__main__':
  worker(bench_grpo.parse()[1])
