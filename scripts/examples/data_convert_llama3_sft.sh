#!/usr/bin/env bash
# Tokenize examples for supervised fine-tuning once, with Llama 3's template: docs/preprocessing.md.
# Training takes OUTPUT_PREFIX as actor_rollout.data_path.
#
#   INPUT=./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet \
#       TOKENIZER=./model_from_hf/llama3-hf OUTPUT_PREFIX=./finetune_dataset/alpaca \
#       scripts/examples/data_convert_llama3_sft.sh [flags of preprocess_data.py ...]
#
# INPUT: rows of instruction, input, output.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

exec python scripts/preprocess_data.py \
  --input "${INPUT:-./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet}" \
  --tokenizer-type PretrainedFromHF \
  --tokenizer-name-or-path "${TOKENIZER:-./model_from_hf/llama3-hf}" \
  --output-prefix "${OUTPUT_PREFIX:-./finetune_dataset/alpaca}" \
  --workers "${WORKERS:-4}" \
  --log-interval 1000 \
  --handler-name AlpacaStyleInstructionHandler \
  --prompt-type llama3 \
  --map-keys '{"prompt":"instruction", "query":"input", "response":"output"}' \
  "$@"
