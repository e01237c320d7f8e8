import json

import pytest

from ptjax import config
from ptjax.data import arithmetic
from ptjax.data import tokenizer as tokenizers

transformers = pytest.importorskip('transformers')

TEXTS = ['37+48=', '', ' two  spaces, a\n\nbreak . ', "don't ! ?", 'é', '<eos>', 'x<pad>']


@pytest.fixture(scope='module')
def characters():
  return tokenizers.characters()


def test_one_token_per_character(characters):
  assert len(characters) == 4 + 96
  assert [characters.convert_tokens_to_ids(t) for t in ('<pad>', '<bos>', '<eos>', '<unk>')] == [
      0, 1, 2, 3]
  ids = characters('37+48=').input_ids
  assert ids[0] == characters.bos_token_id and len(ids) == 7
  assert characters.decode(ids, skip_special_tokens=True) == '37+48='


@pytest.mark.parametrize('text', TEXTS[:4])
def test_decoding_gives_the_text_back(characters, text):
  assert characters.decode(characters.encode(text, add_special_tokens=False)) == text


def test_unknown_characters_are_marked(characters):
  assert characters.encode('aé', add_special_tokens=False)[1] == characters.unk_token_id


def test_small_alphabet():
  small = tokenizers.characters(arithmetic.ALPHABET)
  assert len(small) == 4 + len(arithmetic.ALPHABET)
  assert small.unk_token_id not in small('12*3-4+5=').input_ids


@pytest.mark.parametrize('alphabet', [tokenizers.PRINTABLE, arithmetic.ALPHABET])
def test_saved_and_opened_by_transformers_it_is_the_same(tmp_path, alphabet):
  made = tokenizers.characters(alphabet)
  made.save_pretrained(tmp_path)
  opened = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert opened.get_vocab() == made.get_vocab()
  for name in ('pad', 'bos', 'eos', 'unk'):
    assert getattr(opened, f'{name}_token_id') == getattr(made, f'{name}_token_id')
  for text in TEXTS:
    ids = made(text).input_ids
    assert opened(text).input_ids == ids
    assert opened.decode(ids) == made.decode(ids)
    assert opened.encode(text, add_special_tokens=False) == (
        made.encode(text, add_special_tokens=False))


def test_end_ids(characters, shared_data):
  assert tokenizers.eos_ids(characters) == (2,)
  assert tokenizers.eos_ids(characters, {'eos_token_id': 7}) == (2, 7)
  assert tokenizers.eos_ids(characters, {'eos_token_id': [7, 2]}) == (2, 7)
  assert tokenizers.eos_ids(characters, {}) == (2,)
  folder = shared_data / 'models' / 'stories260K'
  stories = transformers.AutoTokenizer.from_pretrained(folder)
  generation = transformers.GenerationConfig.from_pretrained(folder)
  assert tokenizers.eos_ids(stories, generation) == (2, 1)


def test_no_end_token_at_all():
  endless = tokenizers.characters('ab')
  endless.eos_token = None
  with pytest.raises(config.UserError, match='has no end token.*set "eos_token" in its'):
    tokenizers.eos_ids(endless)
  assert tokenizers.eos_ids(endless, {'eos_token_id': 5}) == (5,)


def test_padding_falls_back(shared_data):
  assert tokenizers.pad_id(tokenizers.characters('a')) == 0
  gpt2 = transformers.AutoTokenizer.from_pretrained(shared_data / 'tokenizers' / 'gpt2')
  assert gpt2.pad_token_id is None
  assert tokenizers.pad_id(gpt2) == gpt2.eos_token_id == 50256
  endless = tokenizers.characters('ab')
  endless.eos_token = endless.pad_token = None
  assert tokenizers.pad_id(endless) == 0


def test_published_encodings(shared_data):
  golden = json.loads((shared_data / 'tokenizers' / 'golden_encodings.json').read_text())
  folders = {'gpt2': 'tokenizers/gpt2', 'qwen': 'tokenizers/qwen',
             'stories260K': 'models/stories260K'}
  for name, folder in folders.items():
    opened = transformers.AutoTokenizer.from_pretrained(shared_data / folder)
    for entry in golden[name]:
      assert list(opened(entry['text']).input_ids) == entry['ids'], (name, entry['text'])
