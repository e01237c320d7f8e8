"""Whether a function of [B, T] arrays treats each token by itself, and if so its form for a few.

The derivative of most losses with respect to a token's log-prob depends on that log-prob and on
data alone, not on other tokens. The head can then have it while it has the token's logits, and
need not make them a second time in the backward pass (`head.score`). Whether a loss is of that
kind is read off its program, so losses stay plain functions of whole batches.
"""

from typing import Any, NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp

# What keeps positions apart, whatever the shape.
_ELEMENTWISE = frozenset("""
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type
    copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow
    is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or pow rem round
    rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh xor""".split())
# What says where an array lies, and leaves it as it is.
_PLACEMENTS = frozenset({'reshard', 'sharding_constraint', 'pvary'})
# Calls, to be looked into: the name of the parameter that holds the program.
_CALLS = {'jit': 'jaxpr', 'pjit': 'jaxpr', 'closed_call': 'call_jaxpr', 'remat2': 'jaxpr',
          'checkpoint': 'jaxpr', 'custom_jvp_call': 'call_jaxpr', 'custom_vjp_call': 'call_jaxpr'}


class PerToken(NamedTuple):
  """A function of whole arrays, ready to be asked for some of their positions.

  `apply(values, arrays, scalars)` returns its results at those positions: `values` holds the
  arguments and `arrays` the entries of `PerToken.arrays` there, all of one shape.
  """
  apply: Any
  arrays: list  # [B, T] each; known before the arguments are
  scalars: list  # [] each

  def __call__(self, values):
    return self.apply(values, self.arrays, self.scalars)


class _Known(NamedTuple):
  value: Any
  scalar: Any = None  # what every element of `value` is, where that is known to be one number


class _Later(NamedTuple):
  """Depends on the arguments, position by position."""
  place: int  # in the list of what `apply` computes


_MIXED = object()  # depends on the arguments of several positions


def constant(results):
  """The PerToken of {name: array} that are known already."""
  names = tuple(results)
  return PerToken(lambda values, arrays, scalars: dict(zip(names, arrays)),
                  [results[name] for name in names], [])


def split(function, values, *, mixed=()):
  """Splits `function` into what is known without its arguments and what is done per token.

  Args:
    function: {name: [B, T]} -> {name: [B, T]}; traced once.
    values: {name: [B, T]}, read for their shapes and types alone; all of one shape.
    mixed: names of arguments that no result may depend on; `apply` does without them.
  Returns:
    PerToken, or None where a result depends on the arguments at other positions than its own.
  """
  names = tuple(values)
  closed, out_shape = jax.make_jaxpr(
      lambda *arrays: function(dict(zip(names, arrays))), return_shape=True)(*values.values())
  program = _Program(names, next(iter(values.values())).shape)
  results = program.run(closed.jaxpr, closed.consts, [
      _MIXED if name in mixed else _Later(i) for i, name in enumerate(names)])
  if any(x is _MIXED for x in results):
    return None
  return program.finish(results, jax.tree.structure(out_shape))


class _Program:
  """The operations to be done per token, in order, and the values they read."""

  def __init__(self, names, shape):
    self._names, self._shape = names, shape
    self._operations = []  # (primitive, params, operands)
    self._arrays, self._scalars = [], []

  def run(self, jaxpr, consts, args):
    """Evaluates what is known and notes the rest; returns a _Known, _Later or _MIXED per result."""
    found = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*map(_known, consts), *args]))
    read = lambda atom: _known(atom.val) if isinstance(atom, core.Literal) else found[atom]
    for eqn in jaxpr.eqns:
      results = self._one(eqn, [read(atom) for atom in eqn.invars])
      found.update(zip(eqn.outvars, results))
    return [read(atom) for atom in jaxpr.outvars]

  def _one(self, eqn, args):
    name = eqn.primitive.name
    if name in _CALLS:
      inner = eqn.params[_CALLS[name]]
      jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, 'consts') else (inner, ())
      return self.run(jaxpr, consts, args)
    if name in _PLACEMENTS:
      return args[:1]
    if all(isinstance(x, _Known) for x in args):
      results = eqn.primitive.bind(*(x.value for x in args), **eqn.params)
      if name == 'broadcast_in_dim' and not jnp.ndim(args[0].value):
        return [_Known(results, args[0].value)]
      return [_known(x) for x in (results if eqn.primitive.multiple_results else [results])]
    if (name not in _ELEMENTWISE or any(x is _MIXED for x in args)
        or eqn.outvars[0].aval.shape != self._shape):
      return [_MIXED] * len(eqn.outvars)
    self._operations.append((eqn.primitive, eqn.params, [self._operand(x) for x in args]))
    return [_Later(len(self._names) + len(self._operations) - 1)]

  def _operand(self, x):
    """Where `apply` finds an operand: ('later' | 'array' | 'number' | 'scalar', place)."""
    if isinstance(x, _Later):
      return 'later', x.place
    if x.scalar is None:  # [B, T], or [B, 1] and the like, which operations spread out themselves
      whole = x.value if x.value.shape == self._shape else jnp.broadcast_to(x.value, self._shape)
      return 'array', _place(self._arrays, whole)
    kind = 'number' if jnp.ndim(x.value) else 'scalar'  # an array of one number, or the number
    return kind, _place(self._scalars, x.scalar)

  def finish(self, results, treedef):
    outputs = [self._operand(x) for x in results]
    operations = self._needed(outputs)

    def apply(values, arrays, scalars):
      found = {place: values[name] for place, name in enumerate(self._names) if name in values}
      shape = next(iter(found.values())).shape
      def read(operand):
        kind, place = operand
        if kind == 'later':
          return found[place]
        if kind == 'array':
          return arrays[place]
        return scalars[place] if kind == 'scalar' else jnp.broadcast_to(scalars[place], shape)
      for place, (primitive, params, operands) in operations:
        found[place] = primitive.bind(*map(read, operands), **params)
      return treedef.unflatten([read(operand) for operand in outputs])
    return PerToken(apply, self._arrays, [jnp.asarray(x) for x in self._scalars])

  def _needed(self, outputs):
    """The operations that lead to `outputs`: [(place, operation)]."""
    wanted, kept = {place for kind, place in outputs if kind == 'later'}, []
    for place, operation in reversed(list(enumerate(self._operations, len(self._names)))):
      if place in wanted:
        kept.append((place, operation))
        wanted |= {place for kind, place in operation[2] if kind == 'later'}
    return kept[::-1]


def _known(value):
  return _Known(value, value if jnp.ndim(value) == 0 else None)


def _place(held, value):
  for place, other in enumerate(held):
    if other is value:
      return place
  held.append(value)
  return len(held) - 1
