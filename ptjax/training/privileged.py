"""Prompts for a teacher that is shown more than the policy: the answer, say, or a success."""

from ptjax import config as settings
from ptjax.data import batching
from ptjax.data import chat
from ptjax.data import tokenizer as tokenizers


def teacher_prompts(tokenizer, prompts, texts, *, template, max_tokens):
  """Encodes what the teacher reads in the place of each prompt.

  Args:
    tokenizer: a Hugging Face tokenizer.
    prompts: P texts or message lists; in a list the last turn is the one that is rewritten.
    texts: P texts, None where the teacher is shown nothing but the prompt.
    template: text with `{prompt}` and `{privileged}`.
    max_tokens: that there is room for.
  Returns:
    Dict of `teacher_prompt_tokens` [P, S] int32 and `teacher_prompt_lengths` [P] int32.
  Raises:
    UserError: a prompt for which there is no room.
  """
  values = [prompt if text is None else _with(template, prompt, text)
            for prompt, text in zip(prompts, texts)]
  where = lambda i: f'the teacher\'s prompt {i} of the rollout'
  _, ids = chat.prompts(tokenizer, values, where=where)
  longest = max(map(len, ids))
  if longest > max_tokens:
    raise settings.UserError(
        f'a prompt with what the teacher is shown has {longest} tokens, but there is room for '
        f'{max_tokens} before the completion; lower data.max_prompt_tokens or '
        'rollout.max_completion_tokens')
  tokens, lengths = batching.pad_right(
      ids, batching.bucket(longest, max_tokens), tokenizers.pad_id(tokenizer))
  return {'teacher_prompt_tokens': tokens, 'teacher_prompt_lengths': lengths}


def _with(template, prompt, text):
  conversation = chat.messages(prompt)
  if conversation is None:
    return _filled(template, prompt, text)
  last = conversation[-1]
  return [*conversation[:-1], {**last, 'content': _filled(template, last['content'], text)}]


def _filled(template, prompt, text):
  """Not str.format, as prompts may hold braces."""
  return prompt.join(part.replace('{privileged}', text) for part in template.split('{prompt}'))
