#!/usr/bin/env bash
# Starts a run again while it ends with exit code 75: it cannot go on now, but later it can. Every other exit code ends
# this script at once, with the same code: 0, 2 for a wrong recipe, 128 + signal for a run that was stopped or killed.
#
#   scripts/supervise.sh [options] [--] COMMAND ...
#   scripts/supervise.sh -- python ray_gpt.py --config-name online_dpo_trainer_mine hydra.run.dir=outputs/mine
#
#   --max-restarts N   restarts in a row (default 10); then the script ends with exit code 75
#   --backoff S        seconds before a restart (default 10); each further one waits twice as long
#   --max-backoff S    but at most this long (default 300)
#   --long-run S       after a run that lasted this long (default 1800), both counts begin anew. Keep it above
#                      training.start_timeout_s + resilience.node_wait_s, which pass without progress
#   --on-kill          start again after SIGKILL (137), too: the kernel kills a process that needs too much memory, but
#                      a person who types `kill -9` means it
#   --no-forward       do not hand signals on: what sends them reaches every process itself, as `ray job stop` does
#
# SIGINT, SIGTERM, SIGQUIT and SIGHUP are handed on to the command, each as often as it comes. The script waits for the
# command, and starts nothing after a signal.
#
# The same command continues a run only in the same run folder. For ray_gpt.py and `rlxf train` without hydra.run.dir
# (and without training.resume=last) the script adds one, hydra.run.dir=outputs/RECIPE/DATE, for all starts.
set -euo pipefail

say() { printf '[supervise] %s\n' "$*" >&2; }

die() {
  printf '[supervise] error: %s\n' "$*" >&2
  exit 2
}

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

# Settings, by their defaults; times in milliseconds.
max_restarts=10 backoff=10000 max_backoff=300000 long_run=1800000 on_kill=0 forward=1
command=() resume="" # what is run, and its training.resume

milliseconds() {
  [[ "$2" =~ ^([0-9]{1,9})(\.([0-9]{1,3}))?$ ]] || die "$1 $2 is not a number of seconds, such as 10 or 0.5"
  local fraction="${BASH_REMATCH[3]}000"
  echo $((10#${BASH_REMATCH[1]} * 1000 + 10#${fraction:0:3}))
}

in_seconds() { printf '%d.%03d' $(($1 / 1000)) $(($1 % 1000)); }

for_people() { in_seconds "$1" | sed 's/\.\{0,1\}0*$//'; } # without zeros at the end

parse_arguments() {
  while (($#)); do
    if [[ "$1" == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case "$1" in
      --on-kill) on_kill=1 && shift && continue ;;
      --no-forward) forward=0 && shift && continue ;;
      --) shift && break ;;
      -*) ;;
      *) break ;;
    esac
    (($# > 1)) || die "$1 is unknown, or needs a value. See $0 --help"
    case "$1" in
      --max-restarts)
        [[ "$2" =~ ^[0-9]{1,6}$ ]] || die "--max-restarts $2 is not a number of restarts, such as 10"
        max_restarts=$((10#$2))
        ;;
      --backoff) backoff="$(milliseconds "$1" "$2")" ;;
      --max-backoff) max_backoff="$(milliseconds "$1" "$2")" ;;
      --long-run) long_run="$(milliseconds "$1" "$2")" ;;
      *) die "unknown argument $1. See $0 --help" ;;
    esac
    shift 2
  done
  (($#)) || die "there is no command to run. See $0 --help"
  command=("$@")
}

# A restart goes on where the run stopped only if it finds the folder where the run began. See to it that every start
# has the same one; refuse what cannot have it.
fix_run_folder() {
  local argument before="" ours=0 recipe="" folder="" key value
  for argument in "${command[@]}"; do
    key="${argument%%=*}" value="${argument#*=}"
    case "${key#"${key%%[!+]*}"}" in # without the + or ++ before it
      hydra.run.dir) folder="$value" ;;
      training.resume) resume="$value" ;;
      --config-name | -cn) if [[ "$argument" == *=* ]]; then recipe="$value"; fi ;;
      --multirun | -m) ((!ours)) || die "$argument: a sweep cannot be continued. Supervise each of its runs by itself." ;;
    esac
    if [[ "$before" == --config-name || "$before" == -cn ]]; then recipe="$argument"; fi
    if [[ "${argument##*/}" == ray_gpt.py || ("${before##*/}" == rlxf && "$argument" == train) ]]; then ours=1; fi
    before="$argument"
  done
  if ((!ours)); then
    resume=""
    return
  fi
  [[ "$folder" != *"\${"* ]] ||
    die "hydra.run.dir=$folder may name another folder at each start. Write the folder out."
  case "$resume" in
    "" | auto | last | never) ;;
    *)
      die "training.resume=$resume would begin from there at each start. Start the run once without this script," \
        "with hydra.run.dir=FOLDER; after its first checkpoint, supervise it without training.resume."
      ;;
  esac
  if [[ -n "$folder" || "$resume" == last || -z "$recipe" ]]; then return; fi
  recipe="${recipe%.yaml}"
  [[ "$recipe" =~ ^[A-Za-z0-9_./-]+$ ]] || die "name the run folder, the same at each start: hydra.run.dir=FOLDER"
  folder="outputs/$recipe/$(date +%Y-%m-%d_%H-%M-%S)"
  say "run folder: $folder"
  command+=("hydra.run.dir=$folder")
}

