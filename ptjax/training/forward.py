"""The forward pass of a train step: which model outputs, of which trees."""

from ptjax.models import head
from ptjax.models import lora
from ptjax.models import policy


def make_forward(config, *, outputs=('log_probs', 'entropy'), temperature=1.0, remat='none',
                 lora_scale=None, teacher=None, divergence=None):
  """Returns `forward(params, frozen, batch, slope=None) -> {output: array}` for `step`.

  Args:
    config: TransformerConfig of the model that trains.
    outputs: names of `step.MODEL_OUTPUTS`. Entropy and likeliest come with log-probs anyway.
    temperature: divides the logits.
    remat: what the backward pass recomputes, see `transformer.forward`.
    lora_scale: where `params` are adapters on `frozen['base']`, their scale; else None.
    teacher: TransformerConfig of `frozen['teacher']`, for 'divergence'.
    divergence: `divergence(logits, teacher_logits)` over the last axis, for 'divergence'.
  Returns:
    The function; `batch` is a types.TokenBatch, `slope` as for `head.score`, in its rows' order.
  """
  def forward(params, frozen, batch, slope=None):
    if lora_scale is not None:
      params = lora.join(frozen['base'], params, lora_scale)
    rows = {'prompt_tokens': batch.prompt_tokens, 'prompt_lengths': batch.prompt_lengths,
            'tokens': batch.tokens, 'packing': batch.packing}
    if 'scores' in outputs:
      return {'scores': policy.scores(config, params, **rows, loss_mask=batch.loss_mask,
                                      remat=remat)}
    if 'step_logits' in outputs:
      return {'step_logits': policy.token_scores(config, params, **rows, remat=remat)}
    hidden = policy.hidden(config, params, **rows, remat=remat)
    further = {}
    if 'divergence' in outputs:
      seen = _teacher_rows(rows, batch.inputs)
      further = {'divergence': divergence, 'teacher': (
          teacher, frozen['teacher'], policy.hidden(teacher, frozen['teacher'], **seen))}
    result = head.score(config, params, hidden, batch.tokens, temperature=temperature,
                        with_sum_squares='sum_squares' in outputs, slope=slope, **further)
    if 'values' in outputs:
      result['values'] = policy.values(config, params, hidden, **rows, remat=remat)
    return result
  return forward


def _teacher_rows(rows, inputs):
  """The teacher may be shown other prompts than the student: the answer, say, or feedback."""
  if 'teacher_prompt_tokens' not in inputs:
    return rows
  return {**rows, 'prompt_tokens': inputs['teacher_prompt_tokens'],
          'prompt_lengths': inputs['teacher_prompt_lengths']}
