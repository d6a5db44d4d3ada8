#!/usr/bin/env bash
# A reward model in OpenRLHF, on one GPU. Options typed behind `bash reward.sh` come last and count.
cd "$(dirname "$0")" || exit
exec deepspeed --module openrlhf.cli.train_rm \
  --model.model_name_or_path "$PWD/policy" --ckpt.output_dir "$PWD/trained-reward" \
  --data.dataset "$PWD/preferences.jsonl" --data.prompt_key prompt --data.max_len {context} \
  --train.max_epochs {reward_epochs:.0f} --train.batch_size {reward_batch_size} \
  --train.micro_batch_size {reward_batch_size} --train.seed {seed} \
  --adam.lr {reward_learning_rate} --adam.betas 0.9 0.95 --adam.weight_decay 0.01 \
  --lr_scheduler linear --lr_warmup_ratio 0.05 --ds.attn_implementation eager "$@"
