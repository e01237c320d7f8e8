"""What the benchmarks share: sizes, worker processes that take turns, tables, and the machine.

Peers import it too, from environments of their own, so it needs nothing but Python.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
# Size of a model -> the field of TransformerConfig that it is.
_MODEL_FIELDS = {'layers': 'num_layers', 'width': 'width', 'heads': 'num_heads',
                 'kv_heads': 'num_kv_heads', 'mlp': 'mlp_width', 'vocab': 'vocab_size'}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of a model, each a flag; a benchmark adds fields of its own."""
  layers: int = 4
  width: int = 256
  heads: int = 4
  kv_heads: int = 2
  mlp: int = 1024
  vocab: int = 2048

  @classmethod
  def add_flags(cls, parser, *, choices=(), hidden=()):
    """Adds a flag per field to an ArgumentParser.

    Args:
      parser: argparse.ArgumentParser.
      choices: field -> what its flag may be.
      hidden: fields whose flags --help leaves out.
    """
    for field in dataclasses.fields(cls):
      parser.add_argument(f'--{field.name}', type=field.type, default=field.default,
                          choices=dict(choices).get(field.name),
                          help=argparse.SUPPRESS if field.name in hidden else None)

  @classmethod
  def parsed(cls, arguments):
    """Returns the fields as those flags say."""
    return cls(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(cls)})

  def flags(self):
    """The flags, for a worker's command line, that `parsed` reads the fields from."""
    return [f'--{name}={value}' for name, value in dataclasses.asdict(self).items()]

  def model_fields(self):
    """The sizes of the model as fields of TransformerConfig."""
    return {theirs: getattr(self, ours) for ours, theirs in _MODEL_FIELDS.items()}

  def of_model(self, model):
    """Returns these sizes with a TransformerConfig's in place of the model's."""
    return dataclasses.replace(
        self, **{ours: getattr(model, theirs) for ours, theirs in _MODEL_FIELDS.items()})


class Worker:
  """A side of a comparison in a process of its own, which answers in lines of JSON.

  Args:
    script: file beside this one, started with --worker.
    argv: further arguments.
    environment: variables on top of this process's.
    python: the interpreter; None: this one's.
  """

  def __init__(self, script, argv, environment=(), *, python=None):
    self._log = tempfile.TemporaryFile('w+')
    self._process = subprocess.Popen(
        [python or sys.executable, str(HERE / script), '--worker', *argv], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=self._log, text=True,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(HERE.parent), str(HERE)]),
             'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',  # a GPU is shared with the other side
             **dict(environment)})

  def read(self):
    """Returns the next line; raises SystemExit with what the worker said if it has ended."""
    line = self._process.stdout.readline()
    if not line:
      self._log.seek(0)
      raise SystemExit(f'{self._log.read()[-3000:]}\n'
                       f'the worker ended with code {self._process.wait()}')
    return json.loads(line)

  def ask(self, request=None):
    """Lets the worker do its work once more, on `request` (JSON); returns what it says of it."""
    try:
      self._process.stdin.write(json.dumps(request) + '\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # `read` tells why
    return self.read()

  def close(self):
    """Lets the worker end."""
    self._process.stdin.close()
    self._process.wait()

  def kill(self):
    """Ends the worker at once."""
    self._process.kill()
    self._process.wait()


class Turns:
  """The other end of a Worker: takes a request, works, answers, and waits for the next.

  Standard output, on which trainers print, becomes standard error.
  """

  def __init__(self):
    self._out = own_output()

  def wait(self):
    """Returns the next request; where none will come, ends the process at once."""
    line = sys.stdin.readline()
    if not line:
      os._exit(0)  # whatever threads a trainer has begun
    self._started, self._cpu = time.perf_counter(), time.process_time()
    return json.loads(line)

  def done(self, **values):
    """Answers the request with `values` and with what the work took, which is all computed."""
    seconds, cpu = time.perf_counter() - self._started, time.process_time() - self._cpu
    print(json.dumps({'seconds': seconds, 'cpu': cpu, 'peak_rss_mib': peak_rss_mib(), **values}),
          file=self._out, flush=True)


def own_output():
  """Returns standard output as a file of the caller's own; others' prints go to standard error."""
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  return out


def around_steps(batch, step):
  """Puts functions around what every stage of the launcher does at each step, from now on.

  Args:
    batch: `batch(stage_run, function) -> function`, for what makes a stage's batches.
    step: `step(function) -> function`, for a stage's train step.
  """
  from ptjax import stage_run
  run = stage_run.StageRun
  make_source, make_step = run.source, run.train_step

  def source(self):
    made = make_source(self)
    made.batch = batch(self, made.batch)
    return made
  run.source, run.train_step = source, lambda self: step(make_step(self))


def write_model(folder, *, family='llama', stop_ids=None, seed=0, **shape):
  """Writes a model directory: random weights, and a tokenizer whose tokens are words.

  Args:
    folder: where to.
    family: llama, or qwen2, whose directories `transformers` gives Qwen's own tokenizer, whatever
      is there.
    stop_ids: token ids that end a completion; None: the tokenizer's end token, id 1.
    seed: of the weights.
    **shape: fields of TransformerConfig in which it differs from the preset `tiny`.
  Returns:
    `folder`, as a string.
  """
  import jax
  import tokenizers
  import transformers

  from ptjax.models import hub
  from ptjax.models import presets
  from ptjax.models import transformer
  model = presets.get('tiny', family=family, qkv_bias=family == 'qwen2', **shape)
  words = ['<pad>', '<eos>', '<unk>', *(f'w{i}' for i in range(model.vocab_size - 3))]
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(
      {word: i for i, word in enumerate(words)}, unk_token='<unk>'))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, pad_token='<pad>', eos_token='<eos>', unk_token='<unk>')
  params = jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(seed))
  hub.export(str(folder), model, params, tokenizer, stop_ids=stop_ids)
  return str(folder)


