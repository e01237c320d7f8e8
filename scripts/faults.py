"""The faults that `mutate_losses.py` plants: one expression of a source file put for another."""

import ast
import copy
import dataclasses
import re

# (file, the source line it begins on, `before`, why no test can see it).
EQUIVALENT = (
    ('reward_model.py', "return mean(losses), {'accuracy': jax.lax.stop_gradient(mean(right))}",
     'jax.lax.stop_gradient(mean(right))', 'a comparison has no gradient'),
    ('likelihood.py', 'probe = record.add(name, jax.lax.stop_gradient(pieces))',
     'jax.lax.stop_gradient(pieces)', 'an auxiliary output, which nothing differentiates'),
    ('modifiers.py',
     'return jax.lax.stop_gradient(denominator.sequence(old, rollout, loss_mask)[:, 0])', '0',
     'every token of a sequence holds the same number'),
    ('advantage.py', 'return ~_tied(masking.in_groups(rewards, group_size))[:, 0]', '0',
     'there is one column, and JAX clamps an index beyond it'),
    ('preference_gap.py', 'bounds.two_rows(chosen, WHOLE_BATCH)', 'chosen',
     'both sides have been checked to have one shape'),
    ('stabilization.py',
     'most = max(int(fraction * scores.size), 1)  # static, and no smaller than count', '1',
     'a static size; of what is taken, the count decides what counts'),
    ('reward_model.py', 'margins = bounds.per_row(chosen.shape, chosen.dtype, margins=margins)',
     'chosen', 'both sides have been checked to have one shape and dtype'),
)


@dataclasses.dataclass(frozen=True)
class Mutant:
  """One fault: the bytes [start, end) of a file replaced."""
  path: str  # from the root
  line: int
  function: str
  kind: str
  before: str
  after: str
  start: int
  end: int
  text: str  # the source line it begins on

  def __str__(self):
    return f'{self.path}:{self.line} {self.kind}: {self.before} -> {self.after}'

  @property
  def equivalent(self):
    for path, text, before, reason in EQUIVALENT:
      if self.path.endswith(path) and (self.text, self.before) == (text, before):
        return reason
    return ''


# Faults: each yields `(kind, replacement)` for an expression node.

_SWAPS = {'token_mean': 'sequence_mean', 'sequence_mean': 'token_mean',
          'sequence_sum': 'sequence_mean', 'sum': 'mean', 'mean': 'sum', 'minimum': 'maximum',
          'maximum': 'minimum', 'min': 'max', 'max': 'min', 'argmin': 'argmax', 'argmax': 'argmin'}
_REDUCTIONS = ('token_mean', 'sequence_mean', 'sequence_sum')
_OPPOSITE = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
             ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE, ast.Eq: ast.NotEq,
             ast.NotEq: ast.Eq}
_SIDES = re.compile(r'^(chosen|rejected)(?=_|$)')


def _changed(node, **fields):
  node = copy.copy(node)
  for name, value in fields.items():
    setattr(node, name, value)
  return node


def _other_side(name):
  return _SIDES.sub(lambda m: 'rejected' if m[1] == 'chosen' else 'chosen', name)


def _is_number(node):
  return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _of_operators(node):
  if isinstance(node, ast.BinOp):
    if any(isinstance(x, (ast.Tuple, ast.List, ast.JoinedStr)) or (
        isinstance(x, ast.Constant) and not _is_number(x)) for x in (node.left, node.right)):
      return
    if type(node.op) in _OPPOSITE:
      kind = 'flip a sign' if isinstance(node.op, (ast.Add, ast.Sub)) else 'change the mask'
      yield kind, _changed(node, op=_OPPOSITE[type(node.op)]())
    elif isinstance(node.op, ast.Mult):
      yield 'drop a factor', node.left
      yield 'drop a factor', node.right
    elif isinstance(node.op, (ast.Div, ast.Pow)):
      yield 'drop a factor', node.left
  elif isinstance(node, ast.UnaryOp):
    if isinstance(node.op, ast.USub):
      yield 'flip a sign', node.operand
    elif isinstance(node.op, ast.Invert):
      yield 'change the mask', node.operand
  elif isinstance(node, ast.Compare) and type(node.ops[0]) in _OPPOSITE:
    yield '< to >', _changed(node, ops=[_OPPOSITE[type(node.ops[0])](), *node.ops[1:]])