# training.resume=never has done its work at the first start: a restart would refuse the run's own checkpoints.
allow_resume() {
  local i
  for i in "${!command[@]}"; do
    if [[ "$resume" == never && "${command[i]}" =~ ^\+*training\.resume=never$ ]]; then
      command[i]=training.resume=auto
    fi
  done
}

exec {idle}<> <(:)

signals=() delivered=0 child="" hears=1 # signals that came, how many of them the child has got

# Each signal goes to the child once, also one that comes while the child is being started: a trap runs between two
# commands, so the test and the count are one.
deliver() {
  local index
  while [[ -n "$child" ]] && (((index = delivered) < ${#signals[@]} && ++delivered)); do
    if ((hears)); then kill -s "${signals[index]}" -- "$child" 2>/dev/null || true; fi
  done
}

on_signal() {
  signals+=("$1")
  deliver
}

# Runs "$@"; its exit code into `status`. It has a process group of its own, because Ctrl-C reaches the whole group of
# this script and the command would get the signal twice.
run_child() {
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  deliver
  # Not with `wait` alone: if a signal comes at the moment when the command ends, bash gives a status that is neither the
  # command's nor the signal's. Nothing ever comes from this pipe, so reading it is a pause without a process.
  while kill -0 -- "$child" 2>/dev/null; do
    read -rt 0.1 -u "$idle" _ || true
  done
  status=0
  wait "$child" || status=$?
  child=""
}

# A pause of $1 milliseconds that a signal ends. It has no process of its own: one that is just being started may lose a
# signal.
rest() {
  local left="$1"
  while ((left > 0 && !${#signals[@]})); do
    read -rt 0.1 -u "$idle" _ || true
    left=$((left - 100))
  done
}

# Milliseconds since the machine started; no change of the clock moves it.
now() {
  local uptime
  read -r uptime _ </proc/uptime
  echo $((10#${uptime/./} * 10))
}

may_go_on() { (($1 == 75 || (on_kill && $1 == 137))); }

main() {
  if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    usage
    return
  fi
  parse_arguments "$@"
  fix_run_folder
  local status=0 restarts=0 pause="$backoff" began lasted name
  for name in HUP INT QUIT TERM; do
    # shellcheck disable=SC2064 # the name of now
    trap "on_signal $name" "$name"
  done
  while true; do
    hears="$forward" began="$(now)"
    run_child "${command[@]}"
    lasted=$(($(now) - began))
    if ((${#signals[@]})) || ! may_go_on "$status"; then exit "$status"; fi
    if ((lasted >= long_run)); then restarts=0 pause="$backoff"; fi
    if ((restarts >= max_restarts)); then
      say "exit code $status, and $restarts restarts in a row have not helped: giving up. The same command goes on later."
      exit "$status"
    fi
    if ((pause > max_backoff)); then pause="$max_backoff"; fi
    ((++restarts))
    say "exit code $status after $((lasted / 1000)) s: starting again in $(for_people "$pause") s ($restarts of $max_restarts)"
    rest "$pause"
    if ((${#signals[@]})); then
      say "stopped by SIG${signals[0]}"
      exit $((128 + $(kill -l "${signals[0]}")))
    fi
    pause=$((pause * 2))
    allow_resume
  done
}

main "$@"
