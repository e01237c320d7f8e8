"""Adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors.

PEFT keeps one pair lora_A [r, in], lora_B [out, r] for each module and layer; ours are transposed
and stacked over layers. Where several of our kernels are fused in one module (GPT-2's c_attn holds
query, key and value), their adapters make one of the summed rank: A side by side, B block by block.
Both directions keep the model's outputs. The way back gives every kernel the module's whole A, so
kernels that shared it train apart from then on.
"""

import dataclasses
import functools
import os
import re

import jax
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from ptjax import config as settings_lib
from ptjax import sharding
from ptjax.models import folders
from ptjax.models import hf_weights
from ptjax.models import lora
from ptjax.models import transformer

CONFIG = 'adapter_config.json'
WEIGHTS = 'adapter_model.safetensors'

_PREFIX = 'base_model.model.'
_TENSOR = re.compile(r'(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?$')
_OURS = {'lora_A': 'lora_a', 'lora_B': 'lora_b', 'lora_magnitude_vector': 'magnitude'}

# What we follow, or what says nothing about the model's outputs. Anything else must be unset: it
# stands for a variant that would be computed wrongly.
_UNDERSTOOD = frozenset((
    'alpha_pattern', 'auto_mapping', 'base_model_name_or_path', 'eva_config', 'exclude_modules',
    'fan_in_fan_out', 'inference_mode', 'layers_pattern', 'layers_to_transform', 'lora_alpha',
    'lora_dropout', 'megatron_core', 'modules_to_save', 'peft_type', 'peft_version',
    'qalora_group_size', 'r', 'rank_pattern', 'revision', 'runtime_config', 'target_modules',
    'task_type', 'use_dora', 'use_rslora'))
_EXPECTED = {  # setting -> values that we follow
    'peft_type': ('LORA',), 'bias': ('none',),
    # Others change the base's weights too.
    'init_lora_weights': (True, False, 'gaussian', 'eva')}


@dataclasses.dataclass(frozen=True)
class _Module:
  """A linear module of the checkpoint and the kernels of ours that are its parts."""
  name: str  # without prefix; '{}' stands for the layer
  paths: tuple[tuple[str, ...], ...]  # of the kernels' parents under 'layers', side by side
  sizes: tuple[int, ...]  # out features of each
  features_in: int


def is_adapter(directory):
  """Whether `directory` holds an adapter, and not a whole model beside its settings."""
  files = set(os.listdir(directory))
  whole = files & {hf_weights.SINGLE, hf_weights.INDEX}
  return CONFIG in files and ('config.json' not in files or (WEIGHTS in files and not whole))


def base_of(directory):
  """The base model that an adapter names: a directory or a hub name."""
  path = os.path.join(directory, CONFIG)
  base = folders.read_json(path).get('base_model_name_or_path')
  if not base or not isinstance(base, str):
    raise settings_lib.UserError(
        f'{path} names no base model; write its directory or hub name to base_model_name_or_path')
  return base


def check(config, settings):
  """Raises UserError where `save` could not express adapters with these settings."""
  if settings.variant != 'dora' or lora.ALL in settings.targets:
    return
  for module in _modules(config):
    parts = [path[-1] for path in module.paths]
    targeted = [part for part in parts if part in settings.targets]
    if targeted and len(targeted) < len(parts):
      raise settings_lib.UserError(
          f'lora.targets={",".join(settings.targets)}: with lora.variant=dora a {config.family} '
          f'model must have adapters on all of {", ".join(parts)} or on none of them, since they '
          f'are one matrix, {module.name.rpartition(".")[2]}, in its files')