def _of_calls(node):
  if not isinstance(node, ast.Call):
    return
  name = node.func.attr if isinstance(node.func, ast.Attribute) else ''
  if name == 'stop_gradient':
    yield 'drop a stop_gradient', node.args[0]
  if name == 'where' and len(node.args) == 3:
    _, first, second = node.args
    yield 'forget the mask', second if isinstance(first, ast.Constant) else first
  if name in ('sort', 'relu', 'abs'):
    yield f'drop {name}', node.args[0]
  if name == 'clip':
    x, low, high = node.args
    yield 'swap bounds', _changed(node, args=[x, high, low])
  if name == 'cumsum':
    yield 'shift by one', _rolled(node)
  keywords = {k.arg: k for k in node.keywords}
  for low, high in (('clip_low', 'clip_high'), ('low', 'high')):
    if low in keywords and high in keywords:
      other = {low: keywords[high].value, high: keywords[low].value}
      yield 'swap bounds', _changed(node, keywords=[
          _changed(k, value=other.get(k.arg, k.value)) for k in node.keywords])
  for keyword in node.keywords:
    rest = [k for k in node.keywords if k is not keyword]
    if keyword.arg == 'where':
      yield 'forget the mask', _changed(node, keywords=rest)
    if keyword.arg == 'ddof':
      yield 'change ddof', _changed(node, keywords=rest)
    if name == 'clean':
      shifted = _changed(keyword, value=_rolled(keyword.value))
      yield 'shift by one', _changed(node, keywords=[
          shifted if k is keyword else k for k in node.keywords])


def _rolled(node):
  return ast.parse(f"__import__('jax').numpy.roll({ast.unparse(node)}, 1, -1)", mode='eval').body


def _of_names(node):
  if isinstance(node, ast.Attribute) and node.attr in _SWAPS:
    kind = ('swap a reduction' if node.attr in _REDUCTIONS else
            'sum for mean' if node.attr in ('sum', 'mean') else 'min for max')
    yield kind, _changed(node, attr=_SWAPS[node.attr])
  for field in ('attr', 'id'):
    name = getattr(node, field, '')
    if _SIDES.match(name):
      yield 'swap the sides', _changed(node, **{field: _other_side(name)})


def _of_numbers(node):
  if isinstance(node, ast.Constant) and type(node.value) is int:
    yield 'shift by one', ast.Constant(node.value + 1)


_SKIPPED_KEYWORDS = ('axis', 'keepdims', 'name', 'custom_message', 'exception_type', 'dtype')


def _expressions(node, function=''):
  """Yields (expression, outermost function's name) of all that computes, parents first."""
  if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)):
    return
  if isinstance(node, ast.keyword) and node.arg in _SKIPPED_KEYWORDS:
    return
  if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
    return  # a docstring
  if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and (
      node.value.attr == 'shape'):
    return
  if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
    function = function or node.name
  if isinstance(node, ast.expr) and not isinstance(getattr(node, 'ctx', None), ast.Store):
    yield node, function
  for child in ast.iter_child_nodes(node):
    yield from _expressions(child, function)


def _defaults(tree):
  """Yields (default, function name) of all numeric defaults."""
  for function in ast.walk(tree):
    if isinstance(function, ast.FunctionDef):
      for node in (*function.args.defaults, *function.args.kw_defaults):
        if _is_number(node):
          yield node, function.name


def mutants_of(root, path):
  """Every fault that can be put into one file, a list of Mutant."""
  source = (root / path).read_bytes()
  tree = ast.parse(source)
  starts = [0]
  lines = source.splitlines(keepends=True)
  for line in lines:
    starts.append(starts[-1] + len(line))
  found = []
  def add(node, function, kind, replacement):
    before, after = ast.unparse(node), ast.unparse(replacement)
    found.append(Mutant(
        path=path, line=node.lineno, function=function, kind=kind, before=before, after=after,
        start=starts[node.lineno - 1] + node.col_offset,
        end=starts[node.end_lineno - 1] + node.end_col_offset,
        text=lines[node.lineno - 1].decode().strip()))
  defaults = {id(node): (node, function) for node, function in _defaults(tree)}
  for node, function in defaults.values():
    add(node, function, 'change a default', ast.Constant(2 * node.value or 1.0))
  for node, function in _expressions(tree):
    if id(node) not in defaults:
      for faults in (_of_operators, _of_calls, _of_names, _of_numbers):
        for kind, replacement in faults(node):
          add(node, function, kind, replacement)
  return found
