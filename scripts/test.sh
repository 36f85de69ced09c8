#!/usr/bin/env bash
# What CI runs: formatting, lint, types, and every test that is not marked slow.
#
#   scripts/test.sh [--slow] [pytest arguments ...]
#
#   --slow       the slow tests, too
#   arguments    go to pytest as they are, for example tests/unit -k losses; lint and types run all the same
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
readonly root

say() { printf '[test] %s\n' "$*"; }

# Runs "${@:2}" under the title $1 and says how long it took.
step() {
  local title="$1" start="$SECONDS"
  shift
  say "$title: $*"
  "$@"
  say "$title: ok, $((SECONDS - start)) s"
}

# pytest over a part of the tests; a part without a test in it is none the worse.
pytest_part() {
  local status=0
  .venv/bin/python -m pytest "$@" || status=$?
  ((status == 5)) || return "$status"
}

main() {
  local slow="not slow and " all="not slow" arguments=() argument
  for argument in "$@"; do
    case "$argument" in
      --slow) slow="" all="" ;;
      -h | --help)
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        return
        ;;
      *) arguments+=("$argument") ;;
    esac
  done
  cd "$root"
  export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE # spinning threads on shared cores cost a factor of 20

  step "environment" ./scripts/install.sh --dev
  step "format" .venv/bin/ruff format --check .
  step "lint" .venv/bin/ruff check .
  step "types" .venv/bin/mypy --strict rlxf workers scripts ray_gpt.py
  step "tiny world" .venv/bin/python scripts/build_tiny_world.py
  if ((${#arguments[@]})); then
    say "tests: pytest -m '$all' ${arguments[*]}"
    exec .venv/bin/python -m pytest -m "$all" "${arguments[@]}"
  fi
  # A Ray cluster or a vLLM engine needs the machine for itself; everything else runs on two cores at a time.
  step "tests without cluster" pytest_part -n 2 --dist loadfile -m "${slow}not cluster and not vllm"
  step "tests with Ray or vLLM" pytest_part -m "${slow}(cluster or vllm)"
  say "all passed in $SECONDS s"
}

main "$@"
