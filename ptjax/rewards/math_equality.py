"""Whether two maths answers are equal, by math-verify. Runs in the pool's workers, never in the
trainer: a comparison may take for ever.

math-verify's own time-outs, which need `signal.alarm` in the main thread and answer "not equal"
when they fire, are off; the pool's deadline replaces them.
"""

import logging

import math_verify

logging.getLogger('math_verify').setLevel(logging.CRITICAL)  # it warns that its time-outs are off

# Both sides come extracted, so the box that wraps them is the first thing to read.
_EXTRACTION = (math_verify.LatexExtractionConfig(boxed_match_priority=0),)


def equal(gold, answer):
  """Returns True or False, or None where `gold` does not parse as a maths expression.

  Args:
    gold, answer: LaTeX or plain text, without the `\\boxed{}`.
  Raises:
    Exception: whatever math-verify or sympy raise on an expression they cannot handle.
  """
  gold_values, answer_values = _parse(gold), _parse(answer)
  if not gold_values:
    return None
  return bool(math_verify.verify(
      gold_values, answer_values, timeout_seconds=None, raise_on_error=True))


def _parse(text):
  return math_verify.parse(
      f'\\boxed{{{text}}}', extraction_config=_EXTRACTION, parsing_timeout=None,
      raise_on_error=True)


equal('\\frac{1}{2}', '0.5')  # builds parsers and caches now, not on the first item's deadline
