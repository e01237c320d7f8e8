"""Stop strings: where in a completion its text first contains one, found on the host.

A string may span tokens and end in the middle of one, so only the tokenizer can tell.
"""

import numpy as np

_CHECK_EVERY = 8  # tokens of a completion between two looks at its text


class StopStrings:
  """Follows the completions of one rollout and finds where to cut them.

  A completion is cut after the first token whose decoded prefix contains a stop string. Its text
  is looked at after fixed numbers of its tokens and when it ends, never when a chunk happens to
  end, so the cut does not depend on the chunks it came in. (A prefix that contains a stop string
  only for a moment, because decoding a later token changes its end, may be passed over.)

  Attributes:
    cuts: [B] int32; tokens of each completion that stay, `max_tokens + 1` where there is no cut.
  """

  def __init__(self, strings, decode_text, rows, max_tokens):
    """Starts with empty completions.

    Args:
      strings: the stop strings.
      decode_text: `(list of token ids) -> str`.
      rows: B.
      max_tokens: T.
    """
    self.cuts = np.full(rows, max_tokens + 1, np.int32)
    self._strings = strings
    self._decode_text = decode_text
    self._ids = [[] for _ in range(rows)]
    self._clean = [0] * rows  # tokens whose text is known to hold no stop string
    self._uncut = max_tokens + 1

  def feed(self, rows, tokens, lengths, done):
    """Takes the newest tokens and updates `cuts`.

    Args:
      rows: [n] int; the completions that may have grown.
      tokens: [n, K] int; their newest tokens; one that ended uses the first ones.
      lengths: [B] int; tokens of each completion so far, the newest included.
      done: [B] bool; True where no more will come.
    """
    for row, newest in zip(rows, tokens):
      ids = self._ids[row]
      if self.cuts[row] != self._uncut:
        continue
      fresh = newest[:lengths[row] - len(ids)].tolist()
      before = len(ids)
      ids.extend(fresh)
      looks = [n for n in range(before + 1, len(ids) + 1) if n % _CHECK_EVERY == 0]
      if done[row] and fresh and (not looks or looks[-1] < len(ids)):
        looks.append(len(ids))
      for look in looks:
        if self._found(ids[:look]):
          self.cuts[row] = next(n for n in range(self._clean[row] + 1, look + 1)
                                if self._found(ids[:n]))
          break
        self._clean[row] = look

  def _found(self, ids):
    text = self._decode_text(ids)
    return any(string in text for string in self._strings)
