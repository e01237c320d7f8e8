"""The peer of bench_grpo.py: Google's Tunix, its GRPOLearner and its own sampler, started by it.

It runs in an environment of its own (`pip install google-tunix`), without ptjax.
"""

import itertools
import os
import time
import traceback

import bench_common
import bench_grpo


class Tokenizer:
  """The words of the model's tokenizer, as Tunix wants one."""

  def encode(self, text, **kwargs):
    del kwargs
    return [int(word[1:]) + 3 for word in text.split()]

  def decode(self, ids, **kwargs):
    del kwargs
    return ' '.join(f'w{int(i) - 3}' for i in ids)

  def bos_id(self):
    return None

  # No id: prompts are of one length and nothing ends a completion, so nothing is padded, and no
  # drawn token counts as padding.
  def eos_id(self):
    return -1

  def pad_id(self):
    return -1


def make_learner(job):
  """Returns (learner, the actor's model)."""
  import jax
  import jax.numpy as jnp
  import optax
  from tunix.models.qwen2 import model as qwen2
  from tunix.models.qwen2 import params
  from tunix.rl import rl_cluster
  from tunix.rl.grpo import grpo_learner
  from tunix.rl.rollout import base_rollout
  mesh = jax.make_mesh((1, 1), ('fsdp', 'tp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  config = qwen2.ModelConfig(
      num_layers=job.layers, vocab_size=job.vocab, embed_dim=job.width, hidden_dim=job.mlp,
      num_heads=job.heads, head_dim=job.width // job.heads, num_kv_heads=job.kv_heads,
      rope_theta=10000, norm_eps=1e-6, use_tied_embedding=True, dtype=jnp.dtype(job.dtype),
      param_dtype=jnp.float32)
  model = params.create_model_from_safe_tensors(
      os.path.join(job.folder, 'model'), config, mesh, dtype=jnp.float32)
  cluster = rl_cluster.RLCluster(
      actor=model, tokenizer=Tokenizer(),
      cluster_config=rl_cluster.ClusterConfig(
          role_to_mesh={role: mesh for role in (
              rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)},
          rollout_engine='vanilla',
          training_config=rl_cluster.RLTrainingConfig(
              actor_optimizer=optax.chain(
                  optax.clip_by_global_norm(1.0), optax.adamw(job.learning_rate, weight_decay=0.0)),
              eval_every_n_steps=10**6, max_steps=10**6, mini_batch_size=job.prompts,
              train_micro_batch_size=job.prompts),
          rollout_config=base_rollout.RolloutConfig(
              max_tokens_to_generate=job.completion, max_prompt_length=job.prompt,
              kv_cache_size=job.prompt + job.completion, temperature=1.0, top_p=1.0)))

  def reward(prompts, completions, **columns):
    del columns
    return bench_grpo.low_ids(
        prompts, completions, completion_ids=[Tokenizer().encode(text) for text in completions],
        vocab=[job.vocab] * len(completions))

  learner = grpo_learner.GRPOLearner(
      rl_cluster=cluster, reward_fns=reward, algo_config=grpo_learner.GRPOConfig(
          num_generations=job.group, num_iterations=1, beta=0.0, epsilon=0.2))
  return learner, cluster


def worker(job):
  """The peer's side."""
  turns = bench_common.Turns()
  turns.wait()
  compiles = bench_common.compilations()
  import jax
  from flax import nnx
  import numpy as np
  from importlib import metadata
  learner, cluster = make_learner(job)
  generate, global_step = cluster.generate, learner._run_global_step
  seconds, lengths = [], []

  def timed(*args, **kwargs):
    started = time.perf_counter()
    found = generate(*args, **kwargs)
    seconds.append(time.perf_counter() - started)
    lengths.append([int((np.asarray(ids) != -1).sum()) for ids in found.tokens])
    return found

  def reported(*args, **kwargs):
    global_step(*args, **kwargs)
    weights = jax.block_until_ready(
        jax.tree.leaves(nnx.state(cluster.actor_trainer.model, nnx.Param)))
    turns.done(**{
        **bench_common.facts('tunix', compiles), 'lengths': lengths.pop(),
        'versions': {name: metadata.version(name) for name in ('google-tunix', 'jax', 'flax')},
        'rollout': seconds.pop(), 'prompt_tokens': job.prompts * job.prompt,
        'parameters': sum(leaf.size for leaf in weights)})
    turns.wait()

  cluster.generate, learner._run_global_step = timed, reported
  prompts = [bench_grpo.text(ids) for ids in bench_grpo.prompt_ids(job)]
  learner.train({'prompts': np.array(prompts)} for _ in itertools.count())


if __name__ == '__main__':
  try:
    worker(bench_grpo.parse()[1])
  except Exception:
    traceback.print_exc()
    os._exit(1)  # its threads would wait for ever
