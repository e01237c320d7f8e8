"""From text or messages to token ids, once.

Text is encoded as it stands, with the beginning-of-text token where the tokenizer adds one.
Messages go through the tokenizer's own chat template. Ids made here are kept: nothing decodes
them and encodes the text again, which need not give the same ids.
"""

from collections import abc
import pathlib

from ptjax import config

# ShareGPT's words for the same things.
_ROLES = {'human': 'user', 'gpt': 'assistant'}


def messages(value):
  """Returns a message list as `[{'role', 'content', ...}]`, or None if `value` is not one.

  Understands ShareGPT's `from` and `value`, and drops keys that hold None (Arrow fills them in).
  """
  if not isinstance(value, (list, tuple)) or not value:
    return None
  result = []
  for message in value:
    if not isinstance(message, abc.Mapping):
      return None
    message = {key: item for key, item in message.items() if item is not None}
    if 'from' in message and 'value' in message:
      role = message.pop('from')
      message = {'role': _ROLES.get(role, role), 'content': message.pop('value'), **message}
    if 'role' not in message or not {'content', 'tool_calls'} & set(message):
      return None
    result.append(message)
  return result


def not_a_prompt(value, where):
  """Returns the error for a value that is neither text nor messages."""
  return config.UserError(
      f"{where}: a prompt is text or a list of messages {{'role': ..., 'content': ...}}, "
      f'not {_describe(value)}')


def with_template(tokenizer, path):
  """Gives a tokenizer the chat template of a Jinja file; None leaves it its own.

  Raises:
    UserError: no such file.
  """
  if path is not None:
    try:
      tokenizer.chat_template = pathlib.Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
      raise config.UserError(f'data.chat_template={path}: cannot be read ({error})') from error
  return tokenizer


def render(tokenizer, conversation, *, where, prompt=False):
  """Writes messages as text with the tokenizer's chat template.

  Args:
    tokenizer: a Hugging Face tokenizer.
    conversation: messages, as `messages` returns them.
    where: names the row in errors.
    prompt: True where an answer is to follow: the assistant's turn is opened, or continued if the
      last message is the assistant's.
  Raises:
    UserError: the tokenizer has no template, or the template refuses the messages.
  """
  if not tokenizer.chat_template:
    raise config.UserError(
        f'{where} is a list of messages, but the tokenizer '
        f'{tokenizer.name_or_path or "made in memory"} has no chat template; name one with '
        '--set=data.chat_template=FILE.jinja (the trained model keeps it), use a chat model\'s '
        'tokenizer, or give prompts as text')
  continues = prompt and conversation[-1]['role'] == 'assistant'
  try:
    return tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=prompt and not continues,
        continue_final_message=continues)
  except Exception as error:  # a template is a program of the model's author: anything may come
    reason = ' '.join(str(error).split())
    raise config.UserError(
        f'{where}: the chat template refuses these messages: {reason}') from error


def prompts(tokenizer, values, *, where):
  """Encodes prompts.

  Args:
    tokenizer: a Hugging Face tokenizer.
    values: texts and message lists, mixed as they come.
    where: function from the position in `values` to the row's name in errors.
  Returns:
    List of texts (messages rendered) and list of id lists, of the same length.
  Raises:
    UserError: a value that is neither, or messages without a chat template.
  """
  texts, is_text = [], []
  for i, value in enumerate(values):
    is_text.append(isinstance(value, str))
    if is_text[-1]:
      texts.append(value)
      continue
    conversation = messages(value)
    if conversation is None:
      raise not_a_prompt(value, where(i))
    texts.append(render(tokenizer, conversation, where=where(i), prompt=True))
  return texts, encode(tokenizer, texts, is_text)


def groups(tokenizer, questions, answers, *, end_ids, where):
  """Encodes prompts with the completions that follow each of them.

  The ids of a prompt are those `prompts` gives, so that what is trained is what will be sampled
  from. A completion ends with an end token: the one the chat template writes, else the
  tokenizer's.

  Args:
    tokenizer: a Hugging Face tokenizer.
    questions: P texts or message lists.
    answers: P tuples of G texts; or, where the question is messages, texts or messages.
    end_ids: ids that end a completion (`tokenizer.eos_ids`).
    where: as in `prompts`.
  Returns:
    P prompt texts, P prompt id lists, P tuples of G completion id lists.
  Raises:
    UserError: as `prompts`; or a template that writes the prompt differently once the answer
      stands behind it.
  """
  texts, prompt_ids = prompts(tokenizer, questions, where=where)
  wholes, owners = [], []
  for i, (question, group) in enumerate(zip(questions, answers)):
    for answer in group:
      owners.append(i)
      if isinstance(question, str):
        if not isinstance(answer, str):
          raise config.UserError(f'{where(i)}: after a prompt given as text a completion must be '
                                 f'text, not {_describe(answer)}')
        wholes.append(texts[i] + answer)
      else:
        wholes.append(_whole_conversation(tokenizer, question, answer, texts[i], where(i)))
  is_text = [isinstance(questions[i], str) for i in owners]
  whole_ids = encode(tokenizer, wholes, is_text)
  completions = [[] for _ in questions]
  for i, whole, both, text_only in zip(owners, wholes, whole_ids, is_text):
    ids = prompt_ids[i]
    if both[:len(ids)] == ids:
      completion = both[len(ids):]
    else:  # a token reaches across the seam, where a sampled completion could not have it
      completion = continuation_ids(tokenizer, whole[len(texts[i]):])
    completions[i].append(end(completion, end_ids, cut=not text_only))
  return texts, prompt_ids, [tuple(group) for group in completions]


