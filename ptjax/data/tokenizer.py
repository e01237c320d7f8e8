"""The built-in character tokenizer, and what every tokenizer must tell us about stopping.

Tokenizers are Hugging Face tokenizers throughout, so that a run's `model/` folder opens in
`transformers`.
"""

from ptjax import config

PAD, BOS, EOS, UNKNOWN = '<pad>', '<bos>', '<eos>', '<unk>'
PRINTABLE = '\n' + ''.join(chr(code) for code in range(32, 127))


def characters(alphabet=PRINTABLE):
  """Makes a tokenizer with one token per character, in memory.

  Args:
    alphabet: text; each distinct character becomes a token. Any other character is `<unk>`.
  Returns:
    A `transformers.PreTrainedTokenizerFast` with ids 0-3 for `<pad>`, `<bos>`, `<eos>` and
    `<unk>`. Texts begin with `<bos>`; `<eos>` ends a completion and is not the padding.
  """
  import tokenizers  # loads with transformers, which takes a second: only when asked for
  import transformers
  specials = [PAD, BOS, EOS, UNKNOWN]
  vocabulary = {token: i for i, token in enumerate(specials + list(dict.fromkeys(alphabet)))}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
  backend.decoder = tokenizers.decoders.Fuse()
  backend.post_processor = tokenizers.processors.TemplateProcessing(
      single=f'{BOS} $A', special_tokens=[(BOS, vocabulary[BOS])])
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN,
      clean_up_tokenization_spaces=False)


def eos_ids(tokenizer, generation_config=None):
  """Returns every id that ends a completion.

  Args:
    tokenizer: a Hugging Face tokenizer.
    generation_config: the checkpoint's generation defaults as a dict or `GenerationConfig`, or
      None. Chat models name further end tokens there.
  Returns:
    Tuple of ints without repeats, the tokenizer's own first.
  Raises:
    UserError: neither names one; sampling would never stop.
  """
  if generation_config is None:
    named = None
  elif isinstance(generation_config, dict):
    named = generation_config.get('eos_token_id')
  else:
    named = generation_config.eos_token_id
  named = [] if named is None else [named] if isinstance(named, int) else list(named)
  own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
  ids = tuple(dict.fromkeys(own + named))
  if not ids:
    raise config.UserError(
        f'the tokenizer {tokenizer.name_or_path or "made in memory"} has no end token, so '
        'completions could neither stop nor learn to; set "eos_token" in its '
        'tokenizer_config.json (or "eos_token_id" in generation_config.json)')
  return ids


def pad_id(tokenizer):
  """Returns the id that fills padding: the padding token, else the end token, else 0.

  It may equal the end token. That is harmless here: masks come from lengths, and no code asks
  whether a token is padding by comparing ids.
  """
  for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
    if token_id is not None:
      return token_id
  return 0
