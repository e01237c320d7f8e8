"""GRPO on GSM8K with Qwen2.5-0.5B-Instruct, the whole model, on one GPU.

Command: python -m ptjax.launch --config=experiments/grpo_gsm8k_qwen2_5_0_5b.py
Hardware: one H100-class GPU (80 GB).
Expected time: not yet run; `--plan` prints an estimate.
Number to reach: not yet run. Public anchors (other prompts and extraction): 49.6 % before
  training, 56.7 % after PPO, both verl's published GSM8K baselines for this model.
"""

from ptjax import config


def get_config():
  return config.Config(
      algo='grpo',
      model='Qwen/Qwen2.5-0.5B-Instruct',
      dataset='openai/gsm8k:main@train',
      reward=('gsm8k_flexible', 'gsm8k*0.1'),
      model_settings=config.ModelSettings(dtype='bfloat16', param_dtype='float32', remat='dots'),
      data=config.DataSettings(max_prompt_tokens=256),
      rollout=config.RolloutSettings(num_prompts=64, group_size=8, max_completion_tokens=512),
      training=config.TrainingSettings(steps=300, mini_batches=2, micro_batches=8),
      optimizer=config.OptimizerSettings(learning_rate=1e-6, warmup_steps=10, beta2=0.99),
      checkpoint=config.CheckpointSettings(every_steps=50),
      eval=config.EvaluationSettings(
          dataset='openai/gsm8k:main@test', every_steps=50, limit=1319, batch_size=256))
