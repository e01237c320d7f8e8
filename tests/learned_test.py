"""Rewards and verdicts by models: the same numbers as transformers gives, and clear refusals."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ptjax import assembly
from ptjax import config as settings
from ptjax import learned
from ptjax import sharding
from ptjax.data import arithmetic
from ptjax.data import tokenizer as tokenizers
from ptjax.models import hub
from ptjax.models import presets
from ptjax.models import transformer
from ptjax.rewards import combine
from ptjax.rewards import judge as judges

_PROMPTS = ['1+2=', '1+2=', '10+20=', '3+4=']
_COMPLETIONS = ['3', '12', '30', '7+0']
_LINES = ['a\nbb\n\nc', 'x', '', '\nyy\n']
_TEMPLATE = ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
             "{% if add_generation_prompt %}assistant: {% endif %}")


def _export(folder, alphabet, *, template=None, seed=0, **changes):
  """Writes a tiny random model; returns its path."""
  tokenizer = tokenizers.characters(alphabet)
  tokenizer.chat_template = template
  config = presets.get('tiny', **{
      'vocab_size': len(tokenizer), 'width': 32, 'num_layers': 2, 'num_heads': 4,
      'num_kv_heads': 2, 'mlp_width': 64, 'max_length': 128, **changes})
  params = transformer.init(config, jax.random.key(seed))
  if config.num_labels:  # a fresh head is small: make scores that differ
    params['score']['kernel'] = 0.5 * jax.random.normal(
        jax.random.key(seed + 1), params['score']['kernel'].shape)
  hub.export(str(folder), config, params, tokenizer)
  return str(folder)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  base = tmp_path_factory.mktemp('models')
  make = lambda name, alphabet, **changes: _export(base / name, alphabet, **changes)
  return {
      'policy': make('policy', arithmetic.ALPHABET),
      'rewards': make('rewards', arithmetic.ALPHABET, num_labels=1),
      'printable': make('printable', tokenizers.PRINTABLE, num_labels=1, template=_TEMPLATE),
      'steps': make('steps', tokenizers.PRINTABLE, num_labels=2, score_bias=True),
      'writer': make('writer', tokenizers.PRINTABLE, max_length=1024)}


def _setting(folders):
  config = settings.Config(model=folders['policy'])
  return {'config': config, 'policy': assembly.load_policy(config)}


def _ids(tokenizer, texts):
  return [tokenizer(text)['input_ids'] for text in texts]


def _torch_logits(folder, kind, rows):
  """transformers' logits of each row of ids, one by one: [S, labels] or [labels]."""
  transformers, torch = pytest.importorskip('transformers'), pytest.importorskip('torch')
  model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
  with torch.no_grad():
    return [model(input_ids=torch.tensor([row])).logits[0].double().numpy() for row in rows]


@pytest.mark.parametrize('given, devices', [('ids', 8), ('texts', 1)])
def test_a_reward_models_scores_are_those_of_transformers(folders, given, devices):
  mesh = sharding.make_mesh('', jax.devices()[:devices])
  setting = _setting(folders)
  reward = learned.load_reward('model', folders['rewards'], {}, mesh=mesh, **setting)
  tokenizer = setting['policy'].tokenizer
  prompt_ids = _ids(tokenizer, _PROMPTS)
  own = [ids[1:] for ids in _ids(tokenizer, _COMPLETIONS)]  # without the beginning-of-text token
  end = tokenizer.eos_token_id
  expected = _torch_logits(folders['rewards'], 'AutoModelForSequenceClassification', [
      before + after + [end] for before, after in zip(prompt_ids, own)])
  # The second and third were cut off: no end token of their own.
  sampled = [ids + [end] * (i not in (1, 2)) for i, ids in enumerate(own)]
  ids = {'prompt_ids': prompt_ids, 'completion_ids': sampled} if given == 'ids' else {}
  found = reward(_PROMPTS, _COMPLETIONS, **ids)
  # float32, two orders of sums
  np.testing.assert_allclose(found, np.concatenate(expected), atol=2e-5)


def test_ids_are_reused_where_the_tokenizer_is_the_same(folders):
  mesh = sharding.make_mesh('', jax.devices()[:1])
  same = learned.load_reward('model', folders['rewards'], {}, mesh=mesh, **_setting(folders))
  other = learned.load_reward('model', folders['printable'], {}, mesh=mesh, **_setting(folders))
  lies = {'prompt_ids': [[1, 5]], 'completion_ids': [[6, 2]]}  # ids of another text
  assert same(['1+1='], ['2'], **lies) != same(['1+1='], ['2'])
  assert other(['1+1='], ['2'], **lies) == other(['1+1='], ['2'])


