"""The demonstration door: prompts with the completions to imitate."""

from ptjax.data import chat
from ptjax.data import examples
from ptjax.data import turns as turns_lib

TURNS = ('last', 'all')


def read(rows, tokenizer, *, limits=examples.Limits(), end_ids=None, want=(), turns='last'):
  """Reads and tokenises demonstrations.

  Args:
    rows: `sources.Rows` or a list of dicts, with `prompt` and `completion`, or `messages`.
    tokenizer: a Hugging Face tokenizer.
    limits: examples.Limits.
    end_ids: ids that end a completion; None asks the tokenizer.
    want: names of numeric columns that become inputs.
    turns: of `messages`, what trains. `last`: the last assistant turn is the completion and what
      stands before it the prompt. `all`: every assistant turn trains; the prompt is what stands
      before the first one, and the completion all that follows, the other turns masked.
  Returns:
    Examples with one completion each.
  Raises:
    UserError: a missing column, a cell of the wrong kind, messages without a chat template, an
      overlong row under `error`, a tokenizer without an end token, or no row left.
  """
  if turns not in TURNS:
    raise ValueError(f'turns={turns!r}: expected one of {", ".join(TURNS)}')
  reader = examples.Reader(
      rows, 'demonstrations', tokenizer, limits=limits, end_ids=end_ids, want=want)
  rows = reader.rows
  if turns == 'all' and 'messages' in rows.columns and 'completion' not in rows.columns:
    return _all_turns(reader)
  questions, answers = [], []
  for i, row in enumerate(rows):
    question, answer = last_turn(row)
    if reader.keep(i, question, answer, parts=('prompt', 'completion')):
      questions.append(question)
      answers.append((answer,))
  _, prompts, completions = chat.groups(
      tokenizer, questions, answers, end_ids=reader.end_ids, where=reader.where)
  return reader.admit(prompts, completions, names=('completion',))


def _all_turns(reader):
  conversations = []
  for i, row in enumerate(reader.rows):
    if reader.keep(i, row['messages'], parts=('prompt', 'completion')):
      conversations.append(row['messages'])
  found = turns_lib.encode(
      reader.tokenizer, conversations, end_ids=reader.end_ids, where=reader.where)
  kept = []
  for row_id, one in zip(reader.kept, found):
    if isinstance(one, str):
      reader.drop(one)
    else:
      kept.append((row_id, one))
  reader.kept = [row_id for row_id, _ in kept]
  return reader.admit([one.prompt for _, one in kept], [(one.completion,) for _, one in kept],
                      names=('completion',), masks=[(one.mask,) for _, one in kept])


def last_turn(row):
  """Returns (prompt, completion) of a row: its own, or a conversation split at its last answer.

  (None, None) where no assistant turn is in it, or the last one says nothing.
  """
  if row.get('completion') is not None or 'messages' not in row:
    return row.get('prompt'), row.get('completion')
  value = row['messages']
  conversation = chat.messages(value)
  if conversation is None:
    return value, value  # not messages: the encoder says so, with the row
  for i in reversed(range(len(conversation))):
    if conversation[i]['role'] == 'assistant':
      said = conversation[i].get('content') or conversation[i].get('tool_calls')
      return (conversation[:i], conversation[i:i + 1]) if said else (None, None)
  return None, None
