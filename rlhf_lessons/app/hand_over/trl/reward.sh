#!/usr/bin/env bash
# A reward model in TRL, on preferences/. Options typed behind `bash reward.sh` come last and count.
cd "$(dirname "$0")" || exit
exec trl reward --model_name_or_path policy --dataset_name preferences --output_dir trained-reward \
  --num_train_epochs {reward_epochs} --per_device_train_batch_size {reward_batch_size} \
  --gradient_accumulation_steps 1 --learning_rate {reward_learning_rate} \
  --lr_scheduler_type linear --warmup_steps 0.05 --adam_beta2 0.95 --weight_decay 0.01 --max_length {context} \
  --dtype float32 --bf16 {precision} --gradient_checkpointing {gradient_checkpointing} --seed {seed} \
  --logging_steps 1 --report_to none "$@"
