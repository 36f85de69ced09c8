#!/usr/bin/env bash
# Online DPO of Llama-3-8B-Instruct on two machines with eight NPUs each. First start the cluster, from the same
# checkout on both:
#
#   ray start --head --port 6344 --resources='{"NPU": 8}'              # this machine; or scripts/cluster_up.sh head
#   ray start --address="IP_ADDRESS:6344" --resources='{"NPU": 8}'     # the other one; or scripts/cluster_up.sh worker
#
# then, on the first machine:
#
#   DATA_PATH=./dataset/descriptiveness.parquet POLICY=./models/llama3-8b-instruct REWARD=./models/llama3-8b-rm \
#       scripts/examples/online_dpo_llama3_8b.sh [Hydra overrides ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

exec python ray_gpt.py --config-name online_dpo_trainer_llama3_8b \
  actor_rollout.data_path="${DATA_PATH:-./dataset/descriptiveness.parquet}" \
  actor_rollout.load="${POLICY:-./models/llama3-8b-instruct}" \
  ref.load="${POLICY:-./models/llama3-8b-instruct}" \
  reward.load="${REWARD:-./models/llama3-8b-rm}" \
  actor_rollout.save="${CKPT_SAVE_DIR:-./ckpt}" \
  "$@"
