"""A policy as a model of lm-evaluation-harness, where `lm_eval` is installed.

    from lm_eval import evaluator
    evaluator.simple_evaluate(model=harness.HarnessModel(...), tasks=['arc_easy'])
"""

from ptjax import config

try:
  from lm_eval.api import model
except ImportError as error:
  raise config.UserError('the harness adapter needs lm_eval; install it with '
                         '`python -m pip install lm_eval`') from error


class HarnessModel(model.LM):
  """Answers the harness's three kinds of questions with functions of ours."""

  def __init__(self, log_likelihood, generate, tokenizer, *, max_tokens=256):
    """Takes the functions.

    Args:
      log_likelihood: `f(prompts, completions) -> likelihood.Likelihoods`.
      generate: `f(prompts, *, max_tokens, stop_strings, temperature) -> list of str`;
        temperature 0 takes the likeliest token. What follows a stop string is cut off here.
      tokenizer: a Hugging Face tokenizer, for chat templates.
      max_tokens: per completion, where the task does not say.
    """
    super().__init__()
    self._log_likelihood = log_likelihood
    self._generate = generate
    self._tokenizer = tokenizer
    self._max_tokens = max_tokens

  def loglikelihood(self, requests):
    """Returns (nats, whether greedy decoding would write it) of continuations."""
    contexts, continuations = zip(*(request.args for request in requests))
    found = self._log_likelihood(list(contexts), list(continuations))
    answers = [(float(nats), bool(greedy)) for nats, greedy in zip(found.nats, found.greedy)]
    for request, answer in zip(requests, answers):
      self.cache_hook.add_partial('loglikelihood', request.args, answer)
    return answers

  def loglikelihood_rolling(self, requests):
    """Returns the nats of whole texts, in windows where they are longer than the model."""
    texts = [request.args[0] for request in requests]
    answers = [float(nats) for nats in self._log_likelihood([''] * len(texts), texts).nats]
    for request, answer in zip(requests, answers):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, answer)
    return answers

  def generate_until(self, requests):
    """Returns what the policy writes, without the stop string."""
    answers = [None] * len(requests)
    kinds = {}
    for place, request in enumerate(requests):
      kinds.setdefault(self._kind(request.args[1]), []).append(place)
    for (stops, max_tokens, temperature), places in kinds.items():
      texts = self._generate([requests[place].args[0] for place in places], max_tokens=max_tokens,
                             stop_strings=stops, temperature=temperature)
      for place, text in zip(places, texts):
        ends = [text.find(stop) for stop in stops if stop in text]
        answers[place] = text[:min(ends, default=len(text))]
        self.cache_hook.add_partial('generate_until', requests[place].args, answers[place])
    return answers

  def apply_chat_template(self, chat_history, add_generation_prompt=True):
    """Returns messages as text, without the BOS that encoding puts in front."""
    text = self._tokenizer.apply_chat_template(
        chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt)
    bos = self._tokenizer.bos_token
    if bos and self._tokenizer('')['input_ids'][:1] == [self._tokenizer.bos_token_id]:
      text = text.removeprefix(bos)
    return text

  def chat_template(self, chat_template=False):
    """Returns the template itself, which the harness notes down."""
    return (self._tokenizer.chat_template or '') if chat_template else ''

  @property
  def tokenizer_name(self):
    """What the harness keys its cache of requests by."""
    return self._tokenizer.name_or_path or type(self._tokenizer).__name__

  def _kind(self, options):
    """What requests must share to be answered together: (stop strings, tokens, temperature)."""
    stops = options.get('until') or []
    stops = [stops] if isinstance(stops, str) else stops
    sampled = options.get('do_sample', options.get('temperature', 0.0) > 0)
    temperature = float(options.get('temperature', 1.0)) if sampled else 0.0
    return (tuple(stop for stop in stops if stop),
            int(options.get('max_gen_toks', self._max_tokens)), temperature)
