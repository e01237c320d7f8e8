"""Sizes go to a worker and into a model and come back, tables line up, a model's words are read."""

import argparse
import dataclasses
import pathlib
import sys

import pytest
import transformers

from ptjax.models import hub
from ptjax.models import presets

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / 'scripts'))
import bench_common

TINY = bench_common.Sizes(layers=1, width=16, heads=2, kv_heads=1, mlp=32, vocab=50)


@dataclasses.dataclass(frozen=True)
class Job(bench_common.Sizes):
  width: int = 64
  kind: str = 'a'
  rate: float = 1e-4


def parsed(argv, **options):
  parser = argparse.ArgumentParser()
  Job.add_flags(parser, **options)
  return Job.parsed(parser.parse_args(argv))


def test_fields_survive_a_command_line():
  job = Job(layers=3, kind='b', rate=3e-7)
  assert parsed(job.flags()) == job and parsed([]) == Job()
  with pytest.raises(SystemExit):
    parsed(['--kind=b'], choices={'kind': ('a', 'c')})


def test_sizes_are_those_of_the_model():
  model = presets.get('tiny', **TINY.model_fields())
  assert (model.num_layers, model.width, model.mlp_width, model.vocab_size) == (1, 16, 32, 50)
  assert (model.num_heads, model.num_kv_heads) == (2, 1)
  assert Job(rate=0.5).of_model(model) == Job(**dataclasses.asdict(TINY), rate=0.5)


def test_a_table_lines_up_and_shows_what_is_missing():
  header, *lines = bench_common.table(
      [{'name': 'a', 'seconds': 1.26}, {'name': 'bb', 'seconds': None}], {'s': ('seconds', '.1f')},
      name=4, cell=6)
  assert [header, *lines] == ['         s', 'a      1.3', 'bb       -']


@pytest.mark.slow
def test_a_written_model_reads_words(tmp_path):
  folder = bench_common.write_model(tmp_path / 'model', num_labels=1, **TINY.model_fields())
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  assert tokenizer('w0 w46 w47')['input_ids'] == [3, 49, 2]
  found = hub.load_config(folder)
  assert TINY.of_model(found) == TINY and found.num_labels == 1
