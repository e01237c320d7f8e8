"""The real checkpoint in the shared data: log-probs, greedy text and stop ids as recorded."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax.models import attention
from ptjax.models import hub
from ptjax.models import transformer


@pytest.fixture(scope='module')
def stories(shared_data):
  directory = shared_data / 'models' / 'stories260K'
  golden = json.loads((shared_data / 'models' / 'stories260K_golden.json').read_text())
  return hub.load(directory), golden


def log_probs(config, params, rows):
  """Next-token log-probs [rows, length, vocab] of right-padded rows of ids."""
  positions = jnp.tile(jnp.arange(rows.shape[1]), rows.shape[0])
  attend = attention.prefill(config, jnp.full([len(rows)], rows.shape[1]), rows.shape[1])
  hidden, _ = transformer.forward(config, params, rows.reshape(-1), positions, attend)
  return jax.nn.log_softmax(
      transformer.logits(config, params, hidden)).reshape(*rows.shape, config.vocab_size)


def test_real_checkpoint_log_probs(stories):
  (config, params, tokenizer), golden = stories
  for row in golden['teacher_forced']:
    ids = np.array(row['input_ids'], np.int32)
    assert tokenizer(row['text']).input_ids == row['input_ids']
    got = np.asarray(log_probs(config, params, ids[None])[0, :-1])
    got = np.take_along_axis(got, ids[1:, None], axis=1)[:, 0]
    # The file was computed in float64; torch's own float32 is off by up to 1.7e-5.
    np.testing.assert_allclose(
        got, row['token_logprobs'], rtol=0, atol=2 * golden['float32_max_abs_diff'])


def test_real_checkpoint_greedy_text(stories):
  (config, params, tokenizer), golden = stories
  prompts = golden['prompts']
  lengths = np.array([len(row['input_ids']) for row in prompts])
  count = len(prompts[0]['greedy_ids'])
  rows = np.zeros([len(prompts), lengths.max() + count], np.int32)
  for row, prompt in zip(rows, prompts):
    row[:len(prompt['input_ids'])] = prompt['input_ids']

  @jax.jit
  def generate(params, rows):
    def step(t, rows):
      last = jnp.asarray(lengths) + t
      scores = log_probs(config, params, rows)
      scores = jnp.take_along_axis(scores, last[:, None, None] - 1, axis=1)[:, 0]
      return rows.at[jnp.arange(len(prompts)), last].set(scores.argmax(-1).astype(jnp.int32))
    return jax.lax.fori_loop(0, count, step, rows)

  rows = np.asarray(generate(params, rows))
  for row, prompt, length in zip(rows, prompts, lengths):
    want = prompt['greedy_ids']
    assert row[length:length + len(want)].tolist() == want
    assert tokenizer.decode(want) == prompt['greedy_text']


def test_real_checkpoint_stops_on_both_ids(stories, shared_data):
  directory = shared_data / 'models' / 'stories260K'
  assert hub.load_stop_ids(directory, stories[0][2]) == (1, 2)
