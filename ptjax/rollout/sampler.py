"""Prompts in, completions out: compiled programs and the host loop between them."""

import contextlib
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from ptjax import config as settings
from ptjax import sharding
from ptjax.rollout import decoding
from ptjax.rollout import schedule
from ptjax.rollout import stop

_CALLS_THAT_COMPILE = 8  # with prompts of one shape; from then on, what there is serves if it can


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
  """How completions are drawn; part of the compiled programs."""
  max_tokens: int  # per completion, the stop token included
  group_size: int = 1  # completions per prompt
  temperature: float = 1.0  # 0 takes the likeliest token
  top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
  top_p: float = 1.0  # keep the likeliest tokens up to this mass; 1 keeps all
  min_p: float = 0.0  # keep tokens this fraction as likely as the likeliest; 0 keeps all
  stop_ids: tuple = ()  # any of these tokens ends a completion and stays in it
  stop_strings: tuple = ()  # a completion ends with the token that completes one of these
  mixture: tuple = ()  # exponents of several models' probabilities, summing to 1; (): one model
  slots: int = 0  # completions decoded at once, 0: see Sampler; results do not depend on it
  chunk: int = 16  # steps between two looks of the host; nor on this

  def __post_init__(self):
    def check(name, good, expected):
      if not good:
        raise settings.UserError(f'sampling: {name}={getattr(self, name)!r}: expected {expected}')
    for name in ('stop_ids', 'stop_strings', 'mixture'):
      check(name, not isinstance(getattr(self, name), (str, int)), 'a sequence, e.g. (x,)')
      object.__setattr__(self, name, tuple(getattr(self, name)))
    for name in ('max_tokens', 'group_size', 'chunk'):
      check(name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1,
            'a positive integer')
    check('slots', isinstance(self.slots, int) and self.slots >= 0,
          'a number of completions, 0 to leave it to the sampler')
    check('temperature', 0 <= self.temperature < math.inf, 'a number, at least 0')
    check('top_k', isinstance(self.top_k, int) and self.top_k >= 0,
          'the number of tokens to keep, 0 for all')
    check('top_p', 0 < self.top_p <= 1, 'a fraction above 0, 1 for all')
    check('min_p', 0 <= self.min_p <= 1, 'a fraction, 0 for all')
    check('stop_ids', all(isinstance(i, (int, np.integer)) for i in self.stop_ids), 'token ids')
    check('mixture', not self.mixture or min(self.mixture) >= 0 and (
        abs(sum(self.mixture) - 1) < 1e-6), 'exponents, at least 0, that sum to 1')
    check('stop_strings', all(isinstance(s, str) and s for s in self.stop_strings),
          'strings that are not empty')


def make_sampler(config, options, *, mesh=None, decode_text=None, gather_weights=True):
  """Returns a `Sampler`, a callable `(params, prompts, key) -> types.Rollouts`.

  Args:
    config: TransformerConfig.
    options: SamplingOptions.
    mesh: where to run; parameters must lie on it. Prompts are split over data and fsdp, key/value
      heads over tensor where they divide. None: wherever the parameters lie.
    decode_text: `(list of token ids) -> str`; needed for stop strings.
    gather_weights: whether decoding works on weights that are whole along fsdp, gathered once
      per rollout, which needs the memory. Otherwise every step gathers them anew.
  Raises:
    UserError: options that do not fit the model, or stop strings without `decode_text`.
  """
  if options.stop_strings and decode_text is None:
    raise settings.UserError('sampling: stop_strings need a tokenizer to decode with')
  strange = [i for i in options.stop_ids if not 0 <= i < config.vocab_size]
  if strange:
    raise settings.UserError(f'sampling: stop_ids {strange} are no ids of a vocabulary of '
                             f'{config.vocab_size}')
  return Sampler(config, options, mesh, decode_text, gather_weights)


