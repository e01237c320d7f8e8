"""Hugging Face weights: what each tensor is called, reading slices of it, writing it.

A checkpoint keeps one tensor per layer, its matrices mostly [out, in]; our leaves are stacked over
layers, [L, in, out]. `layout` states the correspondence once; loading and export both follow it.
"""

import contextlib
import dataclasses
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from ptjax import config as settings
from ptjax import sharding as sharding_lib

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'

# What a name may start with; the rest is what `layout` knows. The longest go first.
_PREFIX = re.compile(
    r'^(model\.language_model\.|language_model\.model\.|language_model\.(?=lm_head)|model\.|'
    r'transformer\.)')
# Buffers that old checkpoints hold and the towers of a multimodal model: not needed for text.
_IGNORED = re.compile(
    r'rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|^(vision_tower|multi_modal_projector)\.')

_FLOATS = {'F64', 'F32', 'F16', 'BF16'}


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a leaf comes from. `parts` > 1: it is one of several fused side by side in the tensor."""
  name: str  # without prefix; '{}' stands for the layer where the leaf is stacked
  transpose: bool = False
  part: int = 0
  parts: int = 1

  @property
  def stacked(self):
    return '{}' in self.name


def layout(config, shapes):
  """Returns {leaf path 'a/b/c': Source} for every leaf of `shapes`."""
  sources = _gpt2_sources() if config.family == 'gpt2' else _llama_sources(config)
  # Token classifiers of GPT-2 alone call it otherwise.
  score = 'classifier' if config.family == 'gpt2' and config.score_bias else 'score'
  sources.update({'score/kernel': Source(score + '.weight', transpose=True),
                  'score/bias': Source(score + '.bias')})
  return {path: sources[path] for path in paths(shapes)}


def paths(tree):
  """Returns {'a/b/c': leaf}."""
  return {'/'.join(k.key for k in path): leaf
          for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _gpt2_sources():
  layer = 'h.{}.'
  sources = {
      'embed/embedding': Source('wte.weight'),
      'position_embed/embedding': Source('wpe.weight'),
      'head/kernel': Source('lm_head.weight', transpose=True),
      **_norm('final_norm', 'ln_f'),
      **_norm('layers/attention_norm', layer + 'ln_1'),
      **_norm('layers/mlp_norm', layer + 'ln_2'),
  }
  # GPT-2's Conv1D keeps [in, out].
  for ours, theirs, part, parts in (
      ('attention/query', 'attn.c_attn', 0, 3), ('attention/key', 'attn.c_attn', 1, 3),
      ('attention/value', 'attn.c_attn', 2, 3), ('attention/out', 'attn.c_proj', 0, 1),
      ('mlp/up', 'mlp.c_fc', 0, 1), ('mlp/down', 'mlp.c_proj', 0, 1)):
    for leaf, suffix in (('kernel', 'weight'), ('bias', 'bias')):
      sources[f'layers/{ours}/{leaf}'] = Source(
          f'{layer}{theirs}.{suffix}', part=part, parts=parts)
  return sources


def _llama_sources(config):
  layer = 'layers.{}.'
  sources = {
      'embed/embedding': Source('embed_tokens.weight'),
      'head/kernel': Source('lm_head.weight', transpose=True),
      **_norm('final_norm', 'norm'),
      **_norm('layers/attention_norm', layer + 'input_layernorm'),
      **_norm('layers/attention/query_norm', layer + 'self_attn.q_norm'),
      **_norm('layers/attention/key_norm', layer + 'self_attn.k_norm'),
  }
  if config.post_norms:
    # Gemma's post_attention_layernorm follows attention; elsewhere that name precedes the MLP.
    sources.update(_norm('layers/post_attention_norm', layer + 'post_attention_layernorm'))
    sources.update(_norm('layers/mlp_norm', layer + 'pre_feedforward_layernorm'))
    sources.update(_norm('layers/post_mlp_norm', layer + 'post_feedforward_layernorm'))
  else:
    sources.update(_norm('layers/mlp_norm', layer + 'post_attention_layernorm'))
  for ours, theirs in (
      ('attention/query', 'self_attn.q_proj'), ('attention/key', 'self_attn.k_proj'),
      ('attention/value', 'self_attn.v_proj'), ('attention/out', 'self_attn.o_proj'),
      ('mlp/gate', 'mlp.gate_proj'), ('mlp/up', 'mlp.up_proj'), ('mlp/down', 'mlp.down_proj')):
    sources[f'layers/{ours}/kernel'] = Source(f'{layer}{theirs}.weight', transpose=True)
    sources[f'layers/{ours}/bias'] = Source(f'{layer}{theirs}.bias')
  return sources


def _norm(ours, theirs):
  return {f'{ours}/scale': Source(theirs + '.weight'), f'{ours}/bias': Source(theirs + '.bias')}


def tensor_shapes(config, shapes):
  """Returns {tensor name without prefix: shape} that a checkpoint of `config` holds."""
  out = {}
  for path, leaf in paths(shapes).items():
    source = layout(config, shapes)[path]
    shape = leaf.shape[1:] if source.stacked else leaf.shape
    shape = shape[::-1] if source.transpose else shape
    shape = (*shape[:-1], shape[-1] * source.parts)
    for layer in range(leaf.shape[0] if source.stacked else 1):
      out[source.name.format(layer)] = shape
  return out


class Checkpoint:
  """The tensors of a model directory, read by slices; nothing is held but memory maps.

  A context manager. `names` maps names without prefix to names in the files.
  """

  def __init__(self, directory):
    self._directory = directory
    self._files = contextlib.ExitStack()
    self._handles = {}
    self.names = {}

  def __enter__(self):
    for filename in weight_files(self._directory):
      path = os.path.join(self._directory, filename)
      try:
        # NumPy reads BF16 too, through ml_dtypes.
        handle = self._files.enter_context(safetensors.safe_open(path, framework='numpy'))
      except (safetensors.SafetensorError, OSError) as error:
        self._files.close()
        raise settings.UserError(
            f'{path} is not a readable safetensors file (truncated or corrupt: {error}); '
            'copy or download it again') from None
      for name in handle.keys():
        self._handles[name] = handle
        if not _IGNORED.search(bare_name(name)):
          self.names[bare_name(name)] = name
    return self

  def __exit__(self, *details):
    self._files.close()

  def shape(self, name):
    return tuple(self._slice(name).get_shape())

  def stored_dtype(self, name):
    return self._slice(name).get_dtype()

  def read(self, name, index):
    """The part `index` (tuple of slices) of a tensor, in the dtype of the file."""
    return self._slice(name)[index]

  def _slice(self, name):
    return self._handles[self.names[name]].get_slice(self.names[name])


def weight_files(directory):
  """The safetensors files of a model directory, by their names in it.

  Raises:
    UserError: there are none, or the index names one that is not there.
  """
  if os.path.exists(os.path.join(directory, SINGLE)):
    return [SINGLE]
  index = os.path.join(directory, INDEX)
  if not os.path.exists(index):
    raise settings.UserError(_without_weights(directory))
  try:
    with open(index, encoding='utf-8') as file:
      files = sorted(set(json.load(file)['weight_map'].values()))
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise settings.UserError(f'{index} is not a safetensors index ({error!r})') from None
  absent = [f for f in files if not os.path.exists(os.path.join(directory, f))]
  if absent:
    raise settings.UserError(
        f'{index} names {len(files)} files, of which {len(absent)} are missing: '
        f'{some(absent)}; copy or download them again')
  return files


def _without_weights(directory):
  present = sorted(os.listdir(directory))
  pickles = [f for f in present if f.endswith(('.bin', '.pt', '.pth', '.ckpt'))
             and not f.startswith(('training_args', 'optimizer', 'scheduler', 'rng_state'))]
  if pickles:
    return (
        f'{directory} holds its weights only as pickle files ({some(pickles)}), which are not '
        'read because a pickle can run any code; convert them to safetensors: with torch '
        "installed, transformers.AutoModelForCausalLM.from_pretrained('.').save_pretrained('.')")
  if 'adapter_model.safetensors' in present:
    return (f'{directory} holds an adapter without its adapter_config.json; copy that file too, '
            'which names the base model')
  return (f'{directory} has no weights: expected {SINGLE} or {INDEX}, '
          f'found {some(present) or "nothing"}')


def check(checkpoint, config, shapes, directory):
  """Raises UserError unless the checkpoint holds just what `config` needs, in the right shapes."""
  names = dict(checkpoint.names)
  needed = tensor_shapes(config, shapes)
  embedding = layout(config, shapes)['embed/embedding'].name
  if config.num_labels:
    names.pop('lm_head.weight', None)  # of the language model whose body this is
  elif config.tie_embeddings and names.pop('lm_head.weight', None) and embedding in names:
    _check_tied(checkpoint, embedding, directory)
  missing = [full_name(config, name) for name in needed if name not in names]
  extra = [names[name] for name in names if name not in needed]
  wrong = [f'{names[name]} is {list(checkpoint.shape(name))}, not {list(shape)}'
           for name, shape in needed.items()
           if name in names and checkpoint.shape(name) != tuple(shape)]
  problems = [f'{len(found)} {what}: {some(found)}' for what, found in (
      ('missing', missing), ('unexpected', extra), ('wrongly shaped', wrong)) if found]
  if problems:
    raise settings.UserError(
        f'the tensors of {directory} do not fit its config.json ({config.family}, '
        f'{config.num_layers} layers): ' + '; '.join(problems))
  odd = [f'{names[name]} {checkpoint.stored_dtype(name)}' for name in needed
         if checkpoint.stored_dtype(name) not in _FLOATS]
  if odd:
    raise settings.UserError(
        f'{directory} stores {len(odd)} tensors in a format that is not supported '
        f'({some(odd)}); use float32, float16 or bfloat16 weights')


def _check_tied(checkpoint, embedding, directory, rows=8192):
  """A head beside tied embeddings may be dropped only if it equals them."""
  size = checkpoint.shape(embedding)[0]
  same = checkpoint.shape('lm_head.weight') == checkpoint.shape(embedding)
  for start in range(0, size if same else 0, rows):
    index = slice(start, min(start + rows, size)), slice(None)
    same &= np.array_equal(
        checkpoint.read(embedding, index), checkpoint.read('lm_head.weight', index))
  if not same:
    raise settings.UserError(
        f'config.json of {directory} ties the embeddings (tie_word_embeddings), but lm_head.weight '
        'differs from the input embedding; set tie_word_embeddings to false there')


def bare_name(name):
  """What `layout` calls a tensor: its name in a file without prefix."""
  return _PREFIX.sub('', name)


def full_name(config, name):
  """The name in a file that we write of a tensor that `layout` calls `name`."""
  if name.startswith(('lm_head.', 'score.', 'classifier.')):
    return name
  return ('transformer.' if config.family == 'gpt2' else 'model.') + name


def some(names, most=5):
  """The first few names and how many more there are, for messages."""
  names = list(names)
  rest = f', ... ({len(names) - most} more)' if len(names) > most else ''
  return ', '.join(names[:most]) + rest


def read_leaf(checkpoint, source, leaf, index):
  """Assembles one part of a leaf on the host.

  Args:
    checkpoint: an open Checkpoint.
    source: the leaf's Source.
    leaf: `jax.ShapeDtypeStruct` of the whole leaf.
    index: tuple of slices, one per dimension of the leaf.
  Returns:
    A NumPy array of that part only, in the leaf's dtype.
  """
  bounds = [s.indices(n)[:2] for s, n in zip(index, leaf.shape)]
  out = np.empty([stop - start for start, stop in bounds], leaf.dtype)
  inner = bounds[1:] if source.stacked else bounds
  # The tensor's last dimension holds `parts` of ours side by side.
  offset = source.part * leaf.shape[-1]
  inner = [*inner[:-1], (inner[-1][0] + offset, inner[-1][1] + offset)]
  where = tuple(slice(*b) for b in (inner[::-1] if source.transpose else inner))
  for i in range(out.shape[0] if source.stacked else 1):
    tensor = checkpoint.read(source.name.format(bounds[0][0] + i), where)
    target = out[i] if source.stacked else out
    target[...] = tensor.T if source.transpose else tensor
  return out


def load_leaf(checkpoint, source, leaf, sharding):
  """Places a leaf on its devices; the host holds only the parts its own devices need.

  Args:
    checkpoint, source, leaf: as in `read_leaf`.
    sharding: `jax.sharding.Sharding`, or None for the default device (uncommitted).
  """
  if sharding is None:
    return jnp.asarray(read_leaf(checkpoint, source, leaf, (slice(None),) * len(leaf.shape)))
  parts = {}  # devices that replicate a part share one host copy

  def part(index):
    key = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape))
    if key not in parts:
      parts[key] = read_leaf(checkpoint, source, leaf, index)
    return parts[key]

  # Waiting keeps the host to one leaf at a time even where transfers lag behind the reading.
  return jax.make_array_from_callback(leaf.shape, sharding, part).block_until_ready()


def write(directory, config, params, max_file_bytes):
  """Writes safetensors files, with an index where one file would exceed `max_file_bytes`.

  Every process calls it, since sharded leaves are gathered; process 0 writes. Tensors are gathered
  file by file, so the host holds `max_file_bytes` (or one larger tensor) at most.
  """
  leaves = paths(params)
  groups = {}  # tensor name -> its parts [(path, layer), ...], in order
  for path, source in layout(config, params).items():
    for layer in range(leaves[path].shape[0] if source.stacked else 1):
      groups.setdefault(source.name.format(layer), []).append((source.part, path, source, layer))

  files, sizes = [[]], [0]
  for name, group in groups.items():
    size = sum(leaves[p].nbytes // (leaves[p].shape[0] if s.stacked else 1) for _, p, s, _ in group)
    if files[-1] and sizes[-1] + size > max_file_bytes:
      files.append([])
      sizes.append(0)
    files[-1].append(name)
    sizes[-1] += size

  weight_map = {}
  for number, names in enumerate(files, 1):
    filename = SINGLE if len(files) == 1 else f'model-{number:05d}-of-{len(files):05d}.safetensors'
    tensors = {}
    for name in names:
      stored = full_name(config, name)
      weight_map[stored] = filename
      tensors[stored] = _gather(leaves, sorted(groups[name], key=lambda part: part[0]))
    if jax.process_index() == 0:
      safetensors_numpy.save_file(
          tensors, os.path.join(directory, filename), metadata={'format': 'pt'})
  if len(files) > 1 and jax.process_index() == 0:
    with open(os.path.join(directory, INDEX), 'w', encoding='utf-8') as file:
      json.dump({'metadata': {'total_size': sum(sizes)}, 'weight_map': weight_map}, file, indent=2)


def _gather(leaves, group):
  """One tensor of the checkpoint on the host, C-ordered."""
  pieces = []
  for _, path, source, layer in group:
    piece = sharding_lib.fetch(leaves[path][layer] if source.stacked else leaves[path])
    pieces.append(piece.T if source.transpose else piece)
  return np.ascontiguousarray(np.concatenate(pieces, axis=-1) if len(pieces) > 1 else pieces[0])