def steps(tokenizer, questions, prefixes, answers, *, where):
  """Encodes prompts, the beginning of an answer, and the next steps that may follow it.

  Args:
    tokenizer: a Hugging Face tokenizer.
    questions: P texts or message lists.
    prefixes: P texts, what the answer has said so far; the prompt goes on to its end.
    answers: P tuples of G texts. A step is no whole answer, so no end token stands behind it.
    where: as in `prompts`.
  Returns:
    P prompt id lists and P tuples of G completion id lists.
  """
  texts, _ = prompts(tokenizer, questions, where=where)
  heads = [text + prefix for text, prefix in zip(texts, prefixes)]
  is_text = [isinstance(question, str) for question in questions]
  prompt_ids = encode(tokenizer, heads, is_text)
  wholes = iter(encode(
      tokenizer, [head + answer for head, group in zip(heads, answers) for answer in group],
      [kind for kind, group in zip(is_text, answers) for _ in group]))
  completions = []
  for ids, group in zip(prompt_ids, answers):
    completions.append(tuple(
        whole[len(ids):] if whole[:len(ids)] == ids else continuation_ids(tokenizer, answer)
        for answer, whole in zip(group, wholes)))
  return prompt_ids, completions


def shared(tokenizer, groups_of_texts, *, end_ids):
  """Encodes texts that begin alike, and splits each group behind the tokens all have in common.

  Args:
    tokenizer: a Hugging Face tokenizer.
    groups_of_texts: P tuples of G texts.
    end_ids: as in `groups`.
  Returns:
    P prompt id lists, empty where nothing is shared, and P tuples of G completion id lists.
  """
  texts = [text for group in groups_of_texts for text in group]
  ids = iter(encode(tokenizer, texts, [True] * len(texts)))
  prompts_ids, completions = [], []
  for group in groups_of_texts:
    wholes = [next(ids) for _ in group]
    length = 0
    for tokens in zip(*wholes):
      if len(set(tokens)) > 1:
        break
      length += 1
    prompts_ids.append(wholes[0][:length])
    completions.append(tuple(end(whole[length:], end_ids, cut=False) for whole in wholes))
  return prompts_ids, completions


def _whole_conversation(tokenizer, question, answer, prompt_text, where):
  if isinstance(answer, str):
    answer = [{'role': 'assistant', 'content': answer}]
  reply = messages(answer)
  if reply is None:
    raise config.UserError(
        f'{where}: a completion is text or a list of messages, not {_describe(answer)}')
  whole = render(tokenizer, messages(question) + reply, where=where)
  if not whole.startswith(prompt_text):
    raise config.UserError(
        f'{where}: the chat template writes the prompt differently once the answer follows, so the '
        'answer\'s tokens cannot be told apart; the prompt should end before the answer\'s turn')
  return whole


def encode(tokenizer, texts, is_text):
  """Encodes texts in one call per kind; a rendered template has its special tokens already.

  Args:
    tokenizer: a Hugging Face tokenizer.
    texts: list of texts.
    is_text: list of bools; False for what a template wrote.
  Returns:
    One id list per text, without the end token that some tokenizers put behind every text.
  """
  ids = [None] * len(texts)
  for kind in (True, False):
    places = [i for i, value in enumerate(is_text) if value is kind]
    if not places:
      continue
    encoded = tokenizer(
        [texts[i] for i in places], add_special_tokens=kind, verbose=False)['input_ids']
    for i, row in zip(places, encoded):
      ids[i] = list(row)
  # Some tokenizers end every text; a prompt, or an answer that is ended below, is not at its end.
  eos = tokenizer.eos_token_id
  for i, row in enumerate(ids):
    if is_text[i] and len(row) > 1 and row[-1] == eos and not texts[i].endswith(
        tokenizer.eos_token):
      ids[i] = row[:-1]
  return ids


def continuation_ids(tokenizer, text):
  """Encodes text that does not begin a document.

  SentencePiece-like tokenizers put a space before the first word, which a continuation must not
  have; a line break in front takes it up.
  """
  return continuations(tokenizer, [text])[0]


def continuations(tokenizer, texts):
  """As `continuation_ids`, of many texts in one call."""
  if not texts:
    return []
  anchor = plain_ids(tokenizer, '\n')
  encoded = tokenizer(['\n' + text for text in texts], add_special_tokens=False, verbose=False)
  return [list(ids[len(anchor):]) if list(ids[:len(anchor)]) == anchor
          else plain_ids(tokenizer, text) for text, ids in zip(texts, encoded['input_ids'])]


def plain_ids(tokenizer, text):
  """Encodes text without any special token around it."""
  return list(tokenizer(text, add_special_tokens=False, verbose=False)['input_ids'])


def end(ids, end_ids, *, cut):
  """Makes a completion end with an end token; `cut` drops what a template writes behind it."""
  if cut:
    for i in reversed(range(len(ids))):
      if ids[i] in end_ids:
        return ids[:i + 1]
  return ids if ids and ids[-1] in end_ids else ids + [end_ids[0]]


def _describe(value):
  text = repr(value)
  return f'{type(value).__name__} {text if len(text) <= 60 else text[:57] + "..."}'
