"""GRPO on GSM8K with Qwen2.5-7B-Instruct, the whole model, on one node of eight GPUs.

Parameters, gradients and the optimizer's moments are float32 and split over all eight devices
(`fsdp=8`): 7.6 billion parameters x 16 bytes / 8 = 15 GB each, beside activations and KV cache.

Command: python -m ptjax.launch --config=experiments/grpo_gsm8k_qwen2_5_7b.py
Hardware: one node of eight H100-class GPUs (80 GB).
Expected time: not yet run; `--plan` prints an estimate.
Number to reach: not yet run. Public anchor: verl's GSM8K baselines have 7B models at 89-93 %.
"""

from ptjax import config


def get_config():
  return config.Config(
      algo='grpo',
      model='Qwen/Qwen2.5-7B-Instruct',
      dataset='openai/gsm8k:main@train',
      reward=('gsm8k_flexible', 'gsm8k*0.1'),
      mesh='data=1,fsdp=8,tensor=1',
      model_settings=config.ModelSettings(dtype='bfloat16', param_dtype='float32', remat='full'),
      data=config.DataSettings(max_prompt_tokens=256),
      rollout=config.RolloutSettings(num_prompts=128, group_size=8, max_completion_tokens=1024),
      training=config.TrainingSettings(steps=200, mini_batches=2, micro_batches=4),
      optimizer=config.OptimizerSettings(learning_rate=1e-6, warmup_steps=10, beta2=0.99),
      checkpoint=config.CheckpointSettings(every_steps=25),
      eval=config.EvaluationSettings(
          dataset='openai/gsm8k:main@test', every_steps=25, limit=1319, batch_size=256))
