#!/usr/bin/env bash
# Tokenize preference pairs for offline DPO or a reward model once, with Llama 3's template: docs/preprocessing.md.
# Training takes OUTPUT_PREFIX as actor_rollout.data_path.
#
#   INPUT=./dataset/orca_rlhf.jsonl \
#       TOKENIZER=./model_from_hf/llama3-hf OUTPUT_PREFIX=./pair_dataset/orca_rlhf_llama3 \
#       scripts/examples/data_convert_llama3_dpo.sh [flags of preprocess_data.py ...]
#
# INPUT: rows of question, chosen, rejected, system.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

exec python scripts/preprocess_data.py \
  --input "${INPUT:-./dataset/orca_rlhf.jsonl}" \
  --tokenizer-type PretrainedFromHF \
  --tokenizer-name-or-path "${TOKENIZER:-./model_from_hf/llama3-hf}" \
  --output-prefix "${OUTPUT_PREFIX:-./pair_dataset/orca_rlhf_llama3}" \
  --workers "${WORKERS:-4}" \
  --log-interval 1000 \
  --handler-name AlpacaStylePairwiseHandler \
  --prompt-type llama3 \
  --map-keys '{"prompt":"question", "query":"", "system":"system"}' \
  "$@"