def save(directory, config, adapters, settings, *, base):
  """Writes adapters so that `peft.PeftModel.from_pretrained` opens them; see `folders.replacing`.

  Args:
    directory: the folder; an earlier adapter in it is replaced.
    config: TransformerConfig of the base.
    adapters: from `lora.init`, trained or not, on the host or on devices.
    settings: the config.LoraSettings they were made with.
    base: the base model's directory, which is written down whole, or hub name.
  Raises:
    UserError: see `check`; or the folder holds something else.
  """
  check(config, settings)
  adapters = sharding.fetch(adapters)
  modules = _modules(config)
  tensors, targets, ranks = {}, [], {}
  for module in modules:
    own = [_find(adapters['layers'], path) for path in module.paths]
    if not any(own):
      continue
    name = _short_name(module, modules)
    targets.append(name)
    a, b, magnitude = _fused(own, module.sizes)
    if a.shape[-1] != settings.rank:
      ranks[name] = a.shape[-1]
    for layer in range(len(a)):
      put = lambda leaf, value, layer=layer: tensors.update({
          f'{_PREFIX}{hf_weights.full_name(config, module.name.format(layer))}.{leaf}':
          np.ascontiguousarray(value)})
      put('lora_A.weight', a[layer].T)
      put('lora_B.weight', b[layer].T)
      if magnitude is not None:
        put('lora_magnitude_vector', magnitude[layer])
  heads = {name: tree for name, tree in adapters.items() if name == 'score'}  # a critic stays here
  leaves, whole = hf_weights.paths(heads), set()
  for path, source in hf_weights.layout(config, heads).items():
    tensors[_PREFIX + hf_weights.full_name(config, source.name)] = np.ascontiguousarray(
        leaves[path].T if source.transpose else leaves[path])
    whole.add(source.name.rpartition('.')[0])
  root = settings.variant == 'rslora'
  base = os.path.abspath(base) if os.path.isdir(base) else os.fspath(base)
  raw = {
      'peft_type': 'LORA', 'task_type': _task_type(config),
      'base_model_name_or_path': base, 'r': settings.rank,
      'lora_alpha': settings.alpha, 'lora_dropout': 0.0, 'bias': 'none',
      'target_modules': targets, 'rank_pattern': ranks,
      # The scale of every module stays what it was.
      'alpha_pattern': {name: settings.scale * (rank**0.5 if root else rank)
                        for name, rank in ranks.items()},
      'use_rslora': root, 'use_dora': settings.variant == 'dora',
      'fan_in_fan_out': config.family == 'gpt2', 'modules_to_save': sorted(whole) or None,
      'init_lora_weights': True, 'inference_mode': True}
  with folders.replacing(directory, marker=CONFIG, kind='an adapter') as folder:
    if jax.process_index() == 0:
      folders.write_json(os.path.join(folder, CONFIG), raw)
      safetensors_numpy.save_file(
          tensors, os.path.join(folder, WEIGHTS), metadata={'format': 'pt'})


def load(directory, config, *, base=None):
  """Reads an adapter made by PEFT or `save`.

  Args:
    directory: with adapter_config.json and adapter_model.safetensors.
    config: TransformerConfig of the base.
    base: the base's directory or hub name, to compare with the one the adapter names; None trusts.
  Returns:
    (adapters, LoraSettings): NumPy float32 leaves for `lora.join`, ranks filled up with zeros where
    they differ between layers. Dropout, if the adapter had any, is not kept.
  Raises:
    UserError: made for another base, or in a way that is not supported; damaged files.
  """
  path = os.path.join(directory, CONFIG)
  raw = folders.read_json(path)
  _check_supported(raw, path)
  if base is not None and _last_part(base) != _last_part(base_of(directory)):
    raise settings_lib.UserError(
        f'{directory} is an adapter for {base_of(directory)}, not for {base}; give its own base')
  root, dora = bool(raw.get('use_rslora')), bool(raw.get('use_dora'))
  rank, alpha = raw['r'], float(raw['lora_alpha'])
  scale = alpha / (rank**0.5 if root else rank)
  tensors, heads = _read(os.path.join(directory, WEIGHTS))
  problems = _Problems()
  layers, targets = {}, []
  for module in _modules(config):
    found = [tensors.pop(module.name.format(i), {}) for i in range(config.num_layers)]
    if not any(found):
      continue
    stacked = _stacked(config, raw, module, found, root, scale, dora, problems)
    if stacked is None:
      continue
    starts = np.cumsum((0, *module.sizes))
    for part, start, stop in zip(module.paths, starts, starts[1:]):
      adapter = {name: leaf if name == 'lora_a' else leaf[..., start:stop]
                 for name, leaf in stacked.items()}
      layers.setdefault(part[0], {})[part[1]] = adapter
      targets.append(part[1])
  problems.unexpected += [f'{name}.{leaf}' for name, group in tensors.items() for leaf in group]
  result = {'layers': layers, **_heads(config, heads, problems)}
  problems.check(directory, raw, config)
  # rsLoRA with DoRA is DoRA of another alpha.
  variant = 'dora' if dora else 'rslora' if root else 'lora'
  return result, settings_lib.LoraSettings(
      rank=rank, alpha=scale * rank if dora else alpha, variant=variant, targets=tuple(targets))


