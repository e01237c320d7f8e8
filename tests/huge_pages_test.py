"""Huge pages: asked for where they are to be had, once, and before anything else."""

import os
import subprocess
import sys

import pytest

from ptjax import huge_pages

ASKED = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
HERE = 'glibc 2.36', 'always [madvise] never'


@pytest.mark.parametrize('given, libc, setting, expected', [
    ({}, *HERE, ASKED),
    ({'GLIBC_TUNABLES': 'a.b=1'}, *HERE, {'GLIBC_TUNABLES': 'a.b=1:glibc.malloc.hugetlb=1'}),
    (ASKED, *HERE, {}),  # or it would start anew for ever
    ({'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=0'}, *HERE, {}),
    ({}, 'glibc 2.34', HERE[1], {}),
    ({}, '', HERE[1], {}),
    ({}, HERE[0], '[always] madvise never', {}),
    ({}, HERE[0], 'always madvise [never]', {}),
    ({}, HERE[0], '', {}),
])
def test_what_is_asked_for(given, libc, setting, expected):
  assert huge_pages.environment(given, libc, setting) == expected


def test_a_restart_keeps_process_and_arguments():
  """The program as it was called, its arguments too, in the same process."""
  code = (
      'import os, sys; from ptjax import huge_pages; huge_pages._libc = lambda: "glibc 2.36"; '
      'huge_pages._read = lambda path: "[madvise]"; print(os.getpid()); huge_pages.restart(); '
      'print(sys.argv[1:], os.environ["GLIBC_TUNABLES"])')
  environment = {name: x for name, x in os.environ.items() if name != 'GLIBC_TUNABLES'}
  shown = subprocess.run([sys.executable, '-u', '-c', code, 'a', 'b c'], env=environment,
                         capture_output=True, text=True, check=True).stdout.splitlines()
  first, second, said = shown
  assert first == second
  assert said == "['a', 'b c'] glibc.malloc.hugetlb=1"
