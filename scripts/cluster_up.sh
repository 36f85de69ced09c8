#!/usr/bin/env bash
# Starts this machine's part of a Ray cluster so that nobody without the token can use it: whoever reaches an open Ray
# can run programs on it. Binding to loopback alone does not close it; the token (and a firewall) does.
#
#   scripts/cluster_up.sh head   [options] [-- more `ray start` arguments]
#   scripts/cluster_up.sh worker --address HEAD_IP:6344 [options] [-- more `ray start` arguments]
#   scripts/cluster_up.sh wait   --address HEAD_IP:6344 --nodes N [--timeout S]
#
#   --resources JSON     what this node offers, for example '{"NPU": 8}'
#   --node-ip IP         address of the private network interface (default: Ray's guess)
#   --port N             of the head (default 6344)
#   --dashboard-port N   of the head's dashboard (default 8260), on loopback: reach it through `ssh -L`
#   --expose-dashboard   let the dashboard listen on every interface
#   --base-port N        first of seven ports of this node's services (default 6350), for a firewall to open
#   --print              print the `ray start` line instead of running it
#
# `wait` returns when N nodes, this one among them, are in the cluster; with exit code 75 after S seconds (default 600).
#
# The token is a file: RAY_AUTH_TOKEN_PATH, or .ray/auth_token in the home folder. `head` makes one if there is none;
# copy it to every worker, with mode 600. `ray stop` ends this node's part.
set -euo pipefail
umask 077

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
readonly root
readonly oldest_ray=2.52 # the first with token authentication

say() { printf '[cluster] %s\n' "$*"; }

die() {
  printf '[cluster] error: %s\n' "$*" >&2
  exit 2
}

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

# The project's environment if there is one, else the machine's.
find_ray() {
  if [[ -x "$root/.venv/bin/ray" ]]; then
    echo "$root/.venv/bin/ray"
  else
    command -v ray || die "no ray in $root/.venv/bin nor on the PATH. Install a lane of this project first."
  fi
}

check_version() {
  local version
  version="$("$1" --version 2>/dev/null | sed -n 's/^ray, version \([0-9]*\.[0-9]*\).*/\1/p')"
  [[ -n "$version" ]] || die "$1 --version does not say a version."
  [[ "$(printf '%s\n' "$oldest_ray" "$version" | sort -V | head -n 1)" == "$oldest_ray" ]] ||
    die "Ray $version has no token authentication. Install Ray $oldest_ray or newer."
}

# Ray gives its worker processes the ports 10002 to 19999 and refuses to put a service there.
check_port() {
  if ! [[ "$2" =~ ^[1-9][0-9]{3,4}$ ]] || (($2 < 1024 || $2 > 65535)); then
    die "$1 $2 is not a port from 1024 to 65535."
  fi
  (($2 < 10002 || $2 > 19999)) || die "$1 $2 lies in the range of Ray's worker processes, 10002 to 19999."
}

# Only a JSON object of numbers goes on to Ray.
check_resources() {
  python3 -c '
import json, sys
value = json.loads(sys.argv[1])
sys.exit(not (isinstance(value, dict) and all(type(v) in (int, float) and v >= 0 for v in value.values())))
' "$1" 2>/dev/null || die "--resources $1 is not a JSON object of numbers. Example: --resources '{\"NPU\": 8}'"
}

# Token authentication, whatever the machine's default is; never without a token that only this user can read.
require_token() {
  local ray="$1" file="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
  [[ "${RAY_AUTH_MODE:-token}" == token ]] ||
    die "RAY_AUTH_MODE=$RAY_AUTH_MODE would open the cluster to everybody. Unset it."
  export RAY_AUTH_MODE=token
  if [[ ! -s "$file" && "$role" == head && -z "${RAY_AUTH_TOKEN_PATH:-}" ]]; then
    say "making a token in $file"
    "$ray" get-auth-token --generate >/dev/null
  fi
  [[ -s "$file" ]] || die "there is no token in $file. Copy it from the head: scp HEAD:.ray/auth_token $file"
  chmod 600 -- "$file"
}

# Answers quickly when a node is lost; a pause of some seconds is not a loss.
export_health_check() {
  export RAY_health_check_initial_delay_ms="${RAY_health_check_initial_delay_ms:-5000}"
  export RAY_health_check_period_ms="${RAY_health_check_period_ms:-2000}"
  export RAY_health_check_timeout_ms="${RAY_health_check_timeout_ms:-2000}"
  export RAY_health_check_failure_threshold="${RAY_health_check_failure_threshold:-3}"
}

# Every process of Ray holds hundreds of sockets.
raise_open_files() {
  local limit
  limit="$(ulimit -Sn)"
  [[ "$limit" == unlimited ]] || ((limit >= 32768)) || ulimit -Sn 32768 2>/dev/null ||
    say "only $limit files may be open; large clusters need 32768 (ulimit -n)"
}

# Settings, by their defaults; parse_arguments changes them.
role="" address="" resources="" node_ip="" port=6344 dashboard_port=8260 base=6350
dashboard_host=127.0.0.1 print=0 more=() nodes="" timeout=600

parse_arguments() {
  role="${1:-}"
  [[ "$role" == head || "$role" == worker || "$role" == wait ]] ||
    die "the first argument is head or worker (or wait), got '$role'. See $0 --help"
  shift
  while (($#)); do
    if [[ "$1" == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case "$1" in
      --expose-dashboard) dashboard_host=0.0.0.0 && shift && continue ;;
      --print) print=1 && shift && continue ;;
      --) shift && more=("$@") && break ;;
    esac
    (($# > 1)) || die "$1 is unknown, or needs a value. See $0 --help"
    case "$1" in
      --address) address="$2" ;;
      --resources) resources="$2" ;;
      --node-ip) node_ip="$2" ;;
      --port) port="$2" ;;
      --dashboard-port) dashboard_port="$2" ;;
      --base-port) base="$2" ;;
      --nodes) nodes="$2" ;;
      --timeout) timeout="$2" ;;
      *) die "unknown argument $1. See $0 --help" ;;
    esac
    shift 2
  done
}

