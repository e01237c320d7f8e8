"""Models in Hugging Face's format: load from a directory or hub name, export to a directory.

A directory that holds a PEFT adapter stands for its base model with the adapter merged into it.
Only safetensors are read, never a pickle, and code that comes with a model is never run.
"""

import dataclasses
import functools
import os

import huggingface_hub
import jax

from ptjax import config as settings
from ptjax import sharding
from ptjax.models import folders
from ptjax.models import hf_config
from ptjax.models import hf_weights
from ptjax.models import lora
from ptjax.models import peft
from ptjax.models import transformer

MAX_FILE_BYTES = 5 * 10**9

_TOKENIZER_FILES = (
    'tokenizer.json', 'tokenizer.model', 'vocab.json', 'vocab.txt', 'tokenizer_config.json')
_SMALL_FILES = ('*.json', '*.jinja', '*.txt', 'tokenizer.model')


def load(path_or_name, *, dtype=None, param_dtype=None, num_labels=None, score_bias=False,
         shardings=None, key=None):
  """Loads a model, or the body of a language model under a fresh score head.

  Args:
    path_or_name: a directory, or a name on the Hugging Face hub.
    dtype: str; the compute dtype, default the checkpoint's.
    param_dtype: str; what the parameters are cast to, default the checkpoint's.
    num_labels: outputs of the score head; None: a language model stays one, and a reward model or
      classifier keeps its own.
    score_bias: whether a fresh head has a bias, as token classifiers (process reward models) have.
    shardings: where each parameter goes: a tree of `jax.sharding.Sharding` like the parameters, or
      a function from their tree of shapes to it. None: the default device.
    key: PRNG key of a fresh head; None: `jax.random.key(0)`.
  Returns:
    (TransformerConfig, params, tokenizer).
  Raises:
    UserError: what is wrong with the directory or the name, and the remedy.
  """
  directory = resolve(path_or_name)
  config = load_config(directory, dtype=dtype, param_dtype=param_dtype, num_labels=num_labels,
                       score_bias=score_bias)
  tokenizer = load_tokenizer(directory)
  return config, load_params(directory, config, shardings=shardings, key=key), tokenizer


def load_config(path_or_name, *, dtype=None, param_dtype=None, num_labels=None, score_bias=False):
  """Reads a model's `TransformerConfig`; the arguments are those of `load`.

  Raises:
    UserError: besides what `load` says, a score head with another number of labels.
  """
  directory = resolve(path_or_name, weights=False)
  given = {'dtype': dtype, 'param_dtype': param_dtype}
  if peft.is_adapter(directory):
    return _of_base(load_config, directory, **given, num_labels=num_labels, score_bias=score_bias)
  path = os.path.join(directory, 'config.json')
  raw = folders.read_json(path)
  try:
    config = hf_config.from_hf(raw)
    if num_labels and not config.num_labels:
      config = dataclasses.replace(config, num_labels=num_labels, score_bias=score_bias)
    elif num_labels not in (None, config.num_labels):
      raise settings.UserError(f'the score head has {config.num_labels} labels, not {num_labels}; '
                               'choose another model, or the language model it was made from')
    return dataclasses.replace(config, **{k: str(v) for k, v in given.items() if v is not None})
  except settings.UserError as error:
    raise settings.UserError(f'{path}: {error}') from None


