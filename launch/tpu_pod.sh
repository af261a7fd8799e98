#!/usr/bin/env bash
# A run on a Cloud TPU pod through queued resources; every worker runs the same simclr command.
#   NAME=my-run ZONE=us-central2-b TYPE=v4-256 bash launch/tpu_pod.sh [--dry-run] STEP
#   create | status | setup | run COMMAND | run_status | logs | stop | delete;  launch/tpu_train.sh runs them all but logs and stop
#   revive COMMAND: run, but only on the workers that lost it, as by a reboot
#   ... run pretrain --config=configs/v1.py:1x --workdir=gs://BUCKET/my-run --resume
# TYPE counts as Google does: cores for v2 to v5p (v4-256 = 128 chips), chips for v5litepod and v6e.
# One of SPOT=1, RESERVED=1, FLEX_START=4h (v5e and v6e, 7 days at most), or none; SERVICE_ACCOUNT=name of the workers.
set -euo pipefail
dry=""
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
action="${1:?create, status, setup, run, revive, run_status, logs, stop or delete}"
shift
name="${NAME:?name of the pod}" zone="${ZONE:?zone}"
if [[ ! "$name" =~ ^[a-z][a-z0-9-]{0,39}$ ]]; then echo "NAME=$name: expected [a-z0-9-], 40 at most" >&2; exit 1; fi
for key in SPOT RESERVED; do
  if [[ "${!key:-}" != "" && "${!key}" != 1 ]]; then echo "$key=${!key}: expected 1, or nothing for no" >&2; exit 1; fi
done
if [[ "${SPOT:+x}${RESERVED:+x}${FLEX_START:+x}" = xx* ]]; then echo "SPOT, RESERVED, FLEX_START: give one" >&2; exit 1; fi

do_() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
on() { do_ gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"; }
runtime() {
  case "$TYPE" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}
create() {
  local flags=(${SPOT:+--spot} ${RESERVED:+--reserved} ${SERVICE_ACCOUNT:+--service-account="$SERVICE_ACCOUNT"})
  [ -z "${FLEX_START:-}" ] || flags+=(--provisioning-model=flex-start --max-run-duration="$FLEX_START")
  do_ gcloud ${FLEX_START:+alpha} compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
    --accelerator-type="${TYPE:?accelerator type such as v4-256}" --runtime-version="$(runtime)" ${flags[@]+"${flags[@]}"}
}
status() { do_ gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)'; }
setup() {
  local repository
  printf -v repository %q "${REPOSITORY:?git address of the code}"
  on all "if [ -d simclr_jax ]; then git -C simclr_jax pull --ff-only; else git clone -- $repository simclr_jax; fi; cd simclr_jax && ACCELERATOR=tpu bash launch/setup.sh"
}
restart() { # on all workers, with two values of the environment here; a folder of this machine means nothing there
  local command settings="" key
  printf -v command '%q ' "$@"
  for key in JAX_COMPILATION_CACHE_DIR SIMCLR_HANG_SECONDS; do
    if [[ "${!key:-}" =~ ^(gs://.*|[0-9.]+)$ ]]; then printf -v settings '%s%s=%q ' "$settings" "$key" "${!key}"; fi
  done
  on all "cd simclr_jax && ${settings}bash launch/restart.sh ${command% }"
}
delete() { do_ gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet; }
case "$action" in
  create | status | setup | delete) "$action" "$@" ;;
  run) restart start "${@:?command of simclr}" ;;
  revive) restart revive "${@:?command of simclr}" ;;
  run_status) on 0 "cd simclr_jax && bash launch/restart.sh status" ;;
  logs) on "${WORKER:-0}" "cd simclr_jax && bash launch/restart.sh log" ;;
  stop) on all "cd simclr_jax && bash launch/restart.sh stop" ;;
  *) echo "$action: expected create, status, setup, run, revive, run_status, logs, stop or delete" >&2; exit 1 ;;
esac
