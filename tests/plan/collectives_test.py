"""Collectives counted in compiled programs, and in each way in which XLA writes them."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from ptjax import sharding
from ptjax.plan import collectives


def received(function, *shapes, **options):
  return collectives.bytes_received(
      jax.jit(function, **options).lower(*shapes).compile().as_text())


def struct(shape, mesh, *spec):
  return jax.ShapeDtypeStruct(
      shape, np.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def test_a_gather_brings_all_parts_but_ones_own():
  mesh = sharding.make_mesh('fsdp=8')
  found = received(lambda x: x, struct((8, 100), mesh, 'fsdp'),
                   out_shardings=NamedSharding(mesh, PartitionSpec()))
  assert found == {'all-gather': 7 * 100 * 4}


def test_a_sum_in_a_loop_counts_as_often_as_the_loop_runs():
  mesh = sharding.make_mesh('data=2,fsdp=4')

  @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec('fsdp'),
                     out_specs=PartitionSpec('fsdp'))
  def program(x):
    turn = lambda y, _: (y + lax.psum(y, 'fsdp'), None)
    inner = lambda y, _: lax.scan(turn, y, None, length=5)
    return lax.scan(inner, x, None, length=3)[0]
  found = received(program, struct((4, 100), mesh, 'fsdp'))
  assert found == {'all-reduce': 15 * 2 * 3 / 4 * 400}


def test_a_program_on_one_device_sends_nothing():
  assert received(lambda x: jnp.sum(x @ x), jax.ShapeDtypeStruct((8, 8), np.float32)) == {}


@pytest.mark.parametrize('line, kind, size', [
    ('%a = f32[10,4]{1,0} all-gather(%x), replica_groups={{0,1},{2,3}}', 'all-gather', 80),
    ('%a = bf16[10,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[8]', 'all-gather', 60),
    ("%a = (f32[10]{0}, /*index=1*/f32[]) all-reduce(%x, %y), "
     "replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 'all-reduce', 2 * 7 / 8 * 40),
    ("%a = f32[10,4]{1,0} all-gather(%x), replica_groups=mesh['a'=8,'b'=2] {'b','a':(2)4}",
     'all-gather', 140),
    ('%a = f32[5]{0} reduce-scatter(%x), replica_groups=[1,8]<=[8]', 'reduce-scatter', 140),
    ('ROOT %a = (f32[5]{0}, f32[10]{0}) all-gather-start(%x), replica_groups=[4,2]<=[8]',
     'all-gather', 20),
    ('%a = f32[5]{0} collective-permute(%x), source_target_pairs={{0,1}}', 'collective-permute',
     20),
])
def test_every_notation_is_read(line, kind, size):
  text = f'ENTRY %main (x: f32[5]) -> f32[5] {{\n  {line}, dimensions={{0}}\n}}\n'
  assert collectives.bytes_received(text) == {kind: size}


@pytest.mark.parametrize('groups, devices', [
    ('replica_groups={{0,4},{1,5}}', [0, 4]), ('replica_groups=[2,4]<=[8]', [0, 1, 2, 3]),
    ('replica_groups=[4,2]<=[2,4]T(1,0)', [0, 4]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
    ("replica_groups=mesh['a'=8,'b'=2] {'a':(2)4}", [0, 2, 4, 6]),
    ("replica_groups=mesh['a'=8,'b'=2] {'a':(1)2}", [0, 8]),
    ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", [0, 1, 2, 3]),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([8]) {'b','a'}", [0, 1, 2, 3, 4, 5, 6, 7]),
    ('source_target_pairs={{0,7},{7,0}}', [0, 7]),
    ('replica_groups={}', list(range(8)))])
def test_who_takes_part_is_read(groups, devices):
  line = f'%a = f32[5]{{0}} all-gather(%x), {groups}'
  assert collectives._group(line, 8).tolist() == devices


@pytest.mark.parametrize('header, devices', [
    ('HloModule jit_f, is_scheduled=true, replica_count=2, num_partitions=4', 8),
    ('HloModule jit_f, num_partitions=4', 4), ('HloModule jit_f', 1)])
def test_a_group_of_all_is_of_as_many_as_the_program_runs_on(header, devices):
  text = (f'{header}\n\nENTRY %main (x: f32[5]) -> f32[5] {{\n'
          '  %a = f32[10]{0} all-reduce(%x), channel_id=1, replica_groups={}, to_apply=%add\n}\n')
  assert collectives.bytes_received(text) == {'all-reduce': 2 * (devices - 1) / devices * 40}
  assert bool(collectives.bytes_received(text, within=4)) == (devices <= 4)


def test_neighbours_are_told_apart():
  mesh = sharding.make_mesh('fsdp=4,tensor=2')
  both = lambda x, y: (lax.psum(x, 'tensor'), lax.psum(y, 'fsdp'))
  program = jax.shard_map(
      both, mesh=mesh, in_specs=(PartitionSpec('tensor'), PartitionSpec('fsdp')),
      out_specs=(PartitionSpec(), PartitionSpec()))
  text = jax.jit(program).lower(
      struct((2, 100), mesh, 'tensor'), struct((4, 100), mesh, 'fsdp')).compile().as_text()
  among_two, among_four = 2 * 1 / 2 * 400, 2 * 3 / 4 * 400
  assert collectives.bytes_received(text) == {'all-reduce': among_two + among_four}
  assert collectives.bytes_received(text, within=2) == {'all-reduce': among_two}
  assert collectives.bytes_received(text, within=8) == {'all-reduce': among_two + among_four}