def load_params(path_or_name, config, *, shardings=None, key=None):
  """Loads the parameters of `config` (see `load`); they are cast to `config.param_dtype`."""
  directory = resolve(path_or_name)
  shapes = param_shapes(config)
  targets = shardings(shapes) if callable(shardings) else shardings
  if peft.is_adapter(directory):
    adapters, made_with = peft.load(directory, config)
    base = _of_base(load_params, directory, config, shardings=targets, key=key)
    merge = functools.partial(lora.merge, scale=made_with.scale)
    return jax.jit(merge, out_shardings=targets, donate_argnums=0)(base, adapters)
  fresh = {}
  if config.num_labels and not load_config(directory).num_labels:
    fresh = {'score': transformer.init_score(config, jax.random.key(0) if key is None else key)}
    if targets is not None:
      fresh = sharding.put(fresh, {'score': targets['score']})
  stored = {name: tree for name, tree in shapes.items() if name not in fresh}
  sources, paths = hf_weights.layout(config, stored), hf_weights.paths(stored)
  targets = dict.fromkeys(paths) if targets is None else hf_weights.paths(targets)
  with hf_weights.Checkpoint(directory) as checkpoint:
    hf_weights.check(checkpoint, config, stored, directory)
    leaves = [
        hf_weights.load_leaf(checkpoint, sources[path], leaf, targets[path])
        for path, leaf in paths.items()]
  return {**jax.tree.unflatten(jax.tree.structure(stored), leaves), **fresh}


def param_shapes(config):
  """The parameter tree of `config` as `jax.ShapeDtypeStruct`s."""
  return jax.tree.map(lambda leaf: leaf, _param_shapes(config))  # dicts of the caller's own


@functools.lru_cache(maxsize=8)  # a run asks four times
def _param_shapes(config):
  return jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))


def load_tokenizer(path_or_name):
  """Loads the tokenizer (a `transformers` tokenizer) of a model."""
  directory = resolve(path_or_name, weights=False)
  if not any(os.path.exists(os.path.join(directory, f)) for f in _TOKENIZER_FILES):
    if peft.is_adapter(directory):
      return _of_base(load_tokenizer, directory)
    raise settings.UserError(
        f'{directory} has no tokenizer: expected {" or ".join(_TOKENIZER_FILES[:3])}; copy the '
        'tokenizer files of the base model there')
  import transformers  # takes over a second, which planning a preset need not wait for
  made_of_file = _declared_tokenizer(directory) in ('TokenizersBackend', 'PreTrainedTokenizerFast')
  # For some model types AutoTokenizer takes the family's class whatever the folder declares, which
  # reads another tokenizer's vocabulary by its own rules (Qwen2's drops our spaces).
  kind = transformers.PreTrainedTokenizerFast if made_of_file else transformers.AutoTokenizer
  try:
    return kind.from_pretrained(directory)
  except Exception as error:  # transformers raises many kinds; all mean unusable files
    raise settings.UserError(
        f'the tokenizer in {directory} cannot be loaded: {_first_line(error)}') from error


def _declared_tokenizer(directory):
  """The class that tokenizer_config.json names where tokenizer.json says it all; else None."""
  path = os.path.join(directory, 'tokenizer_config.json')
  if not os.path.exists(path) or not os.path.exists(os.path.join(directory, 'tokenizer.json')):
    return None
  return folders.read_json(path).get('tokenizer_class')


def load_stop_ids(path_or_name, tokenizer):
  """The token ids that end a completion: the tokenizer's, config.json's, generation_config.json's.

  Returns:
    Sorted tuple of ints. Published models often name a second one only in the generation config.
  """
  directory = resolve(path_or_name, weights=False)
  if peft.is_adapter(directory):
    return _of_base(load_stop_ids, directory, tokenizer)
  ids = {tokenizer.eos_token_id}
  for filename in ('config.json', 'generation_config.json'):
    path = os.path.join(directory, filename)
    if os.path.exists(path):
      found = folders.read_json(path).get('eos_token_id')
      ids.update(found if isinstance(found, list) else [found])
  return tuple(sorted(ids - {None}))


