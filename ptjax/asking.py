"""What evaluations and pair makers ask of a model: likelihoods, scores, samples."""

from absl import logging
import jax
import numpy as np

from ptjax import config as settings
from ptjax import sharding
from ptjax import types
from ptjax.data import prompts as prompt_door
from ptjax.evaluation import likelihood
from ptjax.models import policy as policy_model
from ptjax.rollout import sampler
from ptjax.training import step as training_step


def make_log_likelihood(policy, mesh, *, max_tokens, batch_size=64):
  """Returns `f(params, prompts, completions, *, end=False) -> likelihood.Likelihoods`.

  Args:
    policy: assembly.Policy.
    mesh: where `params` lie.
    max_tokens: of a prompt and its completion, at most; longer texts are cut or scored in windows.
    batch_size: completions computed together.
  """
  def forward(params, batch):
    return policy_model.log_probs(
        policy.config, params, batch.prompt_tokens, batch.prompt_lengths, batch.tokens,
        with_entropy=False)

  return _asks(likelihood.make_log_likelihood, forward, policy, mesh, max_tokens, batch_size)


def make_score(policy, mesh, *, max_tokens, batch_size=64):
  """Returns `f(params, prompts, completions, *, ids=None) -> [N]` of a reward model.

  See likelihood.make_score for `ids`; as above otherwise.
  """
  def forward(params, batch):
    return {'scores': policy_model.scores(
        policy.config, params, batch.prompt_tokens, batch.prompt_lengths, batch.tokens,
        loss_mask=batch.loss_mask)}

  return _asks(likelihood.make_score, forward, policy, mesh, max_tokens, batch_size)


def make_step_scores(policy, mesh, *, max_tokens, batch_size=64):
  """Returns `f(params, prompts, solutions) -> N lists` of a process reward model; as above."""
  def forward(params, batch):
    return {'step_logits': policy_model.token_scores(
        policy.config, params, batch.prompt_tokens, batch.prompt_lengths, batch.tokens)}

  return _asks(likelihood.make_step_scores, forward, policy, mesh, max_tokens, batch_size,
               end_ids=None)  # solutions end with their last step


def sample(policy, params, mesh, rows, options, *, max_prompt_tokens, key, overlong='drop',
           batch_size=16, skip=(), draw=None):
  """Samples completions of each row's prompt.

  A row's samples depend on its number and the key, not on the other rows; so what is skipped
  changes nothing else, and drawing can go on where it was cut off.

  Args:
    policy: assembly.Policy.
    params: its parameters, on the mesh.
    mesh: the mesh.
    rows: `sources.Rows` or a list of dicts with `prompt` or `messages`.
    options: sampler.SamplingOptions; `group_size` samples per row.
    max_prompt_tokens: the longest prompt; empty ones are left out.
    key: PRNG key.
    overlong: what becomes of a longer prompt: `drop`, `truncate` (its left end) or `error`.
    batch_size: prompts decoded together.
    skip: row numbers to leave out.
    draw: sampler.Sampler of policy and options, for who asks more than once; None makes one.
  Yields:
    Per batch, a list of (row number, texts, truncated): `group_size` completions as text that
    continues the prompt's, and whether the length limit ended each.
  """
  tokenizer = policy.tokenizer
  door = prompt_door.PromptDoor(
      rows, tokenizer, num_prompts=1, group_size=options.group_size, seed=None,
      max_prompt_tokens=max_prompt_tokens, overlong=overlong)
  if door.intake.dropped:
    logging.warning('samples: %s', door.intake)
  draw = draw or sampler.make_sampler(policy.config, options, mesh=mesh,
                                      decode_text=tokenizer.decode)
  everything = door.take(range(len(door)))
  wanted = np.array([i for i, row in enumerate(everything.ids) if int(row) not in skip], int)
  size = min(batch_size, len(wanted))
  for start in range(0, len(wanted), max(1, size)):
    real = wanted[start:start + size]
    chosen = np.concatenate([real, np.repeat(real[-1:], size - len(real))])  # one shape for all
    rollouts = sharding.fetch(draw(params, types.Prompts(
        tokens=everything.tokens[chosen], lengths=everything.lengths[chosen],
        ids=everything.ids[chosen], sample_ids=everything.sample_ids[chosen]), key))
    found, count = [], options.group_size
    for place, index in enumerate(real):
      prompt = everything.tokens[index][:everything.lengths[index]].tolist()
      group = range(place * count, (place + 1) * count)
      found.append((int(everything.ids[index]),
                    [_continuation(tokenizer, prompt, rollouts.tokens[i][rollouts.loss_mask[i]])
                     for i in group],
                    [bool(rollouts.truncated[i]) for i in group]))
    yield found


def _continuation(tokenizer, prompt, tokens):
  """Text of a completion as it follows its prompt, the space between them included."""
  decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
  before, whole = decode(prompt), decode([*prompt, *tokens.tolist()])
  return whole[len(before):] if whole.startswith(before) else decode(tokens.tolist())


def _asks(make, forward, policy, mesh, max_tokens, batch_size, **others):
  """Returns `f(params, *texts, **more)`: what `make` of evaluation.likelihood says of texts.

  `others` replace options of `make`; None leaves one out.
  """
  if policy.config.position == 'learned' and max_tokens > policy.config.max_length:
    raise settings.UserError(f'evaluation: texts of up to {max_tokens} tokens, but the model has '
                             f'{policy.config.max_length} positions')
  options = {'end_ids': policy.stop_ids, 'max_tokens': max_tokens, 'batch_size': batch_size,
             'multiple': sharding.batch_size(mesh), **others}
  options = {name: value for name, value in options.items() if value is not None}
  ask = _compiled(forward, mesh)

  def call(params, *texts, **more):
    return make(lambda batch: ask(params, batch), policy.tokenizer, **options)(*texts, **more)
  return call


def _compiled(forward, mesh):
  """Returns `f(params, host batch) -> host outputs`."""
  jitted = jax.jit(forward, out_shardings=sharding.batch(mesh))

  def run(params, batch):
    with sharding.use(mesh):
      return sharding.fetch(jitted(params, training_step.place(batch, mesh)))
  return run
