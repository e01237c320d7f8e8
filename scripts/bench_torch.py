"""What the torch peers share."""

import torch
import transformers

END = 1  # the tokenizer's end token


class Ends(transformers.LogitsProcessor):
  """Makes completions end where they should, and nowhere else.

  Attributes:
    lengths: tokens of each row of the batch, its end token included; of full length: no end token.
  """

  def __init__(self, job, end):
    self._prompt, self._most, self._end = job.prompt, job.completion, end
    self.lengths = []

  def __call__(self, input_ids, scores):
    now = input_ids.shape[1] - self._prompt + 1  # tokens after this draw
    scores[:, self._end] = -torch.inf
    rows = [row for row, length in enumerate(self.lengths) if length == now < self._most]
    if rows:
      scores[rows] = -torch.inf
      scores[rows, self._end] = 0.0
    return scores


def qwen2(sizes, max_length=1024):
  """Returns a Qwen2 of random weights, with the sizes of a bench_common.Sizes."""
  return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
      vocab_size=sizes.vocab, hidden_size=sizes.width, intermediate_size=sizes.mlp,
      num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
      num_key_value_heads=sizes.kv_heads, max_position_embeddings=max_length, rms_norm_eps=1e-6,
      tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0))


def facts(name, model, **versions):
  """What a side says of itself; waits until the device is done."""
  on_gpu = torch.cuda.is_available()
  if on_gpu:
    torch.cuda.synchronize()
  return {
      'name': name, 'compile_seconds': 0.0, 'compilations': 0,
      'versions': {'torch': torch.__version__, 'transformers': transformers.__version__,
                   **versions},
      'device': torch.cuda.get_device_name() if on_gpu else 'cpu',
      'peak_device_mib': torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0,
      'parameters': sum(p.numel() for p in model.parameters())}
