"""An OpenAI-compatible endpoint: chat completions over HTTP, with time limits and retries."""

import concurrent.futures
import dataclasses
import http.client
import json
import logging
import os
import random
import time
from typing import Callable
import urllib.error
import urllib.request

from ptjax import config
from ptjax.rewards import calling

_LOGGER = logging.getLogger(__name__)
_MAX_REPLY_BYTES = 2**23
_MAX_WAIT_SECONDS = 60.0
_REFUSED = (401, 403, 404)  # the key, or what is asked for: no question will fare better
_PASSING = (408, 409, 425, 429)  # of the other 4xx, those that may be otherwise next time


class EndpointError(calling.Unusable, config.UserError):
  """A server that refuses all questions, or answers none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
  """Asks a server; a callable `conversations -> replies`, for `judge.Judge`.

  Attributes:
    url: of the API, e.g. http://localhost:8000/v1; `/chat/completions` is added.
    model: the model's name there.
    temperature: of its sampling.
    max_tokens: of a reply.
    timeout_seconds: per attempt, from the first byte sent to the last received.
    retries: attempts after the first one.
    backoff_seconds: before the first retry; doubles with each, up to a minute, less up to half of
      it at random. A server's Retry-After is obeyed up to that minute.
    workers: requests at the same time.
    api_key_variable: environment variable of the key, sent where it is set.
    sleep: for tests.
  """
  url: str
  model: str
  temperature: float = 0.0
  max_tokens: int = 1024
  timeout_seconds: float = 60.0
  retries: int = 5
  backoff_seconds: float = 1.0
  workers: int = 8
  api_key_variable: str = 'OPENAI_API_KEY'
  sleep: Callable = time.sleep

  def __post_init__(self):
    for name in ('max_tokens', 'timeout_seconds', 'workers'):
      if not getattr(self, name) > 0:
        raise config.UserError(f'judge {self.url}: {name}={getattr(self, name)!r}: expected a '
                               'positive number')
    if self.retries < 0 or self.backoff_seconds < 0 or self.temperature < 0:
      raise config.UserError(f'judge {self.url}: retries, backoff_seconds and temperature are not '
                             'negative')

  @property
  def identity(self):
    """What replies depend on beside the question."""
    return json.dumps(['endpoint', self.url.rstrip('/'), self.model, self.temperature,
                       self.max_tokens])

  def __call__(self, conversations):
    """Returns a reply per conversation, None where all attempts failed.

    Raises:
      EndpointError: the server refuses key or model, or no conversation got a reply.
    """
    if not conversations:
      return []
    with concurrent.futures.ThreadPoolExecutor(min(self.workers, len(conversations))) as pool:
      futures = [pool.submit(self._ask, messages) for messages in conversations]
      try:
        answers = [future.result() for future in futures]
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    failures = [problem for _, problem in answers if problem is not None]
    if len(failures) == len(answers):
      raise EndpointError(
          f'judge {self.url} answered none of {len(answers)} questions: {failures[0]}')
    if failures:
      _LOGGER.warning('%s left %d of %d questions without an answer: %s', self.url, len(failures),
                      len(answers), failures[0])
    return [reply for reply, _ in answers]

  def _ask(self, messages):
    """Returns (reply, None), or (None, the last problem) after all attempts."""
    jitter = random.Random(json.dumps(messages))
    wait = None
    for attempt in range(self.retries + 1):
      if attempt:
        usual = min(self.backoff_seconds * 2.0**(attempt - 1), _MAX_WAIT_SECONDS)
        self.sleep(usual * (0.5 + 0.5 * jitter.random()) if wait is None else wait)
      try:
        return self._attempt(messages), None
      except urllib.error.HTTPError as error:
        problem = f'HTTP {error.code} {error.reason}: {_begin(error)}'
        if error.code in _REFUSED:
          raise EndpointError(
              f'judge {self.url} refuses model {self.model!r}: {problem}') from None
        if 400 <= error.code < 500 and error.code not in _PASSING:
          return None, problem
        wait = _retry_after(error)
      # What a bad line, a bad server or a bad proxy gives.
      except (OSError, http.client.HTTPException, ValueError, _Garbage) as error:
        problem, wait = f'{type(error).__name__}: {error}', None
    return None, f'{problem} (after {self.retries + 1} attempts)'

  def _attempt(self, messages):
    body = {'model': self.model, 'messages': messages, 'temperature': self.temperature,
            'max_tokens': self.max_tokens}
    headers = {'Content-Type': 'application/json'}
    key = os.environ.get(self.api_key_variable)
    if key:
      headers['Authorization'] = f'Bearer {key}'
    request = urllib.request.Request(self.url.rstrip('/') + '/chat/completions', headers=headers,
                                     data=json.dumps(body).encode())
    deadline = time.monotonic() + self.timeout_seconds
    with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
      received = bytearray()
      while part := response.read1(2**16):
        received += part
        if time.monotonic() > deadline:  # each read has a limit, but a server may drip for ever
          raise TimeoutError(f'no whole reply within {self.timeout_seconds:g} s')
        if len(received) > _MAX_REPLY_BYTES:
          raise _Garbage(f'a reply of more than {_MAX_REPLY_BYTES} bytes')
    try:
      content = json.loads(bytes(received))['choices'][0]['message']['content']
    except (ValueError, LookupError, TypeError):
      raise _Garbage(f'a reply without choices[0].message.content: '
                     f'{calling.shorten(bytes(received))}') from None
    if not isinstance(content, str):
      raise _Garbage(f'a reply whose content is no text: {calling.shorten(content)}')
    return content


class _Garbage(Exception):
  """A reply that is none."""


def _begin(error):
  try:
    return calling.shorten(error.read(2000).decode(errors='replace'))
  except (OSError, http.client.HTTPException):
    return ''


def _retry_after(error):
  """Seconds that a server asks to wait, or None; a date is not obeyed."""
  try:
    return min(max(float(error.headers.get('Retry-After', '')), 0.0), _MAX_WAIT_SECONDS)
  except ValueError:
    return None
