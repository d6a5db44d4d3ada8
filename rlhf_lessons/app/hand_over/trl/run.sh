#!/usr/bin/env bash
# {method} in TRL. Options typed behind `bash run.sh` come last and count.
cd "$(dirname "$0")" || exit
BATCH={batch_size} MINIBATCH={minibatch_size} PIECES={gradient_accumulation_steps}
ITERATIONS={num_iterations} EPOCHS={ppo_epochs} WARMUP={warmup_iterations}
LEVEL={sampler_correction_level} CAP={sampler_cap} FLOOR={floor}
exec trl {flags} \
  --model_name_or_path policy --dataset_name prompts --reward_funcs reward.reward --output_dir trained \
  --per_device_train_batch_size $((MINIBATCH / PIECES)) --gradient_accumulation_steps $PIECES \
  --steps_per_generation $((BATCH / MINIBATCH * PIECES)) --num_iterations $EPOCHS \
  --max_steps $((ITERATIONS * EPOCHS * BATCH / MINIBATCH)) \
  --max_completion_length {max_new_tokens} --temperature {temperature} --top_p 1.0 --top_k 0 \
  --learning_rate {learning_rate} --lr_scheduler_type {lr_schedule} \
  --warmup_steps $((WARMUP * EPOCHS * BATCH / MINIBATCH)) --max_grad_norm {max_grad_norm} \
  --adam_epsilon 1e-5 --weight_decay 0.0 \
  --beta {kl_coef} --epsilon {clip_eps} --epsilon_high {high} \
  --dtype float32 --bf16 {precision} --gradient_checkpointing {gradient_checkpointing} --seed {seed} \
  --logging_steps 1 --report_to none "$@"