def test_another_template_reads_the_messages_themselves(folders):
  mesh = sharding.make_mesh('', jax.devices()[:1])
  reward = learned.load_reward('model', folders['printable'], {}, mesh=mesh, **_setting(folders))
  messages = [{'role': 'user', 'content': 'hello'}]
  tokenizer = hub.load_tokenizer(folders['printable'])
  text = 'user: hello\nassistant: hi\n'  # its own template writes this
  row = tokenizer(text, add_special_tokens=False)['input_ids'] + [tokenizer.eos_token_id]
  expected, = _torch_logits(folders['printable'], 'AutoModelForSequenceClassification', [row])
  found = reward(['<other template>hello'], ['hi'], raw_prompts=[messages], prompt_ids=[[1]],
                 completion_ids=[[2]])
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_model_rewards_join_others_by_weight(folders):
  mesh = sharding.make_mesh('', jax.devices()[:1])
  load = functools.partial(learned.load_reward, mesh=mesh, **_setting(folders))
  with combine.load([f'model:{folders["rewards"]}*0.5', 'length(target=2)'], learned=load) as both:
    table = both.score(_PROMPTS, _COMPLETIONS)
  assert table.names == ('model', 'length')
  np.testing.assert_allclose(table.total, table.values @ [0.5, 1.0])
  assert len(set(table.values[:, 0])) == 4


@pytest.mark.parametrize('steps, aggregate', [
    ('min', np.min), ('product', np.prod), ('last', lambda x: x[-1])])
def test_step_rewards_stand_where_steps_end(folders, steps, aggregate):
  mesh = sharding.make_mesh('', jax.devices()[:1])
  config = settings.Config(model=folders['writer'])
  policy = assembly.load_policy(config)
  reward = learned.load_reward('process', folders['steps'], {'steps': steps}, mesh=mesh,
                               config=config, policy=policy)
  tokenizer, end = policy.tokenizer, policy.tokenizer.eos_token_id
  own = [ids[1:] + [end] for ids in _ids(tokenizer, _LINES)]
  found = reward(['q'] * 4, _LINES, completion_ids=own)
  before, = _ids(tokenizer, ['q'])
  line = tokenizer('\n', add_special_tokens=False)['input_ids']

  def probabilities(solution):  # each step with the separator behind it, judged at that
    ids, ends = list(before), []
    for step in solution:
      ids += tokenizer(step, add_special_tokens=False)['input_ids'] + line
      ends.append(len(ids) - 1)
    logits, = _torch_logits(folders['steps'], 'AutoModelForTokenClassification', [ids])
    return 1 / (1 + np.exp(logits[ends, 0] - logits[ends, 1]))
  expected = [probabilities(s) for s in (['a', 'bb', 'c'], ['x'], ['yy'])]
  np.testing.assert_allclose(
      [found[0], found[1], found[3]], [aggregate(p) for p in expected], atol=1e-5)
  assert found[2] == 0.0  # nothing was written
  placed = reward.take_steps()
  # 'a\nbb\n\nc<end>': the breaks are tokens 1, 4 and 5; the last step ends with the completion.
  assert [[place for place, _ in row] for row in placed] == [[1, 4, 7], [1], [0], [3]]
  np.testing.assert_allclose([r for _, r in placed[0]], expected[0], atol=1e-5)
  assert placed[2] == [(0, 0.0)] and reward.take_steps() == []


