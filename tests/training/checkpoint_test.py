"""Checkpoints: equal to the bit, on any mesh, one step back after damage."""

import logging
import shutil

import flax.struct
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ptjax import config
from ptjax.training import checkpoint


@flax.struct.dataclass
class State:
  """Stands for the train state: scalars, nested parameters, optimizer state, empty parts."""
  step: jax.Array
  params: dict
  opt_state: object
  loss_state: dict
  extra: object = None


def _mesh(**sizes):
  count = int(np.prod(list(sizes.values())))
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:count],
                       axis_types=(AxisType.Auto,) * len(sizes))


def _state(mesh=None, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  params = {
      'embed': {'embedding': jax.random.normal(keys[0], (32, 8))},
      'layers': {'kernel': jax.random.normal(keys[1], (2, 8, 16), jnp.bfloat16)},
      'norm': {'scale': jnp.asarray([0.1, -0.0, jnp.nan, jnp.inf, 1e-45, 2.0, 3.0, 4.0])}}
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(
      1e-3, mask=jax.tree.map(lambda p: p.ndim > 1, params)))
  state = State(
      step=jnp.int32(7), params=params, opt_state=optimizer.init(params),
      loss_state={'mean': jax.random.normal(keys[2], ()), 'seen': jnp.arange(6, dtype=jnp.uint8),
                  'flags': jnp.asarray([True, False, True])})
  return state if mesh is None else jax.device_put(state, _shardings(state, mesh))


def _shardings(state, mesh):
  def one(leaf):
    spec = [None] * leaf.ndim
    for i, axis in zip(range(leaf.ndim - 1, -1, -1), mesh.axis_names):
      if leaf.shape[i] % mesh.shape[axis] == 0:
        spec[i] = axis
    return NamedSharding(mesh, PartitionSpec(*spec))
  return jax.tree.map(one, state)


def _bits(leaf):
  leaf = np.asarray(leaf)
  return leaf.dtype, leaf.shape, leaf.tobytes()


def _assert_same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for path, leaf in jax.tree_util.tree_leaves_with_path(left):
    other = dict(jax.tree_util.tree_leaves_with_path(right))[path]
    assert _bits(leaf) == _bits(other), jax.tree_util.keystr(path)


EXPERIENCE = {'tokens': np.arange(12, dtype=np.int32).reshape(3, 4), 'on_policy': np.bool_(True),
              'input:advantages': np.asarray([0.5, np.nan, -1.0], np.float32),
              'nested': {'a.b/c': np.asarray([1.5, 2.5], jnp.bfloat16)}}


@pytest.mark.parametrize('asynchronous', [True, False])
def test_round_trip_is_equal_to_the_bit(tmp_path, asynchronous):
  state = _state()
  metadata = {'position': [1, 2], 'config_hash': 'ab', 'nested': {'x': None, 'y': 0.1}}
  with checkpoint.Checkpointer(tmp_path, keep=2, asynchronous=asynchronous) as saver:
    assert saver.save(7, state, metadata)
    if not asynchronous:
      assert (tmp_path / '7' / 'inventory.json').is_file()
  with checkpoint.Checkpointer(tmp_path, keep=2) as saver:
    assert saver.latest() == (7, metadata)
    restored = saver.restore(state)
  assert restored.step == 7 and restored.metadata == metadata and restored.experience is None
  _assert_same(restored.arrays, state)


def test_experience_comes_back_without_a_target_and_may_come_and_go(tmp_path):
  state = _state()
  with checkpoint.Checkpointer(tmp_path, keep=3) as saver:
    saver.save(1, state, {}, experience=EXPERIENCE)
    saver.wait()
    restored = saver.restore(state)
    _assert_same(restored.experience, jax.tree.map(np.asarray, EXPERIENCE))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(restored.experience))
    saver.save(2, state, {})
    assert saver.restore(state).experience is None
    saver.save(3, state, {}, experience={'tokens': np.zeros((1, 2), np.int32)})
    assert saver.restore(state).experience['tokens'].shape == (1, 2)


@pytest.mark.parametrize('before,after', [
    (dict(data=2, fsdp=2, tensor=2), dict(data=2, fsdp=2, tensor=2)),
    (dict(data=2, fsdp=2, tensor=2), dict(fsdp=8)),
    (dict(fsdp=8), dict(fsdp=2)),
    (dict(fsdp=4), dict(fsdp=1)),
    (dict(fsdp=1), dict(data=2, fsdp=4)),
])
def test_restores_onto_any_mesh(tmp_path, before, after):
  state = _state(_mesh(**before))
  shardings = _shardings(state, _mesh(**after))
  target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                        state, shardings)
  with checkpoint.Checkpointer(tmp_path, keep=1) as saver:
    saver.save(1, state, {})
    restored = saver.restore(target).arrays
  _assert_same(restored, state)
  assert jax.tree.map(lambda x: x.sharding, restored) == shardings


