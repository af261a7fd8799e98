#!/usr/bin/env bash
# One run in several processes on one machine: to try what a cluster does, or, where it has that many GPUs, with one per process.
#   bash launch/multiprocess.sh [--dry-run] 2 pretrain --config=smoke --workdir=runs/two
# Ends with the highest exit code; a process that fails ends the others within seconds (runtime/watchdog.py).
set -euo pipefail
dry=""
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
count="${1:?number of processes}"
if [[ ! "$count" =~ ^[1-9][0-9]*$ ]]; then echo "$count: expected the number of processes" >&2; exit 1; fi
shift
port="${PORT:-8476}"
[ -n "$dry" ] || . "$(dirname "$0")/setup.sh"
# JAX gives each process a GPU of its own under SLURM and Open MPI; here every process would take all of them.
gpus="$(nvidia-smi -L 2> /dev/null | grep -c '^GPU ')" || gpus=0
if [ -n "${CUDA_VISIBLE_DEVICES+x}" ]; then gpus="$(tr , '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c .)" || gpus=0; fi
pids=()
trap 'kill -TERM ${pids[@]+"${pids[@]}"} 2>/dev/null' TERM INT
for ((i = 0; i < count; i++)); do
  command=(simclr "$@" "--coordinator=localhost:$port" "--num_processes=$count" "--process_id=$i")
  if [ "$count" -gt 1 ] && [ "$gpus" -ge "$count" ]; then command=(env "JAX_LOCAL_DEVICE_IDS=$i" "${command[@]}"); fi
  if [ -n "$dry" ]; then printf '%q ' "${command[@]}"; echo "&"; continue; fi
  "${command[@]}" &
  pids+=($!)
done
[ -z "$dry" ] || exit 0
worst=0
for pid in ${pids[@]+"${pids[@]}"}; do
  code=0
  wait "$pid" || code=$?
  # A trapped signal ends `wait` before the process has ended.
  while kill -0 "$pid" 2>/dev/null; do code=0; wait "$pid" || code=$?; done
  if [ "$code" -gt "$worst" ]; then worst=$code; fi
done
exit "$worst"
