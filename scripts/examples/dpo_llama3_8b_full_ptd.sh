#!/usr/bin/env bash
# Offline DPO of Llama-3-8B-Instruct, all parameters, on one machine with eight NPUs: four train, four hold the reference.
# The settings are those of MindSpeed-LLM's script of the same name.
#
#   DATA_PATH=./dataset/orca_rlhf.jsonl CKPT_LOAD_DIR=./models/llama3-8b-instruct CKPT_SAVE_DIR=./ckpt \
#       scripts/examples/dpo_llama3_8b_full_ptd.sh [Hydra overrides ...]
#
# DATA_PATH: rows of question, chosen, rejected (and system). CKPT_LOAD_DIR: a Hugging Face folder, or a converted one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

exec python ray_gpt.py --config-name offline_dpo_trainer_llama3_8b \
  actor_rollout.data_path="${DATA_PATH:-./dataset/orca_rlhf.jsonl}" \
  actor_rollout.load="${CKPT_LOAD_DIR:-./models/llama3-8b-instruct}" \
  actor_rollout.save="${CKPT_SAVE_DIR:-./ckpt}" \
  ref.load="${CKPT_LOAD_DIR:-./models/llama3-8b-instruct}" \
  training.global_batch_size=64 \
  actor_rollout.ppo_mini_batch_size=64 \
  actor_rollout.micro_batch_size=1 \
  training.seq_length=2048 \
  actor_rollout.max_prompt_length=1024 \
  training.train_iters=200 \
  training.save_interval=100 \
  actor_rollout.dpo_loss_type=sigmoid \
  actor_rollout.dpo_beta=0.1 \
  actor_rollout.lr=5.0e-8 \
  actor_rollout.min_lr=0 \
  actor_rollout.lr_decay_style=constant \
  actor_rollout.lr_warmup_fraction=0 \
  actor_rollout.clip_grad=1.0 \
  "$@"
