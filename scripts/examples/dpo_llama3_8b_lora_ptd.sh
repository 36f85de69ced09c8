#!/usr/bin/env bash
# Offline DPO of Llama-3-8B-Instruct with LoRA on one machine with eight NPUs: tensor parallel over four, twice. The
# reference is the policy with its adapters off. The settings are those of MindSpeed-LLM's script of the same name.
#
#   DATA_PATH=./dataset/orca_rlhf.jsonl CKPT_LOAD_DIR=./models/llama3-8b-instruct LORA_CKPT_DIR=./ckpt \
#       scripts/examples/dpo_llama3_8b_lora_ptd.sh [Hydra overrides ...]
#
# The run leaves a merged model (`policy`) and the adapter as PEFT keeps it (`policy/adapter`) in its run folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

exec python ray_gpt.py --config-name offline_dpo_trainer_llama3_8b \
  actor_rollout.data_path="${DATA_PATH:-./dataset/orca_rlhf.jsonl}" \
  actor_rollout.load="${CKPT_LOAD_DIR:-./models/llama3-8b-instruct}" \
  actor_rollout.save="${LORA_CKPT_DIR:-./ckpt}" \
  ref.load="${CKPT_LOAD_DIR:-./models/llama3-8b-instruct}" \
  actor_rollout.lora_r=16 \
  actor_rollout.lora_alpha=32 \
  actor_rollout.lora_target_modules='[linear_qkv,linear_proj,linear_fc1,linear_fc2]' \
  actor_rollout.num_gpus_for_train=8 \
  resource_pool.actor_rollout=8 \
  resource_pool.ref=null \
  training.global_batch_size=32 \
  actor_rollout.ppo_mini_batch_size=16 \
  actor_rollout.micro_batch_size=1 \
  training.seq_length=2048 \
  actor_rollout.max_prompt_length=1024 \
  training.train_iters=200 \
  training.save_interval=100 \
  actor_rollout.dpo_loss_type=sigmoid \
  actor_rollout.lr=5.0e-6 \
  actor_rollout.min_lr=0 \
  actor_rollout.lr_decay_style=constant \
  actor_rollout.lr_warmup_fraction=0 \
  "$@"