@pytest.mark.parametrize('mesh', [None, dict(fsdp=8), dict(data=4, fsdp=2)])
def test_arrays_may_be_donated_and_overwritten_right_after_save(tmp_path, mesh):
  mesh = mesh and _mesh(**mesh)
  state = _state(mesh)
  big = jnp.arange(1 << 20, dtype=jnp.float32)  # large enough to be written after save returns
  if mesh is not None:
    big = jax.device_put(big, NamedSharding(mesh, PartitionSpec(mesh.axis_names[-1])))
  host = np.ones((1 << 18,), np.float32)
  experience = {'tokens': np.full((1 << 18,), 5, np.int32)}
  tree = {'state': state, 'big': big, 'host': host}
  expected = jax.tree.map(np.array, tree)
  overwrite = jax.jit(lambda t: jax.tree.map(lambda x: jnp.zeros_like(x), t), donate_argnums=0)
  with checkpoint.Checkpointer(tmp_path, keep=1) as saver:
    saver.save(1, tree, {}, experience=experience)
    device = overwrite({'state': tree['state'], 'big': tree['big']})
    for _ in range(5):
      device = overwrite(device)
    host[:] = -1
    experience['tokens'][:] = -1
    jax.block_until_ready(device)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)
    restored = saver.restore(target)
  _assert_same(restored.arrays, expected)
  assert (restored.experience['tokens'] == 5).all()


def test_keeps_the_newest_and_the_multiples(tmp_path):
  state = {'a': jnp.zeros(3)}
  with checkpoint.Checkpointer(tmp_path, keep=2, keep_every_steps=4) as saver:
    for step in range(1, 11):
      assert saver.save(step, state, {'step': step})
    saver.wait()
    assert saver.steps() == [4, 8, 9, 10]
    assert not saver.save(10, {'a': jnp.ones(3)}, {'step': -1})  # stays as it is
    assert saver.restore(state).metadata == {'step': 10}
  assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ['10', '4', '8', '9']


def test_an_empty_folder_restores_nothing(tmp_path):
  with checkpoint.Checkpointer(tmp_path / 'new', keep=1) as saver:
    assert saver.latest() is None
    assert saver.restore({'a': jnp.zeros(3)}) is None
    assert saver.steps() == []


@pytest.fixture(scope='module')
def two_checkpoints(tmp_path_factory):
  folder = tmp_path_factory.mktemp('checkpoints')
  with checkpoint.Checkpointer(folder, keep=3) as saver:
    saver.save(1, _state(seed=1), {'step': 1}, experience=EXPERIENCE)
    saver.save(2, _state(seed=2), {'step': 2}, experience=EXPERIENCE)
  return folder


def _matches(folder, pattern):
  return [p for p in sorted(folder.glob(pattern)) if p.is_file()]


def _delete(path):
  path.unlink()


def _cut(path):
  path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def _empty(path):
  path.write_bytes(b'')


def _zeros(path):
  path.write_bytes(bytes(path.stat().st_size))


def _remove_folder(path):
  shutil.rmtree(path.parent)


# tensorstore answers a second reader of a damaged file after orbax has closed its event loop.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('inventory', [True, False], ids=['inventory', 'no_inventory'])
@pytest.mark.parametrize('damage', [_delete, _cut, _empty, _zeros, _remove_folder])
@pytest.mark.parametrize('pattern', [
    'arrays/_METADATA', 'arrays/manifest.ocdbt', 'arrays/d/*', 'experience/d/*', 'record/*'])
def test_a_torn_newest_checkpoint_falls_back(tmp_path, two_checkpoints, pattern, damage,
                                             inventory, caplog):
  folder = tmp_path / 'copy'
  shutil.copytree(two_checkpoints, folder)
  victims = _matches(folder / '2', pattern)
  assert victims
  damage(victims[-1])
  if not inventory:
    (folder / '2' / 'inventory.json').unlink()
  logging.getLogger('absl').propagate = True
  with checkpoint.Checkpointer(folder, keep=3) as saver:
    with caplog.at_level(logging.WARNING):
      restored = saver.restore(_state())
    assert restored.step == 1 and restored.metadata == {'step': 1}
    _assert_same(restored.arrays, _state(seed=1))
    _assert_same(restored.experience, jax.tree.map(np.asarray, EXPERIENCE))
    assert f'{folder}/2 cannot be read' in caplog.text
    # Training goes on from step 1 and comes to step 2 again: it takes the torn one's place.
    assert saver.save(2, _state(seed=3), {'step': 2})
    _assert_same(saver.restore(_state()).arrays, _state(seed=3))


