#!/usr/bin/env bash
# {method} in TRL. Options typed behind `bash run.sh` come last and count.
cd "$(dirname "$0")" || exit
exec trl {flags} \
  --model_name_or_path policy --dataset_name prompts --reward_funcs reward.reward --output_dir trained \
  --num_generations {group} --per_device_train_batch_size {micro} \
  --gradient_accumulation_steps {gradient_accumulation_steps} --steps_per_generation {pieces} \
  --num_iterations {ppo_epochs} --max_steps {steps} \
  --max_completion_length {max_new_tokens} --temperature {temperature} --top_p 1.0 --top_k 0 \
  --learning_rate {learning_rate} --lr_scheduler_type {lr_schedule} --warmup_steps {warmup_steps} \
  --max_grad_norm {max_grad_norm} --adam_epsilon 1e-5 --weight_decay 0.0 \
  --beta {kl_coef} --epsilon {clip_eps} --epsilon_high {high} \
  --dtype float32 --bf16 {bf16} --gradient_checkpointing {gradient_checkpointing} --seed {seed} \
  --logging_steps 1 --report_to none "$@"
