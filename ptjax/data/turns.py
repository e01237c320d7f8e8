"""Whole conversations in which every assistant turn trains.

Which tokens are the assistant's comes from the template: from its `{% generation %}` markers where
it has them, else from what it writes for the conversation up to each turn.
"""

import dataclasses
import re

from ptjax.data import chat

_MARKERS = re.compile(r'\{%-?\s*generation\s*-?%\}')  # as transformers looks for them
_STAND_IN = 'STANDS-IN-FOR-A-TURN'

NOT_MESSAGES = 'without an assistant turn after a prompt'
NOT_KEPT_APART = 'with assistant turns that the chat template does not keep apart'


@dataclasses.dataclass(frozen=True)
class Conversation:
  """A conversation as token ids; prompt and completion are one text that is encoded once."""
  prompt: list  # ids before the first assistant turn that trains
  completion: list  # ids from there to the end of the last assistant turn
  mask: list  # bool per id of the completion: True in assistant turns


def encode(tokenizer, values, *, end_ids, where):
  """Encodes conversations.

  Without markers in the template, a turn begins where the template would have the assistant begin
  and ends with the first end token that the template writes behind it (the last turn gets one
  where the template writes none). With markers, exactly what they enclose trains. An assistant
  turn with nothing before it is context.

  Args:
    tokenizer: a Hugging Face tokenizer.
    values: message lists.
    end_ids: ids that end a completion.
    where: function from the position in `values` to the row's name in errors.
  Returns:
    One `Conversation` per value, or the reason to drop it.
  Raises:
    UserError: a value that is no list of messages, or messages without a chat template.
  """
  marked = tokenizer.is_fast and _MARKERS.search(tokenizer.get_chat_template()
                                                 if tokenizer.chat_template else '')
  results, pending = [], []
  for i, value in enumerate(values):
    conversation = chat.messages(value)
    if conversation is None:
      raise chat.not_a_prompt(value, where(i))
    if all(message['role'] != 'assistant' for message in conversation[1:]):
      results.append(NOT_MESSAGES)
    elif marked:
      results.append(_by_markers(tokenizer, conversation))
    else:
      pieces = _pieces(tokenizer, conversation, where(i))
      results.append(NOT_KEPT_APART if pieces is None else None)
      if pieces is not None:
        pending.append((i, pieces))
  ids = _encode_pieces(tokenizer, [pieces for _, pieces in pending])
  for (i, _), parts in zip(pending, ids):
    results[i] = _joined(parts, end_ids)
  return results


def _by_markers(tokenizer, conversation):
  encoded = tokenizer.apply_chat_template(
      conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
  ids, mask = list(encoded['input_ids']), [bool(m) for m in encoded['assistant_masks']]
  if not any(mask):
    return NOT_MESSAGES
  first, last = mask.index(True), len(mask) - mask[::-1].index(True)
  return Conversation(ids[:first], ids[first:last], mask[first:last])


def _pieces(tokenizer, conversation, where):
  """Splits the rendered conversation: [context, turn, context, turn, ...] as texts, or None."""
  whole = chat.render(tokenizer, conversation, where=where)
  edges = [0]
  for k, message in enumerate(conversation):
    if k == 0 or message['role'] != 'assistant':
      continue
    before = conversation[:k]
    if before[-1]['role'] == 'assistant':
      return None  # the second of two in a row has no beginning of its own
    start = chat.render(tokenizer, before, where=where, prompt=True)
    if not whole.startswith(start) or len(start) < edges[-1]:
      return None
    stop = _turn_end(tokenizer, conversation, k, whole, start, where)
    if stop is None or stop <= len(start):
      return None
    edges += [len(start), stop]
  return [whole[a:b] for a, b in zip(edges, edges[1:])]


def _turn_end(tokenizer, conversation, k, whole, start, where):
  """Where the text of turn `k` ends, or None.

  Some templates write a turn differently once another follows (reasoning is left out of earlier
  turns). Then a stand-in for its content shows what the template writes behind it.
  """
  until = chat.render(tokenizer, conversation[:k + 1], where=where)
  if whole.startswith(until):
    return len(until)
  replaced = [*conversation[:k], {**conversation[k], 'content': _STAND_IN}]
  tail = chat.render(tokenizer, replaced, where=where).rpartition(_STAND_IN)[2]
  marked = chat.render(tokenizer, replaced + conversation[k + 1:], where=where)
  head, found, behind = marked.partition(_STAND_IN)
  if not found or not head.startswith(start) or not whole.endswith(behind) or not (
      behind.startswith(tail)):
    return None
  return len(whole) - len(behind) + len(tail)


def _encode_pieces(tokenizer, texts):
  """Encodes each list of pieces so that no token reaches across an edge."""
  prefixes, owners = [], []
  for i, pieces in enumerate(texts):
    for k in range(1, len(pieces) + 1):
      prefixes.append(''.join(pieces[:k]))
      owners.append(i)
  encoded = [[] for _ in texts]
  for i, ids in zip(owners, chat.encode(tokenizer, prefixes, [False] * len(prefixes))):
    encoded[i].append(ids)
  results = []
  for pieces, prefix_ids in zip(texts, encoded):
    parts, done = [], []
    for piece, ids in zip(pieces, prefix_ids):
      if ids[:len(done)] == done:
        parts.append(ids[len(done):])
      else:  # a token reaches across an edge, where a sampled turn could not have it
        parts.append(chat.continuation_ids(tokenizer, piece))
        ids = done + parts[-1]
      done = ids
    results.append(parts)
  return results


def _joined(parts, end_ids):
  completion, mask = [], []
  for k, ids in enumerate(parts[1:], start=1):
    if k % 2 == 0:
      completion += ids
      mask += [False] * len(ids)
      continue
    turn = chat.end(ids, end_ids, cut=True) if (
        k == len(parts) - 1 or any(i in end_ids for i in ids)) else ids
    completion += turn
    mask += [True] * len(turn)
    if k < len(parts) - 1:  # what the template writes behind the end is context
      completion += ids[len(turn):]
      mask += [False] * (len(ids) - len(turn))
  return Conversation(parts[0], completion, mask)
