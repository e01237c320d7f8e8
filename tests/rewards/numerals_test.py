"""Numbers are read as people write them, exactly and at any length."""

import decimal

from hypothesis import given
from hypothesis import strategies as st
import pytest

from ptjax.rewards import numerals


@pytest.mark.parametrize('text, expected', [
    ('72', '72'), (' 72 ', '72'), ('72.00', '72'), ('007', '7'), ('-0', '0'), ('+5', '5'),
    ('1,234', '1234'), ('$1,234.50', '1234.5'), ('-$5', '-5'), ('$-5', '-5'), ('\\$32', '32'),
    ('5.', '5'), ('.5', '0.5'), ('\u22127', '-7'),
    ('1,23', None), ('1,2,3', None), ('1 2', None), ('5%', None), ('1/2', None), ('1e5', None),
    ('', None), ('--5', None), ('seven', None), ('\u0663', None), ('1.2.3', None),
])
def test_canonical_spelling(text, expected):
  assert numerals.canonical(text) == expected


@pytest.mark.parametrize('text, expected', [
    ('12-7', '7'), ('x=-5', '-5'), ('a-5', '5'), ('3 - 5', '5'), ('is $1,234.50.', '$1,234.50'),
    ('1,2,3', '3'), ('1234,567', '567'), ('3.14.', '3.14'), ('a .5 b', '.5'), ('none', None),
    ('', None), ('72 \U0001f600 eggs', '72'),
])
def test_last_number(text, expected):
  assert numerals.last_number(text) == expected


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6))
def test_canonical_agrees_with_decimal(number):
  spelled = numerals.canonical(f'{number:f}')
  assert decimal.Decimal(spelled) == number
  assert numerals.canonical(f'{number:,f}') == spelled
  assert numerals.canonical(spelled) == spelled


def test_a_million_digits_are_one_number():
  digits = '9' * 1_000_000
  assert numerals.last_number('so ' + digits) == digits
  assert numerals.canonical('000' + digits + '.0') == digits
