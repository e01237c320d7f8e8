"""The preference door: prompts with a chosen and a rejected completion."""

import numpy as np

from ptjax import config
from ptjax.data import chat
from ptjax.data import examples
from ptjax.data import intake

_HUMAN, _ASSISTANT = '\n\nHuman:', '\n\nAssistant:'  # of dialogues written as one text
_ALIKE = 'with chosen and rejected alike'
_NOTHING_SHARED = 'without a prompt that chosen and rejected share'
_CUT = 'with a pair that would be cut'


def read(rows, tokenizer, *, limits=examples.Limits(), end_ids=None, want=(),
         demonstrations=False, both_orders=False):
  """Reads and tokenises preference pairs.

  Understood are, text or messages alike: `prompt`, `chosen`, `rejected`; and `chosen`, `rejected`
  alone, two whole texts or dialogues that begin alike. What they share is the prompt: whole
  messages of message lists (never the last); in dialogues written as text, "Human: ... Assistant:",
  all up to the last answer; else whole tokens. A prompt given beside whole message lists is
  theirs already and is not repeated. A column `prefix` beside `prompt` makes the pair one of next
  steps: it holds what the answer has said so far, up to and with what separates steps; prompt and
  prefix are then the prompt, and no end token stands behind the steps.

  Args:
    rows: `sources.Rows` or a list of dicts.
    tokenizer: a Hugging Face tokenizer.
    limits: examples.Limits.
    end_ids: ids that end a completion; None asks the tokenizer.
    want: names of numeric columns that become inputs, [N] float32: margins, chosen_scores, ...
    demonstrations: whether each pair has a third completion: that of the column `demonstration`
      where there is one, else the chosen one.
    both_orders: whether pairs are for a judge that reads both: the two completions of a pair are
      then chosen behind it rejected, and rejected behind it chosen. The limit is that of both
      together, and pairs that would have to be cut are dropped.
  Returns:
    Examples with the completions chosen, rejected (and demonstration); or for a judge both orders
    and the input `labels` [N, 2] bool: whether the first completion is the better one.
  Raises:
    UserError: a missing column, cells of different kinds, messages without a chat template, an
      overlong row under `error`, or nothing left. Rows with an empty part or with two completions
      that are alike are dropped.
  """
  reader = examples.Reader(
      rows, 'preferences', tokenizer, limits=limits, end_ids=end_ids, want=want)
  rows = reader.rows
  own = demonstrations and 'demonstration' in rows.columns
  names = ('chosen', 'rejected') + (('demonstration',) if demonstrations else ())
  questions, answers, implicit = [], [], []
  stepwise = {'prompt', 'prefix'} <= set(rows.columns)
  for i, row in enumerate(rows):
    group = [row['chosen'], row['rejected']]
    if demonstrations:
      group.append(row['demonstration'] if own else row['chosen'])
    if not all(group):
      reader.drop(intake.empty('prompt', *names))
      continue
    if stepwise:
      split = _step(row, group, reader.row_name(i))
    else:
      split = split_pair(row.get('prompt'), group, reader.row_name(i))
    if isinstance(split, str):
      reader.drop(split)
    elif reader.keep(i, *(split[:1] if stepwise else ()), *split[1], parts=('prompt', *names)):
      questions.append(split[0])
      answers.append(split[1])
      implicit.append(split[0] is None)
  if stepwise:
    prefixes = [rows[i]['prefix'] or '' for i in reader.kept]
    prompts, completions = chat.steps(
        reader.tokenizer, questions, prefixes, answers, where=reader.where)
  else:
    prompts, completions = _encode(reader, questions, answers, implicit)
  for place in reversed(range(len(prompts))):
    if not prompts[place]:
      reader.drop(_NOTHING_SHARED)
      del prompts[place], completions[place], reader.kept[place]
  if both_orders:
    both = [(chosen + rejected, rejected + chosen) for chosen, rejected in completions]
    return reader.admit(
        prompts, both, names=('chosen and rejected', 'rejected and chosen'),
        inputs={'labels': [(True, False)] * len(both)}, refuse=lambda place, group: (
            _ALIKE if both[place][0] == both[place][1] else
            _CUT if len(group[0]) < len(both[place][0]) else None))
  return reader.admit(prompts, completions, names=names, refuse=lambda place, group:
                      _ALIKE if np.array_equal(group[0], group[1]) else None)


