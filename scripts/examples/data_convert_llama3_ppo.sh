#!/usr/bin/env bash
# Tokenize prompts for online DPO once, with Llama 3's template: docs/preprocessing.md.
# Training takes OUTPUT_PREFIX as actor_rollout.data_path.
#
#   INPUT=./dataset/descriptiveness-00000-of-00001.parquet \
#       TOKENIZER=./model_from_hf/llama3-hf OUTPUT_PREFIX=./dataset/llama3-hf/descriptiveness \
#       scripts/examples/data_convert_llama3_ppo.sh [flags of preprocess_data.py ...]
#
# INPUT: rows of prompt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

exec python scripts/preprocess_data.py \
  --input "${INPUT:-./dataset/descriptiveness-00000-of-00001.parquet}" \
  --tokenizer-type PretrainedFromHF \
  --tokenizer-name-or-path "${TOKENIZER:-./model_from_hf/llama3-hf}" \
  --output-prefix "${OUTPUT_PREFIX:-./dataset/llama3-hf/descriptiveness}" \
  --workers "${WORKERS:-4}" \
  --log-interval 1000 \
  --handler-name PPOAlpacaStyleInstructionHandler \
  --prompt-type llama3 \
  --map-keys '{"prompt":"prompt", "query":"", "response":"prompt", "system":""}' \
  "$@"
