"""Log-likelihoods of texts: every token once, whatever the batches, the groups and the windows."""

import functools
import json

import jax
import numpy as np
import pytest

from ptjax import config
from ptjax.data import tokenizer as tokenizers
from ptjax.evaluation import likelihood
from ptjax.models import hub
from ptjax.models import policy

TOKENIZER = tokenizers.characters('abcdefgh ')
SIZE = len(TOKENIZER)
TABLE = np.random.default_rng(0).normal(size=(SIZE, SIZE))  # nats of a token after another
TABLE -= np.log(np.exp(TABLE).sum(-1, keepdims=True))


class Bigram:
  """The outputs of a model that looks one token back; it keeps the shapes it was asked for."""

  def __init__(self, max_tokens):
    self.max_tokens = max_tokens
    self.batches = []

  def __call__(self, batch):
    p, b = len(batch.prompt_lengths), len(batch.tokens)
    assert b % p == 0 and (batch.prompt_lengths >= 1).all()
    prompts = np.repeat(np.arange(p), b // p)
    lengths = batch.prompt_lengths[prompts]
    # A position table ends at max_tokens: no token, padding included, may stand behind it.
    assert batch.prompt_tokens.shape[1] <= self.max_tokens
    assert (lengths + batch.tokens.shape[1] <= self.max_tokens).all()
    before = np.concatenate(
        [batch.prompt_tokens[prompts, lengths - 1][:, None], batch.tokens[:, :-1]], axis=1)
    self.batches.append(batch)
    log_probs = TABLE[before, batch.tokens]
    return {'log_probs': np.where(batch.loss_mask, log_probs, np.nan),  # [B, T]
            'likeliest': log_probs >= TABLE[before].max(-1)}


def make(max_tokens=64, **options):
  outputs = Bigram(max_tokens)
  options = {'end_ids': tokenizers.eos_ids(TOKENIZER), **options}
  return likelihood.make_log_likelihood(outputs, TOKENIZER, max_tokens=max_tokens,
                                        **options), outputs


def expected(prompt, completion, end=False):
  """The same by a loop over ids."""
  ids = TOKENIZER(prompt + completion)['input_ids'] + [TOKENIZER.eos_token_id] * end
  start = len(TOKENIZER(prompt)['input_ids'])
  steps = list(zip(ids[start - 1:], ids[start:]))
  return (sum(TABLE[a, b] for a, b in steps), len(steps),
          all(TABLE[a, b] == TABLE[a].max() for a, b in steps))


def check(found, prompts, completions, end=False):
  nats, tokens, greedy = zip(*(expected(p, c, end) for p, c in zip(prompts, completions)))
  np.testing.assert_allclose(found.nats, nats, rtol=1e-12)
  np.testing.assert_array_equal(found.tokens, tokens)
  np.testing.assert_array_equal(found.greedy, greedy)


def texts(count, longest, seed):
  rng = np.random.default_rng(seed)
  return [''.join(rng.choice(list('abcdefgh '), rng.integers(1, longest + 1)))
          for _ in range(count)]


@pytest.mark.parametrize('batch_size, multiple', [(1, 1), (4, 1), (64, 1), (5, 4)])
@pytest.mark.parametrize('end', [False, True])
def test_every_text_in_its_own_place(batch_size, multiple, end):
  prompts, completions = texts(23, 30, 1), texts(23, 30, 2)
  prompts[5] = ''  # of a tokenizer with a BOS
  prompts[7:10] = ['abcabcabc'] * 3  # one run for all three
  log_likelihood, outputs = make(batch_size=batch_size, multiple=multiple)
  check(log_likelihood(prompts, completions, end=end), prompts, completions, end)
  assert all(len(batch.prompt_lengths) % multiple == 0 for batch in outputs.batches)


def test_answers_share_one_run_of_their_prompt():
  prompts = [text for text in texts(10, 20, 3) for _ in range(4)]
  prompts = [text + 'abababababab' for text in prompts]
  answers = [' a', ' b', ' cd', ' e'] * 10
  log_likelihood, outputs = make(batch_size=16)
  check(log_likelihood(prompts, answers), prompts, answers)
  shapes = [(len(batch.prompt_lengths), len(batch.tokens)) for batch in outputs.batches]
  assert shapes == [(4, 16), (4, 16), (2, 8)]  # ten prompts, four at a time
  lengths = [batch.prompt_lengths.max() for batch in outputs.batches]
  assert lengths == sorted(lengths)


def test_long_answers_to_a_short_prompt_stand_alone():
  completions = texts(6, 30, 4)
  log_likelihood, outputs = make(batch_size=64)
  check(log_likelihood([''] * 6, completions), [''] * 6, completions)
  batch, = outputs.batches
  assert len(batch.prompt_lengths) == len(batch.tokens) == 8  # six, filled up


@pytest.mark.parametrize('context', [1, 3, 7])
@pytest.mark.parametrize('length', [7, 8, 9, 15, 16, 50])
def test_windows_score_every_token_once(length, context):
  # Periodic, so that windows read the same: they are still different windows.
  text = ('ab' * length)[:length]
  log_likelihood, outputs = make(8, context=context)
  found = log_likelihood([''], [text])
  check(found, [''], [text])
  nats, tokens = found.windows
  assert nats.sum() == pytest.approx(found.nats[0]) and tokens.sum() == length
  assert len(tokens) == (1 if length == 7 else -(-length // (8 - context)))
  for batch in outputs.batches:
    starts = batch.prompt_tokens[:, 0] == TOKENIZER.bos_token_id
    assert (batch.prompt_lengths[~starts] >= context).all()


def test_last_windows_see_more_and_share_batches():
  log_likelihood, outputs = make(64, context=4)
  found = log_likelihood([''] * 5, ['abcdefgh' * 10] * 5)  # 60 tokens after the BOS, then 20 more
  np.testing.assert_allclose(found.nats, expected('', 'abcdefgh' * 10)[0])
  lengths = [set(zip(map(int, batch.prompt_lengths), map(int, batch.loss_mask.sum(1))))
             for batch in outputs.batches]
  assert lengths == [{(1, 60)}, {(32, 20)}]  # 32 before as many as 20 are padded to
  long = [f'{"ab" * 40}{"c" * i}' for i in range(1, 9)]
  check(log_likelihood([''] * 8, long), [''] * 8, long)
  assert len(outputs.batches) == 2 + 2  # last windows of 21 to 28 tokens: one batch


def test_a_long_prompt_loses_its_left_end_but_not_the_bos(caplog):
  log_likelihood, outputs = make(16)
  with caplog.at_level('WARNING'):
    found = log_likelihood(['abcdefgh' * 4, 'ab'], ['abc', 'a'])
  assert '1 of 2 prompts are longer than the model' in caplog.text
  check(found, ['abcdefgh' * 4, 'ab'], ['abc', 'a'])  # a bigram sees no difference
  cut = next(batch for batch in outputs.batches if batch.prompt_lengths.max() > 3)
  kept = cut.prompt_tokens[cut.prompt_lengths.argmax()][:cut.prompt_lengths.max()]
  assert TOKENIZER.decode(kept) == '<bos>bcdefgh'  # 8 of 16 are for the completion's bucket


def test_an_empty_prompt_without_a_bos_is_the_end_token(shared_data):
  import transformers
  gpt2 = transformers.AutoTokenizer.from_pretrained(str(shared_data / 'tokenizers' / 'gpt2'))
  gpt2.bos_token = None
  seen = []
  def outputs(batch):
    seen.append(batch)
    return {'log_probs': np.full(batch.tokens.shape, -1.0), 'likeliest': batch.loss_mask}
  found = likelihood.make_log_likelihood(
      outputs, gpt2, end_ids=(50256,), max_tokens=64)(['', 'Is it?'], ['Hello world', ' yes'])
  np.testing.assert_array_equal(found.tokens, [2, 1])
  by_length = {int(n): row for batch in seen for n, row in zip(
      batch.prompt_lengths, batch.prompt_tokens)}
  assert by_length[1][0] == 50256 and gpt2.decode(by_length[3][:3]) == 'Is it?'


def test_what_has_no_likelihood():
  with pytest.raises(config.UserError, match='evaluation, completion 2 is empty'):
    make()[0](['a', 'b'], ['c', ''])
  with pytest.raises(ValueError, match='context=8: expected 1 to 7'):
    make(8, context=8)


def test_a_frozen_model_answers_once():
  calls = []
  def log_likelihood(prompts, completions, *, end=False):
    calls.append(end)
    return len(calls)
  recall = likelihood.remembered(log_likelihood)
  message = [{'role': 'user', 'content': 'x'}]
  assert recall([message], ['a']) == recall([list(message)], ['a']) == 1
  assert recall([message], ['a'], end=True) == 2 and recall([message], ['b']) == 3
  assert calls == [False, True, False]


def test_scores_of_a_reward_model():
  """A reward that counts the letters a of the answer and is read at the end token."""
  a, end = TOKENIZER.convert_tokens_to_ids('a'), TOKENIZER.eos_token_id
  def outputs(batch):
    last = np.take_along_axis(batch.tokens, batch.loss_mask.sum(1)[:, None] - 1, axis=1)
    assert (last == end).all()
    return {'scores': ((batch.tokens == a) & batch.loss_mask).sum(1)}
  score = likelihood.make_score(outputs, TOKENIZER, end_ids=(end,), max_tokens=48, batch_size=4)
  prompts, answers = ['ab' * 30, 'b', 'b', 'c'] * 3, texts(12, 20, 5)
  np.testing.assert_array_equal(score(prompts, answers), [text.count('a') for text in answers])
  with pytest.raises(config.UserError, match='a completion of 51 tokens; a reward model reads at'):
    score(['a'], ['b' * 50])


@pytest.fixture(scope='module')
def stories(shared_data):
  """The log-likelihood of the shared language model."""
  path = str(shared_data / 'models' / 'stories260K')
  model, tokenizer = hub.load_config(path), hub.load_tokenizer(path)
  params = hub.load_params(path, model)
  forward = jax.jit(functools.partial(policy.log_probs, model))
  def outputs(batch):
    return forward(params, batch.prompt_tokens, batch.prompt_lengths, batch.tokens)
  return functools.partial(likelihood.make_log_likelihood, outputs, tokenizer, end_ids=(1, 2))


def test_a_real_model_against_transformers(stories, shared_data):
  golden = json.loads((shared_data / 'models' / 'stories260K_golden.json').read_text())
  rows = golden['teacher_forced']
  found = stories(max_tokens=512)([''] * len(rows), [row['text'] for row in rows])
  for nats, tokens, row in zip(found.nats, found.tokens, rows):
    reference = row['token_logprobs']
    assert tokens == len(reference) == len(row['input_ids']) - 1
    # float32 against float32 in another framework: 1.7e-5 a token at most (the golden file).
    assert nats == pytest.approx(sum(reference), abs=1.7e-5 * tokens)


def test_a_split_text_adds_up(stories):
  """log p(whole) = log p(head) + log p(tail | head), through shared and padded batches."""
  head, tails = 'Once upon a time, there was a little', [' girl', ' boy named Tim', ' dog']
  log_likelihood = stories(max_tokens=64, batch_size=8)
  tail = log_likelihood([head] * 3, tails).nats
  whole = log_likelihood([''] * 4, [head] + [head + text for text in tails]).nats
  np.testing.assert_allclose(whole[0] + tail, whole[1:], atol=2e-4)  # 20 tokens, 1e-5 each
  assert log_likelihood([head], [' girl']).greedy[0]


def test_more_context_makes_a_long_text_likelier(stories, shared_data):
  text = (shared_data / 'tinystories' / 'tinystories_val_a.txt').read_text()[:2500]
  nats = [stories(max_tokens=64, context=context)([''], [text]).nats[0] for context in (1, 32)]
  assert nats[0] < nats[1] < 0