def _encode(reader, questions, answers, implicit):
  """Encodes explicit prompts by `chat.groups` and implicit ones by `chat.shared`, in order."""
  prompts, completions = [None] * len(questions), [None] * len(questions)
  explicit = [i for i, alone in enumerate(implicit) if not alone]
  _, ids, groups = chat.groups(
      reader.tokenizer, [questions[i] for i in explicit], [answers[i] for i in explicit],
      end_ids=reader.end_ids, where=lambda place: reader.where(explicit[place]))
  for i, own, group in zip(explicit, ids, groups):
    prompts[i], completions[i] = own, group
  whole = [i for i, alone in enumerate(implicit) if alone]
  ids, groups = chat.shared(
      reader.tokenizer, [answers[i] for i in whole], end_ids=reader.end_ids)
  for i, own, group in zip(whole, ids, groups):
    prompts[i], completions[i] = own, group
  return prompts, completions


def split_pair(prompt, group, where):
  """Takes a pair apart into a prompt and what follows it.

  Args:
    prompt: text, messages or None.
    group: the completions, none empty: texts or messages, perhaps with the prompt in front.
    where: names the row in errors.
  Returns:
    (prompt, completions); the prompt is None where the completions are texts of which `chat.shared`
    must find the common part. Or the reason to drop the row.
  Raises:
    UserError: cells of different kinds.
  """
  if all(isinstance(answer, str) for answer in group):
    if prompt:
      return prompt, tuple(group)
    return _dialogue(group) or (None, tuple(group))
  lists = [_messages(answer, where) for answer in group]
  if prompt and all(turns[0]['role'] == 'assistant' for turns in lists):
    own = [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else (
        _messages(prompt, where))
    return own, tuple(lists)
  if not prompt or isinstance(prompt, str):
    length = _common(lists[:2])
    if not length:
      return _NOTHING_SHARED
    shared = lists[0][:length]
  else:
    shared = _messages(prompt, where)
  # A demonstration may be the answer alone.
  lists = [turns[len(shared):] if turns[:len(shared)] == shared else turns for turns in lists]
  return shared, tuple(lists)


def _step(row, group, where):
  """The prompt and the steps of a row of next steps."""
  for name, cell in (('prefix', row['prefix'] or ''), *(('a step', step) for step in group)):
    if not isinstance(cell, str):
      raise config.UserError(f'{where}: {name}: expected text, found {cell!r}')
  return row['prompt'], tuple(group)


def _messages(value, where):
  if isinstance(value, str):
    return [{'role': 'assistant', 'content': value}]
  found = chat.messages([value] if isinstance(value, dict) else value)
  if found is None:
    raise chat.not_a_prompt(value, where)
  return found


def _common(lists):
  """How many messages both begin with, never all of either."""
  most = min(len(turns) for turns in lists) - 1
  for length in range(most):
    if lists[0][length] != lists[1][length]:
      return length
  return max(most, 0)


def _dialogue(group):
  """Splits dialogues of the form "Human: ... Assistant: ..." at the last answer, or None."""
  if not all(text.lstrip().startswith(_HUMAN.strip()) for text in group):
    return None
  ends = [text.rfind(_ASSISTANT) + len(_ASSISTANT) for text in group]
  heads = {text[:end] for text, end in zip(group, ends)}
  if len(heads) > 1 or ends[0] < len(_ASSISTANT):
    return None
  return heads.pop(), tuple(text[end:] for text, end in zip(group, ends))