@pytest.mark.slow
def test_a_reward_model_and_a_pair_judge_compare(folders):
  mesh = sharding.make_mesh('', jax.devices()[:1])
  setting = _setting(folders)
  end = setting['policy'].tokenizer.eos_token_id
  prompts, first, second = ['1+2=', '3+4='], ['3', '9'], ['12', '7']
  before = _ids(setting['policy'].tokenizer, prompts)
  a, b = ([ids[1:] + [end] for ids in _ids(setting['policy'].tokenizer, side)]
          for side in (first, second))
  logits = lambda rows: np.concatenate(_torch_logits(
      folders['rewards'], 'AutoModelForSequenceClassification', rows))
  sigmoid = lambda x: 1 / (1 + np.exp(-x))

  judge = learned.load_judge(folders['rewards'], mesh=mesh, **setting)
  gap = logits([p + x for p, x in zip(before, a)]) - logits([p + x for p, x in zip(before, b)])
  np.testing.assert_allclose(judge.compare(prompts, first, second), sigmoid(gap), atol=1e-5)

  pairs = learned.load_judge(folders['rewards'] + '(pairs=True)', mesh=mesh, **setting)
  chances = 0.5 * (sigmoid(logits([p + x + y for p, x, y in zip(before, a, b)])) + 1
                   - sigmoid(logits([p + y + x for p, x, y in zip(before, a, b)])))
  np.testing.assert_allclose(pairs.compare(prompts, first, second), chances, atol=1e-5)
  np.testing.assert_allclose(pairs.compare(prompts, second, first), 1 - chances, atol=1e-5)
  assert judge.collective and pairs.collective


@pytest.mark.slow
def test_a_local_model_is_asked_through_the_sampler(folders, tmp_path):
  mesh = sharding.make_mesh('', jax.devices()[:2])
  spec = f'{folders["writer"]}(max_tokens=4, cache="{tmp_path}")'
  judge = learned.load_judge(spec, mesh=mesh, **_setting(folders))
  assert judge.collective
  replies = judge.ask([[{'role': 'user', 'content': text}] for text in ('one', 'two', 'x' * 2000)])
  assert all(isinstance(reply, str) for reply in replies[:2])
  assert replies[2] is None  # more than the model can read
  chances = judge.compare(['p'], ['a'], ['b'])  # random weights say nothing
  assert np.isnan(chances).all() and judge.take_report() == {'asked': 2, 'unreadable': 2}
  told = dataclasses.replace(judge, ask=lambda conversations: ['[[A]]'] * len(conversations))
  np.testing.assert_array_equal(told.compare(['p'], ['a'], ['b']), [0.5])
  assert len(list(tmp_path.iterdir())) == 1  # the verdicts' file


def test_an_endpoint_is_named_with_its_model(folders):
  setting = _setting(folders)
  spec = "http://localhost:1/v1(model='m', retries=0, rubric='brevity', cache=None)"
  judge = learned.load_judge(spec, mesh=None, **setting)
  assert judge.ask.model == 'm' and judge.ask.retries == 0 and judge.rubric == 'brevity'
  assert not judge.collective and judge.cache is None
  reward = combine.load([f'judge:{spec}*2'], learned=functools.partial(
      learned.load_reward, mesh=None, **setting)).components[0]
  assert isinstance(reward.function, judges.JudgeReward) and reward.weight == 2.0
  assert not reward.function.collective


@pytest.mark.parametrize('spec, message', [
    ('model:{policy}', 'expected a reward model .one label., found a language model; train one '
                       'with --algo=reward_bt'),
    ('model:{steps}', 'found a process reward model .two labels.; .*process:DIR'),
    ('process:{rewards}', 'expected a process reward model .* found a reward model'),
    ('process:{steps}(steps="mean")', "steps='mean': expected one of min, product, last"),
    ('process:{steps}(step="min")', "no option 'step'; did you mean steps"),
    ('model:{rewards}(x=1)', "no option 'x'; it has none"),
    ('model:no/such/folder', 'reward=model:no/such/folder: .*no/such/folder does not exist'),
    ('model:{run}', "a run's folder; its model is .*/model"),
    ('judge:{rewards}', 'expected a language model, found a reward model'),
    ('judge:http://localhost:1/v1', r"say which model .*v1\(model='name'\)"),
    ('judge:http://localhost:1/v1(model="m", retry=3)', "no option 'retry'; did you mean retries"),
    ('judge:{writer}(max_tokens=5000)', 'max_tokens=5000: expected 1 to 1023'),
])
def test_refusals(folders, tmp_path, spec, message):
  (tmp_path / 'model').mkdir()
  load = functools.partial(learned.load_reward, mesh=None, **_setting(folders))
  with pytest.raises(settings.UserError, match=message) as caught:
    combine.load([spec.format(run=tmp_path, **folders)], learned=load)
  assert '\n' not in str(caught.value)


def test_models_give_rewards_only_where_they_can_be_placed():
  with pytest.raises(settings.UserError, match='in training alone'):
    combine.load(['model:anything'])
