"""Log-likelihoods and scores of texts, from compiled functions of token batches.

What is made here does all that lies between: encoding, sharing prompts, batches of few shapes,
texts longer than the model.
"""

import dataclasses
import hashlib
import json
import logging

import numpy as np

from ptjax import config
from ptjax.data import chat
from ptjax.data import stepwise
from ptjax.data import tokenizer as tokenizers
from ptjax.evaluation import text_batches

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Likelihoods:
  """What N completions are worth."""
  nats: np.ndarray  # [N] float64; summed log-probs, at most 0
  tokens: np.ndarray  # [N] int64; how many were summed
  greedy: np.ndarray  # [N] bool; True where no token of the completion had a likelier rival
  windows: tuple | None = None  # (nats [W], tokens [W]): the same by window; W = N or more


def make_log_likelihood(outputs, tokenizer, *, end_ids, max_tokens, batch_size=64, multiple=1,
                        context=1):
  """Returns `log_likelihood(prompts, completions, *, end=False) -> Likelihoods`.

  Prompts are texts or messages, completions texts (or messages after messages), each encoded as a
  training row would be; `end` adds the end token. An empty prompt is the tokenizer's BOS or, where
  it has none, its end token. Equal prompts are run once for up to eight completions. A prompt
  that does not fit loses its left end (BOS aside); a completion that does not fit is scored in
  windows.

  Args:
    outputs: `f(types.TokenBatch) -> {'log_probs': [B, T] nats, 'likeliest': [B, T] bool}`, host
      or device arrays; called with few different shapes.
    tokenizer: a Hugging Face tokenizer.
    end_ids: ids that end a completion, the first of them where none stands there yet.
    max_tokens: of a prompt and its completion together, the model's limit or less.
    batch_size: completions per call, about.
    multiple: the number of prompts in a call divides by it (data x fsdp devices).
    context: tokens that every window after the first sees before those it scores; more of them
      make long texts likelier and dearer. lm-evaluation-harness takes 1.
  """
  if not 0 < context < max_tokens:
    raise ValueError(f'context={context}: expected 1 to {max_tokens - 1}')

  def log_likelihood(prompts, completions, *, end=False):
    encoded = text_batches.encode(tokenizer, prompts, completions, end_ids, end)
    pieces = _cut(encoded, max_tokens, context, tokenizer.bos_token_id)
    nats, greedy, windows = np.zeros(len(encoded)), np.ones(len(encoded), bool), []
    for batch, rows in _batches(pieces, max_tokens, batch_size, multiple, tokenizer):
      found = outputs(batch)
      sums = np.sum(np.asarray(found['log_probs'], np.float64), axis=1, where=batch.loss_mask)
      likeliest = np.all(np.asarray(found['likeliest']), axis=1, where=batch.loss_mask)  # [B]
      for place, piece in rows:
        nats[piece.owner] += sums[place]
        greedy[piece.owner] &= likeliest[place]
        windows.append((sums[place], len(piece.completion)))
    return Likelihoods(nats, np.array([len(ids) for _, ids in encoded], np.int64), greedy,
                       tuple(map(np.array, zip(*windows))))

  return log_likelihood


def make_score(outputs, tokenizer, *, end_ids, max_tokens, batch_size=64, multiple=1):
  """Returns `score(prompts, completions, *, ids=None) -> [N] float64`, a reward model's.

  Texts are encoded as in training: with the end token, which is where the score is read. A prompt
  that does not fit loses its left end. `ids`, where given, are [(prompt ids, completion ids)] to
  score in the place of the texts.

  Args:
    outputs: `f(types.TokenBatch) -> {'scores': [B]}`, host or device arrays.
    tokenizer, end_ids, max_tokens, batch_size, multiple: as for `make_log_likelihood`.
  Raises, when called:
    config.UserError: a completion that does not fit by itself.
  """
  def score(prompts, completions, *, ids=None):
    encoded = ids or text_batches.encode(tokenizer, prompts, completions, end_ids, True)
    scores = np.zeros(len(encoded))
    pieces = _whole(encoded, max_tokens, tokenizer.bos_token_id)
    for batch, rows in _batches(pieces, max_tokens, batch_size, multiple, tokenizer):
      found = np.asarray(outputs(batch)['scores'], np.float64)
      for place, piece in rows:
        scores[piece.owner] = found[place]
    return scores

  return score


