#!/usr/bin/env bash
# DPO in OpenRLHF, on one GPU. Options typed behind `bash dpo.sh` come last and count.
cd "$(dirname "$0")" || exit
exec deepspeed --module openrlhf.cli.train_dpo{dpo_loss} \
  --model.model_name_or_path "$PWD/policy" --ckpt.output_dir "$PWD/trained-dpo" \
  --data.dataset "$PWD/preferences.jsonl" --data.prompt_key prompt --data.max_len {context} \
  --model.beta {kl_coef} --train.max_epochs {dpo_epochs:.0f} \
  --train.batch_size {dpo_batch_size} --train.micro_batch_size {dpo_batch_size} --train.seed {seed} \
  --adam.lr {dpo_learning_rate} --adam.betas 0.9 0.95 --adam.weight_decay 0.01 \
  --lr_scheduler linear --lr_warmup_ratio 0.05 --ds.attn_implementation eager "$@"
