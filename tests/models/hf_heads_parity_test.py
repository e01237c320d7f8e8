"""Scores against `transformers`' classifiers on random tiny models; needs torch (`parity`)."""

import functools

import jax
import numpy as np
import pytest
import transformers

from ptjax.data import tokenizer
from ptjax.models import hub
from ptjax.models import policy

torch = pytest.importorskip('torch', reason='parity needs torch: pip install -e ".[parity]"')

VOCAB, PAD = 64, 0
_LLAMA = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
_GPT2 = dict(vocab_size=VOCAB, n_embd=32, n_head=4, n_layer=2, n_positions=64)
_GEMMA = dict(_LLAMA, head_dim=16, sliding_window=7)
SEQUENCE, TOKEN = (
    transformers.AutoModelForSequenceClassification, transformers.AutoModelForTokenClassification)
CASES = {  # the class that opens it, the config
    'llama': (SEQUENCE, transformers.LlamaConfig(**_LLAMA, num_labels=1)),
    'gpt2': (SEQUENCE, transformers.GPT2Config(**_GPT2, num_labels=1)),
    'qwen2': (SEQUENCE, transformers.Qwen2Config(**_LLAMA, num_labels=1)),
    'gemma2': (SEQUENCE, transformers.Gemma2Config(**_GEMMA, num_labels=1)),
    'gemma3_text': (SEQUENCE, transformers.Gemma3TextConfig(**_GEMMA, num_labels=1)),
    'llama-tokens': (TOKEN, transformers.LlamaConfig(**_LLAMA, num_labels=3)),
    'gpt2-tokens': (TOKEN, transformers.GPT2Config(**_GPT2, num_labels=2)),
    'qwen2-tokens': (TOKEN, transformers.Qwen2Config(**_LLAMA, num_labels=2)),
}

# Two prompts with two completions each, their padding on the right.
PROMPTS = [[5, 9, 11], [7, 7, 30, 2, 12]]
COMPLETIONS = [[[13, 14], [3, 8, 9, 40]], [[21], [6, 2]]]
S, T = 5, 4


def arrays():
  """Prompts [P, S], their lengths, completions [B, T] and the loss mask."""
  pad = lambda rows, width: np.array([row + [PAD] * (width - len(row)) for row in rows], np.int32)
  flat = [tokens for group in COMPLETIONS for tokens in group]
  mask = np.array([[t < len(tokens) for t in range(T)] for tokens in flat])
  return pad(PROMPTS, S), np.array([len(p) for p in PROMPTS], np.int32), pad(flat, T), mask


def joined():
  """The same as whole rows for transformers: [B, S + T], padded on the right."""
  rows = [prompt + own for prompt, group in zip(PROMPTS, COMPLETIONS) for own in group]
  return np.array([row + [PAD] * (S + T - len(row)) for row in rows])


def torch_scores(auto, directory):
  """[B, num_labels] of a sequence classifier, [B, S + T, num_labels] of a token classifier."""
  model = auto.from_pretrained(directory, attn_implementation='eager').eval()
  rows = torch.tensor(joined())
  with torch.no_grad():
    return model(rows, attention_mask=(rows != PAD).long()).logits.float().numpy()


def our_scores(config, params):
  *batch, mask = arrays()
  if config.score_bias:
    return jax.jit(functools.partial(policy.token_scores, config))(params, *batch)
  return jax.jit(functools.partial(policy.scores, config))(params, *batch, loss_mask=mask)


@pytest.mark.parametrize('name', CASES)
def test_scores_equal_and_survive_export(name, tmp_path):
  auto, config = CASES[name]
  torch.manual_seed(0)
  config.pad_token_id, config.bos_token_id, config.eos_token_id = PAD, 1, 2
  model = auto.from_config(config)
  with torch.no_grad():
    for parameter_name, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape) * (0.1 if parameter.ndim == 1 else 0.2)
      parameter.copy_(parameter + noise if 'norm' in parameter_name else noise)
  model.save_pretrained(tmp_path / 'a')
  tokenizer.characters('abcdef').save_pretrained(tmp_path / 'a')
  want = torch_scores(auto, tmp_path / 'a')

  loaded_config, params, loaded_tokenizer = hub.load(tmp_path / 'a')
  assert loaded_config.num_labels == config.num_labels
  assert loaded_config.score_bias == (auto is TOKEN)
  got = np.asarray(our_scores(loaded_config, params))
  if auto is SEQUENCE:
    assert got.shape == (4,)
    expected = want[:, 0]
  else:
    lengths = [len(p) for p in PROMPTS for _ in range(2)]
    expected = np.stack([want[b, n:n + T] for b, n in enumerate(lengths)])
    mask = arrays()[-1]
    got, expected = got[mask], expected[mask]
  # Float32 sums in another order, relative to the largest score.
  assert np.abs(got - expected).max() < 1e-5 * np.abs(want).max()
  assert np.std(expected) > 0.05

  assert loaded_tokenizer.pad_token_id == PAD
  hub.export(tmp_path / 'b', loaded_config, params, loaded_tokenizer)
  np.testing.assert_array_equal(torch_scores(auto, tmp_path / 'b'), want)
  opened = transformers.AutoConfig.from_pretrained(tmp_path / 'b')
  assert opened.architectures == [type(model).__name__]
  assert opened.num_labels == config.num_labels and opened.pad_token_id == PAD