class _Problems:
  """What does not fit, by kind, for one message."""

  def __init__(self):
    self.missing, self.unexpected, self.wrong = [], [], []

  def check(self, directory, raw, config):
    """Raises UserError if there are any."""
    kinds = [f'{len(found)} {what}: {hf_weights.some(found)}' for what, found in (
        ('missing', self.missing), ('unexpected', self.unexpected),
        ('wrongly shaped', self.wrong)) if found]
    if kinds:
      raise settings_lib.UserError(
          f'the adapter in {directory}, made for {raw.get("base_model_name_or_path")}, does not '
          f'fit this base model ({config.family}, {config.num_layers} layers of width '
          f'{config.width}): ' + '; '.join(kinds))


@functools.cache
def _modules(config):
  """Every linear module of the layers, as a tuple of _Module."""
  shapes = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
  layers = {'layers': shapes['layers']}
  leaves = hf_weights.paths(layers)
  groups = {}
  for path, source in hf_weights.layout(config, layers).items():
    if path.endswith('/kernel'):
      groups.setdefault(source.name.removesuffix('.weight'), []).append((source.part, path))
  made = []
  for name, parts in groups.items():
    parts = [path for _, path in sorted(parts)]
    made.append(_Module(
        name, tuple(tuple(path.split('/')[1:-1]) for path in parts),
        tuple(leaves[path].shape[-1] for path in parts), leaves[parts[0]].shape[-2]))
  return tuple(made)


def _task_type(config):
  if not config.num_labels:
    return 'CAUSAL_LM'
  return 'TOKEN_CLS' if config.score_bias else 'SEQ_CLS'


def _short_name(module, modules):
  """What PEFT finds the module by: its last name, with the one before where that is ambiguous."""
  last = module.name.rpartition('.')[2]
  if sum(other.name.rpartition('.')[2] == last for other in modules) == 1:
    return last
  return '.'.join(module.name.split('.')[-2:])


def _find(tree, path):
  for name in path:
    tree = tree.get(name, {})
  return tree


def _fused(own, sizes):
  """One adapter (A [L, in, r], B [L, r, out], magnitude [L, out] or None) of side-by-side ones.

  Args:
    own: adapters of the parts, {} where a part has none.
    sizes: out features of the parts.
  """
  there = [adapter for adapter in own if adapter]
  a = np.concatenate([adapter['lora_a'] for adapter in there], axis=-1)
  b = np.zeros((*a.shape[:-2], a.shape[-1], sum(sizes)), np.float32)
  row, column = 0, 0
  for adapter, size in zip(own, sizes):
    if adapter:
      rank = adapter['lora_b'].shape[-2]
      b[..., row:row + rank, column:column + size] = adapter['lora_b']
      row += rank
    column += size
  magnitude = None
  if 'magnitude' in there[0]:
    magnitude = np.concatenate([adapter['magnitude'] for adapter in there], axis=-1)
  return a, b, magnitude


def _check_supported(raw, path):
  for name, allowed in _EXPECTED.items():
    if name in raw and raw[name] not in allowed:
      raise settings_lib.UserError(
          f'{path}: {name}={raw[name]!r} is not supported; expected '
          f'{" or ".join(repr(value) for value in allowed)}')
  odd = [name for name, value in raw.items()
         if value and name not in _UNDERSTOOD and name not in _EXPECTED]
  if odd:
    raise settings_lib.UserError(f'{path}: {hf_weights.some(sorted(odd))} set, which is not '
                                 'supported; merge the adapter with peft and load the result')
  for name in ('r', 'lora_alpha'):
    if not isinstance(raw.get(name), (int, float)) or raw[name] <= 0:
      raise settings_lib.UserError(f'{path}: {name}={raw.get(name)!r}; expected a positive number')


