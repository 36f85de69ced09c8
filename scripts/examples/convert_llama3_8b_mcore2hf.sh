#!/usr/bin/env bash
# Llama-3-8B from MindSpeed-LLM's files, whatever its layout, or from a run's checkpoints, into a Hugging Face folder.
#
#   LOAD_DIR=./model_weights/llama3-8b-tp2-pp4 SAVE_DIR=./models/mine scripts/examples/convert_llama3_8b_mcore2hf.sh
#
# A reward model: add --orm. An adapter: add --lora-load FOLDER.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

exec python scripts/convert_ckpt.py \
  --load-model-type mg \
  --save-model-type hf \
  --load-dir "${LOAD_DIR:-./model_weights/llama3-8b-tp2-pp4}" \
  --save-dir "${SAVE_DIR:-./models/llama3-8b-converted}" \
  --hf-cfg-dir "${HF_CFG_DIR:-./models/llama3-8b-instruct}" \
  "$@"