def table(rows, columns, *, name=12, cell=10):
  """Returns the lines of a table: titles, then every row's name and numbers; '-' is none.

  Args:
    rows: dicts.
    columns: title -> (key, format).
    name, cell: characters of the first column and of every other one.
  """
  lines = [' ' * name + ''.join(f'{title:>{cell}}' for title in columns)]
  for row in rows:
    cells = ('-' if row.get(key) is None else format(row[key], kind)
             for key, kind in columns.values())
    lines.append(f'{row["name"]:{name}}' + ''.join(f'{text:>{cell}}' for text in cells))
  return lines


def peak_rss_mib():
  """The most memory this process has held so far, MiB.

  Of the kernel's own count: `getrusage` begins a child's with what its parent had held.
  """
  with open('/proc/self/status', encoding='utf-8') as file:
    return next(int(line.split()[1]) for line in file if line.startswith('VmHWM')) / 1024


def process_started():
  """Seconds since the epoch at which this process was created."""
  with open('/proc/self/stat', encoding='utf-8') as file:
    ticks = int(file.read().rpartition(')')[2].split()[19])
  with open('/proc/stat', encoding='utf-8') as file:
    boot = next(int(line.split()[1]) for line in file if line.startswith('btime'))
  return boot + ticks / os.sysconf('SC_CLK_TCK')


def compilations():
  """Returns a list to which every compilation of this process from now on adds its seconds."""
  return durations('/jax/core/compile/backend_compile_duration')


def durations(*events):
  """Returns a list to which each of these events of JAX adds its seconds from now on."""
  from jax import monitoring
  found = []
  monitoring.register_event_duration_secs_listener(
      lambda event, seconds, **_: found.append(seconds) if event in events else None)
  return found


def facts(name, compiles):
  """What a side in JAX says of itself; `compiles` as of `compilations`."""
  import jax
  memory = jax.local_devices()[0].memory_stats() or {}
  return {
      'name': name, 'versions': {'jax': jax.__version__}, 'device': jax.devices()[0].device_kind,
      'peak_device_mib': memory.get('peak_bytes_in_use', 0) / 2**20,
      'compile_seconds': sum(compiles), 'compilations': len(compiles)}


def machine():
  """What a row says of the machine."""
  return {'cpu': _cpu_name(), 'cores': os.cpu_count(), 'python': platform.python_version(),
          'load_average': os.getloadavg()[0]}


def _cpu_name():
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      return next(line.partition(':')[2].strip() for line in file if line.startswith('model name'))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()