check_arguments() {
  check_port --port "$port"
  check_port --dashboard-port "$dashboard_port"
  check_port --base-port "$base"
  check_port "--base-port + 6:" "$((base + 6))"
  local fixed
  for fixed in "$port" "$dashboard_port"; do
    ((fixed < base || fixed > base + 6)) || die "port $fixed is one of the seven from --base-port $base. Move one."
  done
  if [[ -n "$resources" ]]; then check_resources "$resources"; fi
  if [[ "$role" != head && -z "$address" ]]; then die "a worker needs --address HEAD_IP:$port"; fi
  if [[ "$role" == wait ]]; then
    [[ "$address" =~ ^[^:/]+:[0-9]+$ ]] || die "--address $address is not HEAD_IP:PORT, such as 10.0.0.1:$port"
    [[ "$nodes" =~ ^[1-9][0-9]{0,4}$ ]] || die "wait needs --nodes N, a number of nodes; got '$nodes'."
    [[ "$timeout" =~ ^[1-9][0-9]{0,5}$ ]] || die "--timeout $timeout is not a number of seconds."
  fi
  if [[ "$role" == head && -n "$address" ]]; then die "--address is for workers; this is the head."; fi
}

# The program `ray` of $1 into the array `command_line`. Ray starts some of its processes through a shell line in which
# the interpreter is not quoted; where its path needs quotes, a link that needs none stands in for the environment.
make_program() {
  local ray="$1" environment link
  local plain='^[A-Za-z0-9_./+@%:,=-]+$'
  if [[ "$ray" =~ $plain ]]; then
    command_line=("$ray")
    return
  fi
  environment="$(dirname "$(dirname "$ray")")"
  link="$HOME/.ray/environment-$(printf '%s' "$environment" | sha256sum | cut -c 1-12)"
  [[ "$link" =~ $plain ]] ||
    die "Ray cannot start from $environment: spaces in the path. Move it, or set HOME to a folder without spaces."
  mkdir -p -- "$HOME/.ray"
  ln -sfn -- "$environment" "$link"
  command_line=("$link/bin/python" "$link/bin/ray")
}

# The `ray start` line into the array `command_line`.
make_command_line() {
  make_program "$1"
  command_line+=(start
    "--object-manager-port=$base" "--node-manager-port=$((base + 1))" "--dashboard-agent-grpc-port=$((base + 2))"
    "--dashboard-agent-listen-port=$((base + 3))" "--runtime-env-agent-port=$((base + 4))"
    "--metrics-export-port=$((base + 5))")
  if [[ "$role" == head ]]; then
    command_line+=(--head --disable-usage-stats "--port=$port" "--ray-client-server-port=$((base + 6))"
      "--dashboard-host=$dashboard_host" "--dashboard-port=$dashboard_port")
  else
    command_line+=("--address=$address")
  fi
  if [[ -n "$node_ip" ]]; then command_line+=("--node-ip-address=$node_ip"); fi
  if [[ -n "$resources" ]]; then command_line+=("--resources=$resources"); fi
  command_line+=(${more[@]+"${more[@]}"})
}

# Until `nodes` nodes are in the cluster at `address`, with the interpreter beside the program `ray`, $1.
wait_for_nodes() {
  local deadline=$((SECONDS + timeout))
  until (exec 3<>"/dev/tcp/${address%:*}/${address##*:}") 2>/dev/null; do
    if ((SECONDS >= deadline)); then
      printf '[cluster] error: nothing answers at %s after %d s\n' "$address" "$timeout" >&2
      exit 75
    fi
    sleep 1
  done
  require_token "$1" # a head makes it before it answers
  exec "$(dirname "$1")/python" -c '
import sys, time
import ray

address, wanted, limit = sys.argv[1], int(sys.argv[2]), time.monotonic() + float(sys.argv[3])
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
while (joined := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() >= limit:
        print(f"[cluster] error: {joined} of {wanted} nodes have joined {address} in time", file=sys.stderr)
        sys.exit(75)
    time.sleep(1)
' "$address" "$nodes" "$((deadline - SECONDS))"
}

main() {
  if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    usage
    return
  fi
  parse_arguments "$@"
  check_arguments
  local ray command_line
  ray="$(find_ray)"
  check_version "$ray"
  if [[ "$role" == wait ]]; then
    wait_for_nodes "$ray"
  fi
  make_command_line "$ray"
  if ((print)); then
    printf '%q ' "${command_line[@]}"
    printf '\n'
    return
  fi
  require_token "$ray"
  export_health_check
  # Ray starts a process per core beforehand; the workers of a run have an environment of their own and never use them.
  export RAY_prestart_worker_first_driver="${RAY_prestart_worker_first_driver:-0}"
  export RAY_worker_niceness="${RAY_worker_niceness:-0}" # Ray's 15: hardly any CPU beside another busy process
  raise_open_files
  if [[ "$role" == head && "$dashboard_host" != 127.0.0.1 ]]; then
    say "the dashboard listens on every interface; it asks for the token, but open port $dashboard_port to few"
  fi
  exec "${command_line[@]}"
}

main "$@"
