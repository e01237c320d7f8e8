"""Every setting, once: frozen dataclasses, and the error a user sees.

Each field states its unit. `None` means absent; `0` means zero. A field that no code reads is a
defect, and a test looks for it.
"""

import dataclasses
import difflib


class UserError(ValueError):
  """Something the user can set right. The launcher prints it in one line and exits with 2."""


def near_names(name, names):
  """Returns `'; did you mean a, b?'`, or the whole list when nothing is near."""
  names = sorted(str(n) for n in names)
  near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.6)
  return f'; did you mean {", ".join(near)}?' if near else f'; known: {", ".join(names)}'


def _choice(path, value, allowed):
  if value not in allowed:
    raise UserError(f'{path}={value!r}: expected one of {", ".join(allowed)}')


def _positive(path, value):
  if value is None or value <= 0:
    raise UserError(f'{path}={value}: must be positive')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
  """How the policy computes."""
  dtype: str = 'float32'  # of activations and matrix products: float32 or bfloat16
  param_dtype: str = 'float32'  # of the stored weights and the optimizer's moments
  # What the backward pass recomputes: none, dots (all but products of weights), full, or auto: dots
  # where what that keeps fits into the device's memory, else full.
  remat: str = 'auto'
  attention: str = 'auto'  # auto (cuDNN's kernel on GPUs where it can), xla or cudnn

  def __post_init__(self):
    _choice('model_settings.dtype', self.dtype, ('float32', 'bfloat16'))
    _choice('model_settings.param_dtype', self.param_dtype, ('float32', 'bfloat16'))
    _choice('model_settings.remat', self.remat, ('auto', 'none', 'dots', 'full'))
    _choice('model_settings.attention', self.attention, ('auto', 'xla', 'cudnn'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSettings:
  """What a GPU is told when the run starts; the environment's own settings win."""
  xla_flags: str = 'auto'  # auto (those of gpu.py) or none
  memory_fraction: float | None = None  # of a GPU's memory that JAX may take; None: its own 0.75
  preallocate: bool = True  # take it at once, which saves fragmentation

  def __post_init__(self):
    _choice('device.xla_flags', self.xla_flags, ('auto', 'none'))
    if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
      raise UserError(f'device.memory_fraction={self.memory_fraction}: expected a fraction above 0')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings:
  """Low-rank adapters, which train in place of the weights."""
  rank: int = 0  # 0 trains all weights
  alpha: float = 16.0  # adapters count alpha / rank times, with rslora alpha / sqrt(rank) times
  variant: str = 'lora'  # lora, rslora or dora
  targets: tuple[str, ...] = ('all-linear',)  # which layers get adapters, e.g. query,value

  def __post_init__(self):
    _choice('lora.variant', self.variant, ('lora', 'rslora', 'dora'))
    _positive('lora.alpha', self.alpha)
    if self.rank < 0:
      raise UserError(f'lora.rank={self.rank}: expected a positive rank, or 0 to train all weights')
    if not self.targets:
      raise UserError('lora.targets is empty: name layers, e.g. query,value, or all-linear')

  @property
  def scale(self):
    """What the product of the adapters is multiplied by."""
    return self.alpha / (self.rank**0.5 if self.variant == 'rslora' else self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
  """From rows to prompts."""
  columns: dict = dataclasses.field(default_factory=dict)  # ours -> the file's column name
  limit: int | None = None  # rows read at most
  max_prompt_tokens: int = 512
  chat_template: str | None = None  # Jinja file, for models that have none; None: the tokenizer's
  overlong: str = 'drop'  # what to do with a longer prompt: drop, truncate (its left end) or error
  turns: str = 'last'  # of conversations to imitate: the last assistant turn, or all of them
  packing: bool = True  # several examples or completions in a row, where that saves padding
  packed_tokens: int | None = None  # width of rows of examples; None: enough for the longest
  reference_cache: str | None = 'auto'  # folder of reference log-probs; auto: beside the data
  streaming: bool = False  # True: an offline method's rows are read and tokenised as they come
  window_rows: int = 8192  # of streamed data, read and shuffled together
  # Rows that share 13 words in a row with eval.dataset: none (are looked for), report, drop; auto:
  # report, but none of streamed rows, as it reads all of them at the start.
  decontaminate: str = 'auto'

  def __post_init__(self):
    _choice('data.overlong', self.overlong, ('drop', 'truncate', 'error'))
    _choice('data.turns', self.turns, ('last', 'all'))
    _choice('data.decontaminate', self.decontaminate, ('auto', 'none', 'report', 'drop'))
    for name in ('max_prompt_tokens', 'window_rows'):
      _positive(f'data.{name}', getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSettings:
  """What is sampled in each step."""
  num_prompts: int = 8  # prompts per rollout
  group_size: int = 8  # completions per prompt
  max_completion_tokens: int = 256
  temperature: float = 1.0
  top_k: int = 0  # 0 keeps all
  top_p: float = 1.0
  min_p: float = 0.0
  stop_strings: tuple[str, ...] = ()  # beside the model's own end tokens
  slots: int = 0  # completions decoded at once; a free slot takes the next; 0: automatic
  reuse_log_probs: bool = False  # True: the sampler's log-probs are the old ones; False: recompute
  reference_share: float = 0.5  # of the reference in the mixture that Nash-MD plays against
  # Draws of other prompts, at most, for groups of equal rewards; None: of dapo 3, else 0.
  extra_rollouts: int | None = None

  def __post_init__(self):
    for name in ('num_prompts', 'group_size', 'max_completion_tokens'):
      _positive(f'rollout.{name}', getattr(self, name))
    if self.slots < 0:
      raise UserError(f'rollout.slots={self.slots}: expected how many completions to decode at '
                      'once, 0 to leave it to the sampler')
    if not 0 <= self.reference_share <= 1:
      raise UserError(f'rollout.reference_share={self.reference_share}: expected a fraction')
    if self.extra_rollouts is not None and self.extra_rollouts < 0:
      raise UserError(f'rollout.extra_rollouts={self.extra_rollouts} is negative')
    if self.temperature <= 0:
      raise UserError(f'rollout.temperature={self.temperature}: training samples, so it must be '
                      'positive (evaluation decodes greedily by itself)')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings:
  """How completions are scored."""
  on_error: str = 'raise'  # a reward function that fails: raise, or zero
  timeout_seconds: float = 5.0  # per maths answer that needs symbolic comparison
  function_timeout_seconds: float | None = None  # per call of a reward function; None: no limit
  workers: int = 2  # processes that compare maths answers
  # Parts of a rollout: slow functions score one, in a thread, while the next is drawn. 1: neither.
  # Stages that do not train on their own samples alone draw in one part all the same.
  overlap: int = 1
  # At the end of max_completion_tokens, over which a penalty grows to 1; None: of dapo a fifth,
  # else none.
  overlong_tokens: int | None = None

  def __post_init__(self):
    _choice('rewards.on_error', self.on_error, ('raise', 'zero'))
    _positive('rewards.timeout_seconds', self.timeout_seconds)
    _positive('rewards.workers', self.workers)
    _positive('rewards.overlap', self.overlap)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
  """AdamW and its schedule."""
  learning_rate: float = 1e-6
  schedule: str = 'constant'  # after the warm-up: constant, linear or cosine
  warmup_steps: int = 0
  end_fraction: float = 0.0  # of learning_rate, where linear and cosine end
  weight_decay: float = 0.0
  decay_all: bool = False  # False: neither norms, biases nor embeddings decay
  beta1: float = 0.9
  beta2: float = 0.999
  epsilon: float = 1e-8
  max_grad_norm: float | None = 1.0

  def __post_init__(self):
    _choice('optimizer.schedule', self.schedule, ('constant', 'linear', 'cosine'))
    if self.learning_rate < 0:
      raise UserError(f'optimizer.learning_rate={self.learning_rate} is negative')
    if self.warmup_steps < 0:
      raise UserError(f'optimizer.warmup_steps={self.warmup_steps} is negative')
    if self.max_grad_norm is not None:
      _positive('optimizer.max_grad_norm', self.max_grad_norm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
  """How a rollout becomes optimizer steps."""
  steps: int = 200  # optimizer steps
  batch_size: int = 32  # demonstrations per step, for offline algorithms
  # Of packed rows per step, padding included, but at least a row; None: as batch_size says.
  tokens_per_batch: int | None = None
  mini_batches: int = 1  # optimizer steps per pass over one rollout
  epochs: int = 1  # passes over one rollout
  micro_batches: int = 1  # parts of a mini-batch computed one after another; any split is exact
  mask_truncated: bool = False  # True: completions without an end token do not train
  # Optimizer steps after which the policy becomes the reference; 0: never, None: as methods say.
  renew_reference_steps: int | None = None
  max_bad_steps: int = 5  # updates in a row with a non-finite loss or gradient before the run stops

  def __post_init__(self):
    for name in ('steps', 'batch_size', 'mini_batches', 'epochs', 'micro_batches',
                 'max_bad_steps'):
      _positive(f'training.{name}', getattr(self, name))
    if self.tokens_per_batch is not None:
      _positive('training.tokens_per_batch', self.tokens_per_batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStartSettings:
  """Supervised steps on the task's demonstrations before an online algorithm starts."""
  steps: int = 0  # 0 starts from the model as it is
  dataset: str | None = None  # whose demonstrations; None: those of the run's own data set
  batch_size: int = 64
  learning_rate: float = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
  every_steps: int = 50
  keep: int = 2  # newest checkpoints kept
  asynchronous: bool = True

  def __post_init__(self):
    _positive('checkpoint.every_steps', self.every_steps)
    _positive('checkpoint.keep', self.keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSettings:
  samples_every: int = 10  # optimizer steps between entries of samples.jsonl
  samples: int = 8  # completions per entry
  tensorboard: bool = True
  report: bool = True  # write report.html at the end
  compile_cache: str | None = 'auto'  # folder of compiled programs; auto: ~/.cache/ptjax/xla

  def __post_init__(self):
    _positive('log.samples_every', self.samples_every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
  dataset: str | None = None  # None: the task's own held-out rows, if it has any
  every_steps: int = 0  # optimizer steps between evaluations; 0: only before and after
  limit: int = 256  # rows
  samples: int = 1  # completions per row for pass@k and maj@k; 1: greedy accuracy alone
  k: tuple[int, ...] = ()
  temperature: float = 1.0  # of those samples
  batch_size: int = 64  # rows decoded together

  def __post_init__(self):
    _positive('eval.limit', self.limit)
    _positive('eval.samples', self.samples)
    _positive('eval.batch_size', self.batch_size)
    if self.k and max(self.k) > self.samples:
      raise UserError(f'eval.k={self.k} needs eval.samples of at least {max(self.k)}, '
                      f'not {self.samples}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSettings:
  """The device that `--plan` reckons for; runs do not read it."""
  device: str | None = None  # whose data sheet counts: A100, H100 or H200; None: as found, or H100
  peak_tflops: float | None = None  # of one device, 1e12/s; None: of the data sheet, or measured
  memory_gb_per_second: float | None = None  # between a device and its memory; None: likewise
  link_gb_per_second: float | None = None  # that a device receives of its node; None: likewise
  network_gb_per_second: float | None = None  # that it receives of other nodes; None: likewise
  efficiency: float = 0.4  # of given peaks and data sheets that a good program reaches, a fraction
  memory_gib: float | None = None  # of one device; None: of the data sheet, or this machine's

  def __post_init__(self):
    for name in ('peak_tflops', 'memory_gb_per_second', 'link_gb_per_second',
                 'network_gb_per_second', 'memory_gib'):
      if getattr(self, name) is not None:
        _positive(f'plan.{name}', getattr(self, name))
    if not 0 < self.efficiency <= 1:
      raise UserError(f'plan.efficiency={self.efficiency}: expected a fraction above 0')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A whole run."""
  algo: str = 'grpo'  # several, as in sft,dpo, are stages that run one after the other
  model: str = 'tiny'  # preset, Hugging Face directory or hub name
  dataset: str = 'arithmetic'  # task, file, directory or hub name
  reward: tuple[str, ...] = ()  # empty: the task's own
  seed: int = 0
  out_dir: str | None = None  # None: runs/<algo>-<model>-<dataset>-<seed>
  resume: str = 'auto'
  teacher: str | None = None  # a model, for distillation
  judge: str | None = None  # who compares completions: a model directory, or URL(model='name')
  critic: str = 'head'  # of PPO: a head on the policy's own states, or a model of its own
  stages: dict = dataclasses.field(default_factory=dict)  # algo -> {setting: value} of its stage
  mesh: str = ''  # e.g. 'data=1,fsdp=8,tensor=1'; empty: all devices on fsdp
  loss: dict = dataclasses.field(default_factory=dict)  # the loss's own hyperparameters
  model_settings: ModelSettings = ModelSettings()
  device: DeviceSettings = DeviceSettings()
  lora: LoraSettings = LoraSettings()
  data: DataSettings = DataSettings()
  rollout: RolloutSettings = RolloutSettings()
  rewards: RewardSettings = RewardSettings()
  optimizer: OptimizerSettings = OptimizerSettings()
  training: TrainingSettings = TrainingSettings()
  warm_start: WarmStartSettings = WarmStartSettings()
  checkpoint: CheckpointSettings = CheckpointSettings()
  log: LogSettings = LogSettings()
  eval: EvaluationSettings = EvaluationSettings()
  plan: PlanSettings = PlanSettings()

  def __post_init__(self):
    _choice('resume', self.resume, ('auto', 'never'))
    _choice('critic', self.critic, ('head', 'model'))


def replace(config, values):
  """`dataclasses.replace`, re-checking the whole."""
  return dataclasses.replace(config, **values)


def to_dict(config):
  """Returns the config as plain nested dicts, ready for JSON."""
  return dataclasses.asdict(config)