def test_the_message_names_the_file(tmp_path, two_checkpoints, caplog):
  folder = tmp_path / 'copy'
  shutil.copytree(two_checkpoints, folder)
  victim = max(_matches(folder / '2', 'arrays/d/*'), key=lambda p: p.stat().st_size)
  size = victim.stat().st_size
  victim.write_bytes(victim.read_bytes()[:-1])
  with checkpoint.Checkpointer(folder, keep=3) as saver:
    with caplog.at_level(logging.WARNING):
      assert saver.latest() == (1, {'step': 1})
  assert f'arrays/d/{victim.name} has {size - 1} of {size} bytes' in caplog.text


def test_two_torn_checkpoints_fall_back_twice_and_three_are_an_error(tmp_path):
  state = {'a': jnp.arange(5)}
  with checkpoint.Checkpointer(tmp_path, keep=3) as saver:
    for step in (1, 2, 3):
      saver.save(step, state, {'step': step})
  for step in ('2', '3'):
    shutil.rmtree(tmp_path / step / 'arrays')
  with checkpoint.Checkpointer(tmp_path, keep=3) as saver:
    assert saver.restore(state).step == 1
  shutil.rmtree(tmp_path / '1' / 'record')
  with checkpoint.Checkpointer(tmp_path, keep=3) as saver:
    with pytest.raises(config.UserError, match=r'no checkpoint can be read \(tried 3, 2, 1\)'):
      saver.restore(state)
  assert (tmp_path / '3').is_dir()  # nothing is removed when nothing could be read


@pytest.mark.parametrize('change,words', [
    (lambda t: {**t, 'b': t['b'][:2]}, r'b is float32\[3\], expected float32\[2\]'),
    (lambda t: {**t, 'b': t['b'].astype(jnp.bfloat16)}, r'b is float32\[3\], expected bfloat16'),
    (lambda t: {'a': t['a']}, 'b is saved but not expected'),
    (lambda t: {**t, 'c': {'d': t['b']}}, 'c/d is expected but not saved'),
])
def test_another_tree_is_refused_by_name(tmp_path, change, words):
  tree = {'a': jnp.zeros((2, 2), jnp.int32), 'b': jnp.zeros(3)}
  with checkpoint.Checkpointer(tmp_path, keep=2) as saver:
    saver.save(1, tree, {})
    saver.save(2, tree, {})
    with pytest.raises(config.UserError, match=words):
      saver.restore(change(tree))
    assert saver.restore(tree).step == 2  # a wrong target is no damage


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_falling_back_may_mean_another_structure(tmp_path):
  first, second = {'a': jnp.arange(500.0)}, {'b': jnp.arange(700.0)}
  with checkpoint.Checkpointer(tmp_path, keep=2) as saver:
    saver.save(1, first, {'stage': 0})
    saver.save(2, second, {'stage': 1})
    restored = saver.restore(lambda metadata: [first, second][metadata['stage']])
    assert restored.step == 2 and restored.arrays.keys() == {'b'}
  for path in _matches(tmp_path / '2', 'arrays/d/*'):
    _zeros(path)  # which no file size tells
  with checkpoint.Checkpointer(tmp_path, keep=2) as saver:
    assert saver.latest() == (2, {'stage': 1})
    restored = saver.restore(lambda metadata: [first, second][metadata['stage']])
    assert restored.step == 1 and restored.metadata == {'stage': 0}
    _assert_same(restored.arrays, first)
    assert saver.latest() == (1, {'stage': 0})  # what was found damaged stays known


def test_metadata_that_json_cannot_hold_fails_in_the_caller(tmp_path):
  with checkpoint.Checkpointer(tmp_path, keep=2) as saver:
    with pytest.raises(TypeError):
      saver.save(1, {'a': jnp.zeros(3)}, {'x': object()})
    assert saver.steps() == []


class _FullDisk(checkpoint.Checkpointer):
  """Runs out of space at the end of a write, in orbax's thread."""
  full = False

  def _write_inventory(self):
    if self.full:
      raise OSError(28, 'No space left on device')
    super()._write_inventory()


def test_a_failed_write_is_reported_and_the_checkpoint_before_stays(tmp_path):
  state = {'a': jnp.zeros(3)}
  with _FullDisk(tmp_path, keep=1) as saver:
    saver.save(1, state, {})
    saver.wait()
    saver.full = True
    saver.save(2, state, {})
    with pytest.raises(OSError, match='No space left'):
      saver.wait()
    assert saver.steps() == [1]
    assert saver.restore(state).step == 1
    saver.full = False
    assert saver.save(2, state, {})
    assert saver.restore(state).step == 2
