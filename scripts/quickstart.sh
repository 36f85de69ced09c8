#!/usr/bin/env bash
# From a fresh clone to a policy that has learnt from a reward model: installs the CPU lane into .venv, builds the tiny
# world (cached in models/tiny), trains on it with Ray, Megatron-core and vLLM, and prints the final table.
#
#   scripts/quickstart.sh [--fresh] [Hydra overrides ...]
#
#   --fresh      build the tiny world anew
#   overrides    go to ray_gpt.py as they are, for example training.train_iters=20
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
readonly root

say() { printf '[quickstart] %s\n' "$*"; }

now_ms() { date +%s%3N; }

# Milliseconds $1 as seconds.
seconds() { printf '%d.%01d' "$(($1 / 1000))" "$(($1 % 1000 / 100))"; }

# Runs "$@" and hands SIGINT and SIGTERM on to it: a script that is stopped must not leave a training run behind.
supervise() {
  local status child caught
  set -m # its own process group, with SIGINT as usual
  "$@" &
  child=$!
  set +m
  trap 'caught=1; kill -INT "$child" 2>/dev/null || true' INT
  trap 'caught=1; kill -TERM "$child" 2>/dev/null || true' TERM
  while true; do
    caught=0
    status=0
    wait "$child" || status=$?
    if ((!caught)); then break; fi # else the signal ended the wait, not the child
  done
  trap - INT TERM
  return "$status"
}

main() {
  local build=() overrides=() argument started installed built finished status=0
  for argument in "$@"; do
    case "$argument" in
      --fresh) build+=(--fresh) ;;
      -h | --help)
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        return
        ;;
      *) overrides+=("$argument") ;;
    esac
  done
  cd "$root"

  started="$(now_ms)"
  say "1/3 environment"
  ./scripts/install.sh
  installed="$(now_ms)"

  say "2/3 tiny world"
  OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python scripts/build_tiny_world.py ${build[@]+"${build[@]}"}
  built="$(now_ms)"

  local command=(python ray_gpt.py --config-name online_dpo_trainer_tiny ${overrides[@]+"${overrides[@]}"})
  say "3/3 ${command[*]}"
  supervise ".venv/bin/${command[0]}" "${command[@]:1}" || status=$?
  finished="$(now_ms)"
  say "seconds: install $(seconds $((installed - started))) | assets $(seconds $((built - installed)))" \
    "| run $(seconds $((finished - built))) | without install $(seconds $((finished - installed)))"
  return "$status"
}

main "$@"
