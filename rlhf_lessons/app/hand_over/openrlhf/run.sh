#!/usr/bin/env bash
# {method} in OpenRLHF, on one GPU. Options typed behind `bash run.sh` come last and count.
cd "$(dirname "$0")" || exit
BATCH={batch_size} MINIBATCH={minibatch_size} PIECES={gradient_accumulation_steps}
ITERATIONS={num_iterations} EPOCHS={ppo_epochs} GROUP={samples_per_prompt} PROMPTS={prompts}
CAP={sampler_cap} FLOOR={floor}
exec python3 -m openrlhf.cli.train_ppo_ray {flags} \
  --actor.model_name_or_path "$PWD/policy" --ckpt.output_dir "$PWD/trained" \
  --reward.remote_url "$PWD/reward.py" --reward.clip_range -1000000 1000000 \
  --data.prompt_dataset "$PWD/prompts.jsonl" --data.input_key prompt --data.label_key label \
  --data.max_len $(({longest_prompt} + {max_new_tokens})) \
  --rollout.batch_size $((BATCH / GROUP)) --rollout.n_samples_per_prompt $GROUP \
  --rollout.micro_batch_size $((MINIBATCH / PIECES)) --rollout.max_new_tokens {max_new_tokens} \
  --rollout.temperature {temperature} --rollout.top_p 1.0 \
  --train.batch_size $MINIBATCH --train.micro_batch_size $((MINIBATCH / PIECES)) --train.max_epochs $EPOCHS \
  --train.num_episodes $(((ITERATIONS * BATCH / GROUP + PROMPTS - 1) / PROMPTS)) --train.seed {seed} \
  --actor.adam.lr {learning_rate} --actor.adam.betas 0.9 0.999 --actor.adam.eps 1e-5 \
  --actor.lr_scheduler {lr_schedule} --actor.lr_warmup_ratio {warmup} --actor.max_norm {max_grad_norm} \
  --actor.eps_clip_low_high {clip_eps} {high} --actor.entropy_coef {ent_coef} \
  --actor.policy_loss_type {ratio_level} --actor.loss_agg_mode {loss_over} \
  --algo.advantage.is_correction_level {sampler_correction} \
  --algo.kl.init_coef {kl_coef} --algo.kl.estimator {kl_kind}{kl_in} \
  --actor.num_gpus_per_node 1 --ref.num_gpus_per_node 1 --critic.num_gpus_per_node 1 \
  --vllm.num_engines 1 --vllm.gpu_memory_utilization 0.4 \
  --train.colocate_all --vllm.enable_sleep --ds.enable_sleep --ds.attn_implementation eager "$@"
