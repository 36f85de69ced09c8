#!/usr/bin/env bash
# From ShareGPT pairs to an aligned chat model on a CPU: preprocess, offline DPO with LoRA and its evaluation, merge, and
# an answer of the merged model. Takes any file of rows {"conversations": [{"from", "value"}], "chosen": {...},
# "rejected": {...}}; about ten minutes on two cores with SmolLM2-135M (scripts/prepare_smollm2.py makes its folder).
#
#   INPUT=./dataset/dpo_en_demo.json scripts/examples/dpo_smollm2_sharegpt.sh [Hydra overrides of the training ...]
#
#   MODEL  ./models/smollm2-135m    WORK  ./outputs/sharegpt, a folder that must not exist: everything made goes there
set -euo pipefail
readonly INPUT="${INPUT:?set INPUT to a file of ShareGPT pairs}"
readonly MODEL="${MODEL:-./models/smollm2-135m}" WORK="${WORK:-./outputs/sharegpt}"
ROOT="$(dirname "${BASH_SOURCE[0]}")/../.."
readonly ROOT
readonly PYTHON="${PYTHON:-python}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE

"$PYTHON" "$ROOT/scripts/preprocess_data.py" \
  --input "$INPUT" \
  --tokenizer-type PretrainedFromHF \
  --tokenizer-name-or-path "$MODEL" \
  --output-prefix "$WORK/pairs/sharegpt" \
  --handler-name SharegptStylePairwiseHandler \
  --prompt-type chatml \
  --workers 1

"$PYTHON" "$ROOT/ray_gpt.py" --config-name offline_dpo_trainer_smollm2_135m_lora \
  hydra.run.dir="$WORK/run" \
  actor_rollout.load="$MODEL" \
  actor_rollout.data_path="$WORK/pairs/sharegpt" \
  "$@"

"$PYTHON" "$ROOT/scripts/convert_ckpt.py" --load-model-type hf --save-model-type hf \
  --load-dir "$MODEL" --lora-load "$WORK/run/policy/adapter" --save-dir "$WORK/merged" --params-dtype fp32

"$PYTHON" - "$WORK/merged" <<'PYTHON'
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
prompt = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print("answer:", tokenizer.decode(answer, skip_special_tokens=True))
PYTHON
