"""The mesh, the table, and the way of arrays onto the devices and back."""

import jax
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from ptjax import config as settings
from ptjax import sharding
from ptjax.models import hub
from ptjax.models import presets
from ptjax.training import state as training_state


@pytest.mark.parametrize('text, sizes', [
    ('', (1, 8, 1)), ('data=2,fsdp=2,tensor=2', (2, 2, 2)), ('tensor=4,fsdp=-1', (1, 2, 4)),
    ('data=8', (8, 1, 1)),
])
def test_mesh_sizes(text, sizes):
  assert tuple(sharding.make_mesh(text).shape.values()) == sizes


@pytest.mark.parametrize('text, message', [
    ('model=8', "unknown axis 'model'"), ('fsdp=four', 'not axis=size'),
    ('fsdp=4', 'multiply to 4, but there are 8'), ('fsdp=-1,data=-1', 'one of them may be -1'),
    ('fsdp=-1,tensor=3', 'there are 8 devices'), ('fsdp=0', 'must be positive'),
])
def test_bad_meshes(text, message):
  with pytest.raises(settings.UserError, match=message):
    sharding.make_mesh(text)


def test_the_table_covers_every_matrix_and_its_moments():
  mesh = sharding.make_mesh('data=2,fsdp=2,tensor=2')
  for name in presets.names():
    shapes = hub.param_shapes(presets.get(name))
    state = training_state.shardings(mesh, shapes, optax.adamw(1e-3))
    flat = lambda tree: dict(jax.tree_util.tree_leaves_with_path(tree))
    params = flat(state.params)
    for path, leaf in flat(shapes).items():
      axes = {a for a in params[path].spec if a}
      large = leaf.ndim >= 2 and 'norm' not in str(path) and 'bias' not in str(path)
      if large and 'position' not in str(path):
        expected = {'fsdp', 'tensor'}
        if name.startswith('gpt2') and 'embed' in str(path):
          expected = {'fsdp'}  # 50257 rows do not split in two
        assert axes == expected, (name, path, params[path].spec)
    moments = [leaf.mu for leaf in jax.tree.leaves(
        state.opt_state, is_leaf=lambda x: hasattr(x, 'mu')) if hasattr(leaf, 'mu')]
    assert len(moments) == 1 and moments[0] == state.params


def test_a_dimension_that_does_not_divide_stays_whole():
  mesh = sharding.make_mesh('fsdp=2,tensor=4')
  shapes = {'embed': {'embedding': jax.ShapeDtypeStruct((50257, 768), np.float32)}}
  found = sharding.tree_sharding(mesh, shapes)['embed']['embedding'].spec
  assert found == PartitionSpec(None, 'fsdp')


def test_put_and_fetch_are_inverse():
  mesh = sharding.make_mesh('data=2,fsdp=4')
  tree = {'a': np.arange(16, dtype=np.int32).reshape(8, 2), 'b': np.ones((8, 3), np.float32)}
  placed = sharding.put(tree, sharding.batch(mesh))
  assert placed['a'].sharding.shard_shape((8, 2)) == (1, 2)
  for name, value in sharding.fetch(placed).items():
    np.testing.assert_array_equal(value, tree[name])


def test_local_rows_cover_everything_once():
  assert sharding.local_rows(7) == slice(0, 7)  # one process
