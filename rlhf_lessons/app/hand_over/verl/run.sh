#!/usr/bin/env bash
# {method} in verl, on one GPU. Settings typed behind `bash run.sh` come last and count.
cd "$(dirname "$0")" || exit
BATCH={batch_size} MINIBATCH={minibatch_size} PIECES={gradient_accumulation_steps}
ITERATIONS={num_iterations} EPOCHS={ppo_epochs} GROUP={samples_per_prompt} PROMPTS={prompts}
MICRO=$((MINIBATCH / PIECES))
LEVEL={sampler_correction_level} CAP={sampler_cap} FLOOR={floor}
exec python3 -m verl.trainer.main_ppo {flags} \
  data.train_files="$PWD/prompts.jsonl" data.val_files="$PWD/prompts.jsonl" data.train_batch_size=$((BATCH / GROUP)) \
  data.max_prompt_length={longest_prompt} data.max_response_length={max_new_tokens} data.seed={seed} \
  algorithm.rollout_correction.rollout_is={sampler_correction} \
  reward.custom_reward_function.path="$PWD/reward.py" reward.custom_reward_function.name=compute_score \
  actor_rollout_ref.model.path="$PWD/policy" actor_rollout_ref.model.use_remove_padding=False \
  actor_rollout_ref.model.enable_gradient_checkpointing={gradient_checkpointing} \
  actor_rollout_ref.actor.ppo_mini_batch_size=$(((MINIBATCH + GROUP - 1) / GROUP)) \
  actor_rollout_ref.actor.ppo_epochs=$EPOCHS actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=$MICRO \
  actor_rollout_ref.actor.shuffle=True \
  actor_rollout_ref.actor.clip_ratio_low={clip_eps} actor_rollout_ref.actor.clip_ratio_high={high} \
  actor_rollout_ref.actor.clip_ratio_c=1000000.0 actor_rollout_ref.actor.loss_agg_mode={loss_over} \
  actor_rollout_ref.actor.loss_scale_factor={max_new_tokens} \
  actor_rollout_ref.actor.policy_loss.loss_mode={ratio_level} actor_rollout_ref.actor.entropy_coeff={ent_coef} \
  actor_rollout_ref.actor.optim.lr={learning_rate} actor_rollout_ref.actor.optim.weight_decay=0.0 \
  actor_rollout_ref.actor.optim.lr_scheduler_type={lr_schedule} \
  actor_rollout_ref.actor.optim.lr_warmup_steps_ratio={warmup} \
  actor_rollout_ref.actor.optim.clip_grad={max_grad_norm} \
  'actor_rollout_ref.actor.optim.override_optimizer_config={{eps: 1e-5}}' \
  actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=$GROUP \
  actor_rollout_ref.rollout.temperature={temperature} actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.4 \
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=$MICRO \
  actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=$MICRO \
  trainer.total_training_steps=$ITERATIONS trainer.nnodes=1 \
  trainer.total_epochs=$(((ITERATIONS * BATCH / GROUP + PROMPTS - 1) / PROMPTS)) \
  trainer.n_gpus_per_node=1 trainer.default_local_dir="$PWD/trained" trainer.save_freq=$ITERATIONS \
  trainer.val_before_train=False trainer.project_name=rlhf_lessons trainer.experiment_name={method} \
  'trainer.logger=["console"]' "$@"
