"""Texts as token batches: encoded, cut to fit, prompts shared, sizes few."""

import dataclasses

import numpy as np

from ptjax import config
from ptjax import types
from ptjax.data import batching
from ptjax.data import chat

_MAX_GROUP = 8  # completions that share one run of their prompt


@dataclasses.dataclass(frozen=True, eq=False)  # two windows of one text may read the same
class Piece:
  """A completion, or a window of one, with what stands before it."""
  owner: int  # which completion
  prompt: tuple  # of ids, at least one
  completion: tuple  # of ids, at least one


def encode(tokenizer, prompts, completions, end_ids, end):
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


def fit(prompt, completion, max_tokens, context, bos):
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


def batches(pieces, max_tokens, batch_size, multiple):
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


def stack(groups, max_tokens, fill):
  """Returns the `types.TokenBatch` of some groups, padded with `fill`."""
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
