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
  local title="$1" start="$SECONDS" status=0
  shift
  say "$title: $*"
  "$@" || status=$?
  if ((status)); then say "$title: failed, $((SECONDS - start)) s"; else say "$title: ok, $((SECONDS - start)) s"; fi
  return "$status"
}

# pytest over a part of the tests; a part without a test in it is none the worse.
pytest_part() {
  local status=0
  .venv/bin/python -m pytest "$@" || status=$?
  ((status == 5)) || return "$status"
}

# Runs the functions $1 and $2 at the same time. Shows the output of the first as it comes and that of the second
# afterwards; fails when one of them fails. The first Ctrl-C or SIGTERM interrupts both, which lets pytest end what its
# tests have started; the second one ends them at once.
together() {
  local log first second caught="" status=0
  log="$(mktemp)"
  set -m # a process group each, with SIGINT as usual
  "$1" </dev/null &
  first=$!
  "$2" </dev/null >"$log" 2>&1 &
  second=$!
  set +m
  trap 'pass_on INT' INT
  trap 'pass_on TERM' TERM
  await "$first" || status=$?
  await "$second" || status=$?
  trap - INT TERM
  cat -- "$log"
  rm -f -- "$log"
  if [[ -n "$caught" ]]; then
    kill -KILL -- "-$first" "-$second" 2>/dev/null || true # what they have left running
    kill "-$caught" $$                                     # as if nobody had caught it
  fi
  return "$status"
}

# For `together`, whose variables it uses: the signal $1 has come.
pass_on() {
  local signal=INT
  if [[ -n "$caught" ]]; then signal=KILL; fi
  caught="$1"
  kill "-$signal" -- "-$first" "-$second" 2>/dev/null || true
}

# The status of the background process $1; a signal ends `wait`, not the process.
await() {
  local status
  while true; do
    status=0
    wait "$1" || status=$?
    if ((status < 128)) || ! kill -0 "$1" 2>/dev/null; then return "$status"; fi
  done
}

checks() {
  step "format" .venv/bin/ruff format --check . &&
    step "lint" .venv/bin/ruff check . &&
    step "types" .venv/bin/mypy --strict rlxf workers scripts ray_gpt.py
}

world() { step "tiny world" .venv/bin/python scripts/build_tiny_world.py; }

cluster_tests() { step "tests with Ray or vLLM" pytest_part --durations=15 -m "${slow}(cluster or vllm)"; }

# They fill the cores while a Ray cluster or an engine starts and waits, and give way when it works: it has deadlines.
# Files in order of their names, not of their number of tests: whole runs, which are few and long, come before units.
other_tests() {
  renice -n 5 -p "$BASHPID" >/dev/null
  step "tests without cluster" pytest_part --durations=15 -n 2 --dist loadfile --no-loadscope-reorder -m "${slow}not cluster and not vllm"
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
  together world checks
  if ((${#arguments[@]})); then
    say "tests: pytest -m '$all' ${arguments[*]}"
    exec .venv/bin/python -m pytest -m "$all" "${arguments[@]}"
  fi
  together other_tests cluster_tests
  say "all passed in $SECONDS s"
}

main "$@"