def _read(path):
  """Returns ({module: {our leaf name: array}}, {other tensor: array}), names without prefixes."""
  if not os.path.exists(path):
    raise settings_lib.UserError(
        f'{path} does not exist; an adapter is read from safetensors alone (a pickle, '
        'adapter_model.bin, can run any code: load it with peft and save it again)')
  modules, others = {}, {}
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      for name in file.keys():
        array = np.asarray(file.get_tensor(name), np.float32)
        match = _TENSOR.match(hf_weights.bare_name(name.removeprefix(_PREFIX)))
        if match:
          modules.setdefault(match[1], {})[_OURS[match[2]]] = array
        else:
          others[hf_weights.bare_name(name.removeprefix(_PREFIX))] = array
  except (safetensors.SafetensorError, OSError) as error:
    raise settings_lib.UserError(
        f'{path} is not a readable safetensors file (truncated or corrupt: {error}); '
        'copy or download it again') from None
  return modules, others


def _stacked(config, raw, module, found, root, scale, dora, problems):
  """One module's adapters of all layers, or None with a problem noted.

  Args:
    found: per layer {leaf: array}, {} where the adapter leaves the layer alone.
  Returns:
    {'lora_a': [L, in, r], 'lora_b': [L, r, out], 'magnitude': [L, out] for DoRA}; B times what the
    module's own scale is of `scale`.
  """
  size = sum(module.sizes)
  ranks = [len(tensors['lora_a']) for tensors in found if 'lora_a' in tensors]
  rank = max(ranks, default=0)
  a = np.zeros((len(found), module.features_in, rank), np.float32)
  b = np.zeros((len(found), rank, size), np.float32)
  magnitude = np.zeros((len(found), size), np.float32)
  good = True
  for layer, tensors in enumerate(found):
    name = hf_weights.full_name(config, module.name.format(layer))
    if not tensors and not dora:
      continue  # zeros, which nothing ever moves
    needed = ('lora_a', 'lora_b') + ('magnitude',) * dora
    absent = [leaf for leaf in needed if leaf not in tensors]
    problems.missing += [f'{name}.{leaf}' for leaf in absent]
    if absent:
      good = False
      continue
    own_rank = len(tensors['lora_a'])
    shapes = {'lora_a': (own_rank, module.features_in), 'lora_b': (size, own_rank),
              'magnitude': (size,)}
    wrong = [f'{name}.{leaf} is {list(tensors[leaf].shape)}, not {list(shapes[leaf])}'
             for leaf in needed if tensors[leaf].shape != shapes[leaf]]
    problems.wrong += wrong
    if wrong:
      good = False
      continue
    alpha = _pattern(raw.get('alpha_pattern'), name, raw['lora_alpha'])
    a[layer, :, :own_rank] = tensors['lora_a'].T
    b[layer, :own_rank] = tensors['lora_b'].T * (
        alpha / (own_rank**0.5 if root else own_rank) / scale)
    if dora:
      magnitude[layer] = tensors['magnitude']
  if not good:
    return None
  return {'lora_a': a, 'lora_b': b, **({'magnitude': magnitude} if dora else {})}


def _pattern(patterns, name, default):
  """The value of the first pattern that a module's name ends with, as PEFT matches them."""
  for key, value in (patterns or {}).items():
    if re.match(rf'(.*\.)?({key})$', name):
      return value
  return default


def _heads(config, tensors, problems):
  """Modules that were saved whole, as the tree that `lora.init` makes of them; {} if none were."""
  if not tensors:
    return {}
  shapes = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
  heads = {'score': shapes['score']} if config.num_labels else {}
  leaves, tree = hf_weights.paths(heads), {}
  for path, source in hf_weights.layout(config, heads).items():
    array = tensors.pop(source.name, None)
    if array is None:
      problems.missing.append(source.name)
      continue
    array = array.T if source.transpose else array
    if array.shape != leaves[path].shape:
      problems.wrong.append(f'{source.name} is {list(array.shape)}, not {list(leaves[path].shape)}')
    room, name = path.split('/')
    tree.setdefault(room, {})[name] = array
  problems.unexpected += list(tensors)
  return tree


def _last_part(name):
  return os.path.basename(os.path.normpath(os.fspath(name))).lower()
