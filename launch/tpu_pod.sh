#!/usr/bin/env bash
# A run on a Cloud TPU pod through queued resources; every worker runs the same simclr command.
#   NAME=my-run ZONE=us-central2-b TYPE=v4-256 bash launch/tpu_pod.sh [--dry-run] create | status | setup | run | logs | stop | delete
#   ... run pretrain --config=configs/v1.py:1x --workdir=gs://BUCKET/my-run --resume
# TYPE counts as Google does: cores of a v2 to v5p (v4-256 = 128 chips), chips of a v5litepod and v6e.  SPOT=1 for spot.
set -euo pipefail
dry=""
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
action="${1:?create, status, setup, run, logs, stop or delete}"
shift
name="${NAME:?name of the pod}" zone="${ZONE:?zone}"
if [[ ! "$name" =~ ^[a-z][a-z0-9-]{0,39}$ ]]; then echo "NAME=$name: expected [a-z0-9-], 40 at most" >&2; exit 1; fi

do_() {
  if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
everywhere() {
  do_ gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}
runtime() {
  case "${TYPE:?accelerator type such as v4-256}" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

case "$action" in
  create)
    do_ gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
      --accelerator-type="${TYPE:?}" --runtime-version="$(runtime)" ${SPOT:+--spot} ;;
  status) do_ gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)' ;;
  setup)
    printf -v repository %q "${REPOSITORY:?git address of the code}"
    everywhere "git clone -- $repository simclr_jax 2>/dev/null || git -C simclr_jax pull --ff-only; \
cd simclr_jax && python3 -m venv .venv && .venv/bin/pip install --quiet -r requirements-lock.txt 'jax[tpu]==0.10.2' && .venv/bin/pip install --quiet --no-deps -e ." ;;
  run)
    # Restarted where it was preempted; its output goes to a file on each worker, so that losing ssh loses nothing.
    printf -v command '%q ' .venv/bin/simclr "$@"
    printf -v loop %q "while $command; code=\$?; [ \$code = 42 ] || [ \$code -ge 128 ]; do sleep 30; done"
    everywhere "cd simclr_jax && nohup bash -c $loop >> run.log 2>&1 < /dev/null & disown" ;;
  logs) do_ gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="${WORKER:-0}" --command="tail -n 50 -f simclr_jax/run.log" ;;
  stop) everywhere "pkill -TERM -f bin/simclr" ;;
  delete) do_ gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet ;;
  *) echo "$action: expected create, status, setup, run, logs, stop or delete" >&2; exit 1 ;;
esac
