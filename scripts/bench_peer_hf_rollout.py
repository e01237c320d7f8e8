"""The peer of bench_rollout.py: `transformers`' generate, started by it."""

import torch
import transformers

import bench_common
import bench_rollout


def worker(job):
  """The peer's side."""
  turns = bench_common.Turns()
  turns.wait()
  torch.manual_seed(job.seed)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  config = transformers.Qwen2Config(
      vocab_size=job.vocab, hidden_size=job.width, intermediate_size=job.mlp,
      num_hidden_layers=job.layers, num_attention_heads=job.heads,
      num_key_value_heads=job.kv_heads, max_position_embeddings=max(
          1024, job.prompt + job.completion), rms_norm_eps=1e-6, tie_word_embeddings=True,
      bos_token_id=None, eos_token_id=None, pad_token_id=0)
  model = transformers.Qwen2ForCausalLM(config).to(device, getattr(torch, job.dtype)).eval()
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
    turns.done(
        name='hf generate', tokens=tokens.numel(), compile_seconds=0.0, compilations=0,
        versions={'torch': torch.__version__, 'transformers': transformers.__version__},
        parameters=sum(p.numel() for p in model.parameters()),
        device=torch.cuda.get_device_name() if device == 'cuda' else 'cpu')
    turns.wait()


if __name__ == '__main__':
  worker(bench_rollout.parse()[1])
