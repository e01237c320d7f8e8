"""Log-likelihoods of texts, from a compiled function of token batches.

`make_log_likelihood` does all that lies between: encoding, sharing prompts, batches of few shapes,
texts longer than the model.
"""

import dataclasses
import hashlib
import json
import logging

import numpy as np

from ptjax import config
from ptjax import types
from ptjax.data import batching
from ptjax.data import chat
from ptjax.data import tokenizer as tokenizers

_LOGGER = logging.getLogger(__name__)
_MAX_GROUP = 8  # completions that share one run of their prompt


@dataclasses.dataclass(frozen=True)
class Likelihoods:
  """What N completions are worth."""
  nats: np.ndarray  # [N] float64; summed log-probs, at most 0
  tokens: np.ndarray  # [N] int64; how many were summed
  greedy: np.ndarray  # [N] bool; True where no token of the completion had a likelier rival


@dataclasses.dataclass(frozen=True, eq=False)  # two windows of one text may read the same
class _Piece:
  """A completion, or a window of one, with what stands before it."""
  owner: int  # which completion
  prompt: tuple  # of ids, at least one
  completion: tuple  # of ids, at least one


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
    encoded = _encode(tokenizer, prompts, completions, end_ids, end)
    pieces, cut = [], 0
    for owner, (prompt, completion) in enumerate(encoded):
      found = _fit(prompt, completion, max_tokens, context, tokenizer.bos_token_id)
      cut += len(found) == 1 and found[0][0] != prompt
      pieces += [_Piece(owner, tuple(before), tuple(ids)) for before, ids in found]
    if cut:
      _LOGGER.warning('%d of %d prompts are longer than the model and lost their left end', cut,
                      len(encoded))
    nats, greedy = np.zeros(len(encoded)), np.ones(len(encoded), bool)
    for chosen in _batches(pieces, max_tokens, batch_size, multiple):
      batch = _stack(chosen, max_tokens, tokenizers.pad_id(tokenizer))
      found = outputs(batch)
      mask = batch.loss_mask
      sums = np.sum(np.asarray(found['log_probs'], np.float64), axis=1, where=mask)  # [B]
      likeliest = np.all(np.asarray(found['likeliest']), axis=1, where=mask)  # [B]
      places = [piece for group in chosen for piece in group]
      counted = set()
      for piece, total, best in zip(places, sums, likeliest):
        if piece not in counted:  # a batch is filled up by repetition
          counted.add(piece)
          nats[piece.owner] += total
          greedy[piece.owner] &= best
    return Likelihoods(nats, np.array([len(ids) for _, ids in encoded], np.int64), greedy)

  return log_likelihood


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


def _encode(tokenizer, prompts, completions, end_ids, end):
  """Returns [(prompt ids, completion ids)], neither of them empty."""
  _, prompt_ids, groups = chat.groups(
      tokenizer, prompts, [(completion,) for completion in completions], end_ids=end_ids,
      where=lambda place: f'evaluation, completion {place + 1}')
  # `groups` ends every completion, as for training.
  completion_ids = [ids if end else ids[:-1] for ids, in groups]
  start = tokenizer.bos_token_id
  start = end_ids[0] if start is None else start
  for place, ids in enumerate(completion_ids):
    if not ids:
      raise config.UserError(f'evaluation, completion {place + 1} is empty: it has no likelihood')
  return [(ids or [start], completion) for ids, completion in zip(prompt_ids, completion_ids)]


def _fit(prompt, completion, max_tokens, context, bos):
  """Returns [(prompt, completion)] that fit; more than one where the completion does not."""
  if len(prompt) + len(completion) <= max_tokens:
    return [(prompt, completion)]
  room = _room(len(completion), max_tokens, context)
  if room >= context:
    if prompt[0] == bos and room > 1:
      return [([bos, *prompt[len(prompt) - room + 1:]], completion)]
    return [(prompt[len(prompt) - room:], completion)]
  ids, stride, pieces = [*prompt, *completion], max_tokens - context, []
  for start in range(len(prompt), len(ids), stride):
    stop = min(start + stride, len(ids))
    before = max(0, start - _room(stop - start, max_tokens, context))  # the last one sees more
    pieces.append((ids[before:start], ids[start:stop]))
  return pieces


def _room(length, max_tokens, context):
  """Tokens of context that fit before `length` others: as if they filled their bucket.

  Texts cut like this can be batched: each row's context and the longest completion fit together.
  """
  room = max_tokens - batching.bucket(length)
  return room if room >= context else max_tokens - length


def _batches(pieces, max_tokens, batch_size, multiple):
  """Yields lists of groups, each group a list of pieces after one prompt, all of one size.

  Sorted by length, so that little is padded. Groups and batches are filled up by repetition.
  """
  shared = {}
  for piece in pieces:
    shared.setdefault(piece.prompt, []).append(piece)
  by_size = {}
  for prompt, alike in shared.items():
    # One run of a short prompt is no saving, and its completions would attend in one long row.
    most = _MAX_GROUP if len(prompt) * len(alike) > sum(len(p.completion) for p in alike) else 1
    for start in range(0, len(alike), most):
      group = alike[start:start + most]
      size = 1 << (len(group) - 1).bit_length()  # 1, 2, 4 or 8: few programs
      by_size.setdefault(size, []).append(group + group[-1:] * (size - len(group)))
  for size, groups in by_size.items():
    longest = lambda group: max(len(piece.completion) for piece in group)
    groups.sort(key=lambda group: (len(group[0].prompt), longest(group)))
    most, batch = max(1, batch_size // size), []
    for group in groups:
      # Padded positions must stay inside the model too: position tables end at max_tokens.
      fits = len(group[0].prompt) + max(map(longest, [*batch, group])) <= max_tokens
      if batch and (len(batch) >= most or not fits):
        yield _filled(batch, most, multiple)
        batch = []
      batch.append(group)
    yield _filled(batch, most, multiple)


def _filled(batch, most, multiple):
  """Fills a batch up to a size that others have too, by repetition."""
  size = min(most, 1 << (len(batch) - 1).bit_length())
  size = -(-size // multiple) * multiple
  return batch + batch[-1:] * (size - len(batch))


def _stack(groups, max_tokens, fill):
  """Returns the `types.TokenBatch` of some groups."""
  prompts = [group[0].prompt for group in groups]
  completions = [piece.completion for group in groups for piece in group]
  longest = max(map(len, prompts))
  size = batching.bucket(max(map(len, completions)), max_tokens - longest)
  prompt_tokens, prompt_lengths = batching.pad_right(
      prompts, batching.bucket(longest, max_tokens), fill)
  tokens, lengths = batching.pad_right(completions, size, fill)
  return types.TokenBatch(
      prompt_tokens=prompt_tokens, prompt_lengths=prompt_lengths, tokens=tokens,
      loss_mask=np.arange(size)[None] < lengths[:, None],  # [B, T]
      on_policy=np.bool_(False), inputs={})
