#!/usr/bin/env bash
# Llama-3-8B from Hugging Face into the files of MindSpeed-LLM's ranks (tensor parallel 2, pipeline parallel 4). Without
# `--save-format legacy`: a distributed checkpoint, which every layout here can load.
#
#   LOAD_DIR=./models/llama3-8b-instruct SAVE_DIR=./model_weights/llama3-8b-tp2-pp4 \
#       scripts/examples/convert_llama3_8b_hf2mcore.sh [more flags ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

exec python scripts/convert_ckpt.py \
  --load-model-type hf \
  --save-model-type mg \
  --save-format legacy \
  --target-tensor-parallel-size 2 \
  --target-pipeline-parallel-size 4 \
  --model-type-hf llama3 \
  --params-dtype bf16 \
  --load-dir "${LOAD_DIR:-./models/llama3-8b-instruct}" \
  --save-dir "${SAVE_DIR:-./model_weights/llama3-8b-tp2-pp4}" \
  "$@"