def make_step_scores(outputs, tokenizer, *, max_tokens, batch_size=64, multiple=1):
  """Returns `step_scores(prompts, solutions) -> N lists of floats`, a process reward model's.

  Solutions are lists of steps, texts, encoded as in training (see data.stepwise). The score of a
  step is the probability that it is good, read at the last token of the separator behind it.

  Args:
    outputs: `f(types.TokenBatch) -> {'step_logits': [B, T, 2]}`, host or device arrays.
    tokenizer, max_tokens, batch_size, multiple: as for `make_log_likelihood`.
  Raises, when called:
    config.UserError: a solution that does not fit by itself.
  """
  def step_scores(prompts, solutions):
    where = lambda place: f'completion {place + 1}'
    _, prompt_ids = chat.prompts(tokenizer, prompts, where=where)
    encoded = stepwise.encode(tokenizer, solutions)
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    pairs = [(prompt or [start], ids) for prompt, (ids, _) in zip(prompt_ids, encoded)]
    asked = [place for place, (_, ids) in enumerate(pairs) if ids]
    found = [[] for _ in pairs]
    pieces = _whole([pairs[place] for place in asked], max_tokens, tokenizer.bos_token_id)
    for batch, rows in _batches(pieces, max_tokens, batch_size, multiple, tokenizer):
      logits = np.asarray(outputs(batch)['step_logits'], np.float64)  # [B, T, 2]
      good = 1.0 / (1.0 + np.exp(np.clip(logits[..., 0] - logits[..., 1], -500.0, 500.0)))
      for place, piece in rows:
        owner = asked[piece.owner]
        found[owner] = [float(good[place, i]) for i, step in enumerate(encoded[owner][1])
                        if step >= 0]
    return found

  return step_scores


def remembered(log_likelihood):
  """Returns `log_likelihood` that computes a question once: for a frozen reference."""
  answers = {}

  def recall(prompts, completions, *, end=False):
    question = json.dumps([list(prompts), list(completions), end])
    key = hashlib.sha256(question.encode()).digest()
    if key not in answers:
      answers[key] = log_likelihood(prompts, completions, end=end)
    return answers[key]

  return recall


def _cut(encoded, max_tokens, context, bos):
  """Returns the pieces of (prompt ids, completion ids); says how many prompts were cut."""
  pieces, cut = [], 0
  for owner, (prompt, completion) in enumerate(encoded):
    found = text_batches.fit(prompt, completion, max_tokens, context, bos)
    cut += len(found) == 1 and found[0][0] != prompt
    pieces += [text_batches.Piece(owner, tuple(before), tuple(ids)) for before, ids in found]
  if cut:
    _LOGGER.warning('%d of %d prompts are longer than the model and lost their left end', cut,
                    len(encoded))
  return pieces


def _whole(encoded, max_tokens, bos):
  """As `_cut`, but completions that do not fit are refused: their score is at their end."""
  longest = max((len(completion) for _, completion in encoded), default=0)
  if longest >= max_tokens:
    raise config.UserError(f'evaluation: a completion of {longest} tokens; a reward model reads '
                           f'at most {max_tokens} with the prompt')
  return _cut(encoded, max_tokens, 1, bos)


def _batches(pieces, max_tokens, batch_size, multiple, tokenizer):
  """Yields (types.TokenBatch, [(row of it, piece)]); each piece once, although rows repeat."""
  for groups in text_batches.batches(pieces, max_tokens, batch_size, multiple):
    rows = {piece: place for place, piece in enumerate(p for group in groups for p in group)}
    yield (text_batches.stack(groups, max_tokens, tokenizers.pad_id(tokenizer)),
           [(place, piece) for piece, place in rows.items()])