class Sampler:
  """Samples completions; keeps compiled programs between calls, and `memory`.

  Token t of a completion is drawn with `fold_in(key of (rollout key, prompt id, sample id), t)`,
  so it is the same in any batch, order, slot, padding, chunk, window or mesh, as far as the logits
  are (they agree up to rounding, which rarely falls on a boundary).

  All prompts are run at once and their keys and values kept until the end, so that a free slot
  takes the next completion without running the model. Where all completions have slots, a group
  shares the one copy of its prompt's keys and values, until half of them are done; where they wait
  for slots, and from then on, each chunk copies those of the completions it decodes.

  Unless told how many slots to use, it decodes all completions together. On a CPU, half of them at
  a time once a call has drawn completions less than half as long, on average, as its longest (1.17x
  less CPU time for 64 nearly geometric ones behind prompts of 32 tokens).

  Attributes:
    compilations: XLA programs compiled so far: three, and one for each number of slots and window
      that was needed. After the first calls a larger one stands in for one that is not there.
    last_stats: of the last call: `chunks` and `steps` decoded, `prefill_tokens` and
      `decode_tokens` that count, without padding, and `busy_fraction`, the share of the slots'
      steps that made one of those.
    memory: what earlier calls taught about how to schedule, which moves results by rounding alone;
      of JSON's types. A run that goes on bit for bit puts it back.
  """

  def __init__(self, config, options, mesh, decode_text, gather_weights):
    self.config = config
    self.options = options
    self.mesh = mesh
    self.last_stats = {}
    self._decode_text = decode_text
    self._gather_weights = gather_weights
    self._programs = {}
    self.memory = {}
    # Even chunks: 59 steps in chunks of at most 16 are 4 of 15, not 3 of 16 and one of 11.
    steps = options.max_tokens - 1  # the prefill draws the first token
    chunks = -(-steps // options.chunk)
    self._steps = -(-steps // chunks) if steps else 0
    self._windows = schedule.window_sizes(chunks * self._steps)

  @property
  def compilations(self):
    return len(self._programs)

  @property
  def memory(self):
    used = [[*shape, self._calls[shape], sorted(map(list, self._used[shape]))]
            for shape in sorted(self._calls)]
    return {'uneven': self._uneven, 'used': used}

  @memory.setter
  def memory(self, found):
    self._uneven = found.get('uneven', False)  # whether the last completions were of such lengths
    # By (P, S) of the prompts: calls, and (slots, window) of the chunks they decoded.
    self._calls = {(p, s): calls for p, s, calls, _ in found.get('used', ())}
    self._used = {(p, s): set(map(tuple, chunks)) for p, s, _, chunks in found.get('used', ())}

  def __call__(self, params, prompts, key, limits=None):
    """Samples `group_size` completions for each prompt.

    Args:
      params: the parameter tree; for a mixture a list of one per exponent, of the same shape.
      prompts: types.Prompts, NumPy or device arrays, equal on every process. Another P or S is
        another set of programs, so pad to few different ones.
      key: the rollout's PRNG key.
      limits: [B] int, tokens after which each completion is cut; None: max_tokens for all.
    Returns:
      types.Rollouts, rows prompt-major, replicated over the mesh.
    Raises:
      UserError: an empty prompt, or one that leaves no room for max_tokens.
      ValueError: sample_ids that are not [P, group_size], or limits not in [1, max_tokens].
    """
    prompts = sharding.fetch(prompts)
    num_prompts = len(prompts.lengths)
    if limits is None:
      limits = np.full(num_prompts * self.options.group_size, self.options.max_tokens)
    self._check(prompts, limits)
    params = list(params) if self.options.mixture else [params]
    if len(params) != max(1, len(self.options.mixture)):
      raise ValueError(f'{len(params)} models for a mixture of {len(self.options.mixture)}')
    place = _placement(self.mesh, self.config, params)
    impl = jax.random.key_impl(key)
    # What programs are compiled for.
    params_shapes = (jax.tree.structure(params), *(
        (leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(params)))
    shapes = prompts.tokens.shape, impl, params_shapes
    run = functools.partial(self._run, shapes)
    shape = prompts.tokens.shape
    calls = self._calls[shape] = self._calls.get(shape, 0) + 1
    used = self._used.setdefault(shape, set())
    on_cpu = next(iter(jax.tree.leaves(params)[0].sharding.device_set)).platform == 'cpu'

    prompts = self._fill_mesh(prompts)
    limits = np.pad(limits, (0, prompts.sample_ids.size - len(limits))).astype(np.int32)
    shards = self._shards()
    per_shard = len(limits) // shards
    slots = min(-(-self.options.slots // shards) or per_shard, per_shard)
    halve = self._uneven and on_cpu and not self.options.slots
    everything = np.arange(len(limits), dtype=np.int32).reshape(shards, -1) % per_shard

    def prefill(params, prompts, key_data, limits):
      store, own, made = decoding.prefill(
          self.config, self.options, params, prompts,
          jax.random.wrap_key_data(key_data, impl=impl), limits, slots=shards * slots,
          steps=self._steps, capacity=self._windows[-1])
      return store, own, made, self._status(made, 0 * limits, everything, 1)

    weights = self._run(
        params_shapes, 'weights',
        lambda params: [decoding.decode_weights(self.config, tree) for tree in params], params,
        out=None if self.mesh is None else [self._weight_shardings(tree) for tree in params])
    # The key crosses as data: a typed key cannot be made global from each process's copy.
    store, own, made, status = run(
        'prefill', prefill, params, sharding.put(prompts, place.whole),
        sharding.put(np.asarray(jax.random.key_data(key)), place.whole),
        sharding.put(limits, place.rows), out=(place.kv, place.kv, place.rows, place.whole))
    made, cuts = self._decode(
        run, place, weights, store, own, made, status, everything, used,
        schedule.Schedule(shards, per_shard, slots, self._windows, self._steps,
                          sorted(used) if calls > _CALLS_THAT_COMPILE else (),
                          active=-(-slots // 2) if halve else slots))
    self.last_stats['prefill_tokens'] = int(prompts.lengths[:num_prompts].sum())
    return run('finish', functools.partial(decoding.finish, self.options, num_prompts=num_prompts),
               made, cuts, out=place.whole)

  def _decode(self, run, place, weights, store, own, made, status, rows, used, plan):
    """Decodes chunk by chunk until every completion is done; returns them and their cuts.

    Adds each chunk's (slots, window) to `used`.
    """
    def chunk(window, weights, store, own, made, cuts, slots, rows):
      start = made.length
      own, made = decoding.run_chunk(
          self.config, self.options, weights, store, own, made, cuts, slots, rows,
          steps=self._steps, window=window)
      return own, made, self._status(made, start, rows, self._steps)

    max_tokens = self.options.max_tokens
    cuts = np.full(made.length.shape, max_tokens + 1, np.int32)
    placed_cuts = sharding.put(cuts, place.rows)
    watch = None
    if self.options.stop_strings:
      watch = stop.StopStrings(
          self.options.stop_strings, self._decode_text, len(cuts), max_tokens)
    chunks, slot_steps = 0, 0
    while True:
      # The one wait for the device. The status is replicated, so every process decides alike.
      status = jax.device_get(status)
      if watch:
        shards, per_shard = len(rows), len(cuts) // len(rows)
        watch.feed((rows + per_shard * np.arange(shards)[:, None]).reshape(-1), status['tokens'],
                   status['length'], status['done'])
        cuts = watch.cuts
        placed_cuts = sharding.put(cuts, place.rows)
      turn = plan.turn(status['length'], status['done'] | (cuts <= max_tokens))
      if turn is None:
        break
      rows = turn.rows
      own, made, status = run(
          ('chunk', rows.size, turn.window), functools.partial(chunk, turn.window),
          weights, store, own, made, placed_cuts, sharding.put(turn.slots, place.rows),
          sharding.put(rows, place.rows), out=(place.kv, place.rows, place.whole), donate=(2, 3))
      used.add((rows.size, turn.window))
      chunks += 1
      slot_steps += rows.size * self._steps
    lengths = np.minimum(status['length'], cuts)
    self._uneven = bool(2 * lengths.sum() < lengths.max() * np.count_nonzero(lengths))
    self.last_stats = {
        'chunks': chunks, 'steps': chunks * self._steps, 'decode_tokens': int(lengths.sum()),
        'busy_fraction': float(np.maximum(lengths - 1, 0).sum() / max(1, slot_steps))}
    return made, placed_cuts

  def _run(self, shapes, name, function, *args, out, donate=()):
    """Calls the program `name` for `shapes`; compiles `function` when it is first needed."""
    if (name, shapes) not in self._programs:
      on_mesh = self.mesh is not None
      with sharding.use(self.mesh) if on_mesh else contextlib.nullcontext():
        # All inputs are committed, so what is compiled takes their shardings from them.
        jitted = jax.jit(function, out_shardings=out if on_mesh else None, donate_argnums=donate)
        self._programs[name, shapes] = jitted.lower(*args).compile()
    return self._programs[name, shapes](*args)

  def _status(self, made, start, rows, steps):
    """What the host looks at between chunks, as few numbers as will do."""
    status = {'done': made.done, 'length': made.length}
    if self.options.stop_strings:
      status['tokens'] = decoding.newest(made, start, rows, steps)
    return status

  def _check(self, prompts, limits):
    """Finds what would silently go wrong on the device."""
    lengths = prompts.lengths
    expected = (len(lengths), self.options.group_size)
    if prompts.sample_ids.shape != expected:
      raise ValueError(f'sample_ids of shape {prompts.sample_ids.shape}; expected one per '
                       f'completion, [P, group_size] = {expected}')
    if np.shape(limits) != (prompts.sample_ids.size,) or not (
        1 <= np.min(limits) and np.max(limits) <= self.options.max_tokens):
      raise ValueError(f'limits={limits}: expected a number from 1 to {self.options.max_tokens} '
                       f'for each of {prompts.sample_ids.size} completions')
    if lengths.min() < 1:
      raise settings.UserError(f'the prompt of row {prompts.ids[lengths.argmin()]} has no '
                               'tokens; a model needs at least one, e.g. a BOS token')
    longest = lengths.max() + self.options.max_tokens
    if longest > self.config.max_length:
      raise settings.UserError(
          f'a prompt of {lengths.max()} tokens (row {prompts.ids[lengths.argmax()]}) and '
          f'max_tokens={self.options.max_tokens} do not fit into the {self.config.max_length} '
          'positions of the model; lower one of the two limits')

  def _shards(self):
    return 1 if self.mesh is None else sharding.batch_size(self.mesh)

  def _fill_mesh(self, prompts):
    """Repeats the first prompt until the prompts divide over the mesh."""
    missing = -len(prompts.lengths) % self._shards()
    return jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[:1], missing, 0)]), prompts)

  def _weight_shardings(self, params):
    """As the parameters lie, layers apart, and whole along fsdp if weights are gathered."""
    def one(path, leaf):
      spec = tuple(leaf.sharding.spec)
      if path[0].key == 'layers':
        spec = spec[1:]
      if self._gather_weights:
        spec = [None if axis == 'fsdp' else axis for axis in spec]
      return NamedSharding(self.mesh, PartitionSpec(*spec))
    specs = jax.tree_util.tree_map_with_path(one, params)
    return {**specs, 'layers': [specs['layers']] * self.config.num_layers}


class _Placement(NamedTuple):
  """Where things lie."""
  rows: jax.sharding.Sharding  # leading axis over the batch axes
  whole: jax.sharding.Sharding  # everywhere
  kv: jax.sharding.Sharding  # caches


def _placement(mesh, config, params):
  if mesh is None:
    here = jax.sharding.SingleDeviceSharding(next(iter(jax.tree.leaves(params)[0].devices())))
    return _Placement(here, here, here)
  # Of the caches' layout only this is known here: rows first, then key/value heads.
  heads = 'tensor' if config.num_kv_heads % mesh.shape['tensor'] == 0 else None
  return _Placement(sharding.batch(mesh), sharding.replicated(mesh),
                    NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES, heads)))
