"""What a model is asked: the same answers on one device and on several, and text that continues."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax import asking
from ptjax import assembly
from ptjax import config as settings
from ptjax import keys
from ptjax import sharding
from ptjax.data import chat
from ptjax.models import policy as policy_model
from ptjax.models import transformer
from ptjax.rollout import sampler

PROMPTS = ['Once upon a time', 'Once upon a time', 'One day, a little dog', '']
ANSWERS = [' there was a cat.', ', there', ' went home', 'The end.']


def mesh_of(text):
  sizes = sharding.parse_mesh(text, 4 if '2' in text else 1)
  return sharding.make_mesh(text, jax.devices()[:int(np.prod(list(sizes.values())))])


def placed(policy, mesh):
  return policy.load(functools.partial(sharding.tree_sharding, mesh))


@pytest.fixture(scope='module')
def stories(shared_data):
  return assembly.load_policy(settings.Config(model=str(shared_data / 'models' / 'stories260K')))


@pytest.fixture(scope='module')
def one(stories):
  mesh = mesh_of('data=1,fsdp=1,tensor=1')
  return mesh, placed(stories, mesh)


def test_likelihoods_are_the_same_on_several_devices(stories, one):
  several = mesh_of('data=2,fsdp=2,tensor=1')
  found = [asking.make_log_likelihood(stories, mesh, max_tokens=64)(params, PROMPTS, ANSWERS)
           for mesh, params in (one, (several, placed(stories, several)))]
  np.testing.assert_allclose(found[1].nats, found[0].nats, atol=1e-4)  # 10 tokens, float32
  np.testing.assert_array_equal(found[1].tokens, found[0].tokens)
  _, prompts, completions = chat.groups(
      stories.tokenizer, PROMPTS[:1], [(ANSWERS[0],)], end_ids=stories.stop_ids,
      where=lambda place: '')
  direct = policy_model.log_probs(
      stories.config, one[1], jnp.array(prompts), jnp.array([len(prompts[0])]),
      jnp.array([completions[0][0][:-1]]))['log_probs']  # without the end token
  assert found[0].nats[0] == pytest.approx(float(direct.sum()), abs=1e-4)
  assert found[0].tokens[0] == direct.shape[1]


def test_a_reward_model_scores_whole_texts(stories, one):
  mesh, params = one
  config = dataclasses.replace(stories.config, num_labels=1)
  params = {**params, 'score': {'kernel': jax.random.normal(jax.random.key(1), (config.width, 1))}}
  policy = dataclasses.replace(stories, config=config)
  found = asking.make_score(policy, mesh, max_tokens=64)(params, PROMPTS, ANSWERS)
  for prompt, answer, score in zip(PROMPTS, ANSWERS, found):
    ids = stories.tokenizer(prompt + answer)['input_ids'] + [stories.stop_ids[0]]
    # The state of the end token, of the text run alone as one row.
    states = policy_model.token_hidden(
        config, params, jnp.array([ids[:1]]), jnp.array([1]), jnp.array([ids[1:]]))
    expected = transformer.head_scores(config, params['score'], states)[0, -1, 0]
    assert score == pytest.approx(float(expected), abs=1e-4)


def test_samples_continue_the_text(stories, one):
  mesh, params = one
  options = sampler.SamplingOptions(max_tokens=6, group_size=2, temperature=0.0,
                                    stop_ids=stories.stop_ids)
  rows = [{'prompt': text} for text in ('Lily and Ben went to the', '', 'Once upon a time')]
  found = [entry for batch in asking.sample(
      stories, params, mesh, rows, options, max_prompt_tokens=32, batch_size=1,
      key=keys.stream(0, 'samples')) for entry in batch]
  assert [row for row, _, _ in found] == [0, 2]  # an empty prompt has no continuation
  assert found[0][1][0].startswith(' park.') and found[1][1][0].startswith(', there was')
  assert found[0][1][0] == found[0][1][1] and found[0][2] == [True, True]  # greedy, and cut


def test_texts_beyond_a_learned_position_table(stories, one):
  config = dataclasses.replace(stories.config, position='learned')
  with pytest.raises(settings.UserError, match='up to 600 tokens, but the model has 512 positions'):
    asking.make_log_likelihood(dataclasses.replace(stories, config=config), one[0], max_tokens=600)