def resolve(path_or_name, *, weights=True):
  """Returns the local directory of a model, fetching it from the hub where it is a hub name.

  Args:
    path_or_name: a directory, or a hub name such as `Qwen/Qwen2.5-0.5B`.
    weights: whether the weights are needed too.
  Raises:
    UserError: neither a directory with a model or an adapter nor a name that the hub gives.
  """
  path = os.path.expanduser(os.fspath(path_or_name))
  if not os.path.exists(path):
    path = _fetch(os.fspath(path_or_name), weights)
  if not os.path.isdir(path):
    raise settings.UserError(
        f'{path} is a file; a model is a directory with config.json and safetensors weights')
  if not os.path.exists(os.path.join(path, 'config.json')) and not peft.is_adapter(path):
    raise settings.UserError(
        f'{path} is not a model directory: it has no config.json'
        + ('' if os.listdir(path) else ' (it is empty)'))
  return path


def _of_base(function, directory, *args, **kwargs):
  """Calls `function` with the base of an adapter; what is wrong with it names the adapter too."""
  base = peft.base_of(directory)
  try:
    return function(base, *args, **kwargs)
  except settings.UserError as error:
    raise settings.UserError(f'the base model of the adapter in {directory}: {error}') from None


def _fetch(name, weights):
  if os.path.isabs(name) or name.startswith(('.', '~')) or name.count('/') > 1:
    raise settings.UserError(f'model directory {name} does not exist')
  try:
    return huggingface_hub.snapshot_download(
        name, allow_patterns=[*_SMALL_FILES, *(['*.safetensors'] if weights else [])],
        # Folders hold other formats, and consolidated files repeat all weights.
        ignore_patterns=['*/*', 'consolidated*'])
  except Exception as error:  # offline, no such repository, gated, malformed name, full disk
    raise settings.UserError(
        f'there is no directory {name}, and fetching it from the Hugging Face hub failed '
        f'({type(error).__name__}: {_first_line(error)}); give a local model directory, or check '
        'the name, the network, HF_HUB_OFFLINE and, for gated models, the login') from error


def export(out_dir, config, params, tokenizer, *, stop_ids=None, max_file_bytes=MAX_FILE_BYTES):
  """Writes a model directory that opens in `transformers`.

  It appears whole or not at all: it is written beside and then renamed. With several processes,
  each calls it and process 0 writes.

  Args:
    out_dir: the directory; an earlier model in it is replaced.
    config: TransformerConfig.
    params: the parameter tree, leaves on the host or on devices, sharded or not. What is not the
      model's own, such as a critic, is left out.
    tokenizer: a `transformers` tokenizer, or None to write none.
    stop_ids: token ids that end a completion, for generation_config.json; default the
      tokenizer's end token.
    max_file_bytes: above this the weights are split over several files with an index.
  Raises:
    UserError: `out_dir` holds something that is not a model, or its family cannot express
      `config`.
  """
  ids = {'bos_id': None, 'eos_id': None, 'pad_id': None}
  if tokenizer is not None:
    ids = {'bos_id': tokenizer.bos_token_id, 'eos_id': tokenizer.eos_token_id,
           'pad_id': tokenizer.pad_token_id}
  if config.num_labels and ids['pad_id'] == ids['eos_id']:
    # transformers reads a score at the last token that is no padding: with the end token as padding
    # it would silently read one too early. Without any it refuses padded rows.
    ids['pad_id'] = None
  raw = hf_config.to_hf(config, dtype=str(params['embed']['embedding'].dtype), **ids)
  stop_ids = list(stop_ids) if stop_ids else ids['eos_id']
  generation = {'bos_token_id': ids['bos_id'], 'eos_token_id': stop_ids,
                'pad_token_id': ids['pad_id']}
  generation = {key: value for key, value in generation.items() if value is not None}

  with folders.replacing(out_dir, marker='config.json', kind='a model') as folder:
    if jax.process_index() == 0:
      folders.write_json(os.path.join(folder, 'config.json'), raw)
      if not config.num_labels:  # what scores does not generate
        folders.write_json(os.path.join(folder, 'generation_config.json'), generation)
      if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    own = {name: params[name] for name in param_shapes(config)}
    hf_weights.write(folder, config, own, max_file_bytes)


def _first_line(error):
  return (str(error).strip().splitlines() or [type(error).__name__])[0]
