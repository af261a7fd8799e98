#!/usr/bin/env bash
# A run on a Cloud TPU pod, from requesting the pod to deleting it, through the steps of launch/tpu_pod.sh:
#   export NAME=my-run ZONE=us-central2-b TYPE=v4-256 SPOT=1 REPOSITORY=https://...
#   bash launch/tpu_train.sh [--dry-run] pretrain --config=configs/v1.py:1x --workdir=gs://BUCKET/my-run
# The request of a preempted pod is SUSPENDED permanently (cloud.google.com/tpu/docs/queued-resources): another is made, and the
# run resumes.  The pod is deleted when the run has ended or was stopped, or after five failed starts.  Started again, this reconnects.
set -euo pipefail
dry=""
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
case "${1:-}" in
  distill | downstream | finetune | pretrain | quickstart | transfer) command=("$@" --resume) ;;
  *) echo "${1:-nothing}: expected a command of simclr that resumes, such as pretrain" >&2; exit 1 ;;
esac
if [[ "$1 ${TYPE:-}" =~ ^(downstream|quickstart|transfer)\ .*-([0-9]+)$ && "${BASH_REMATCH[2]}" -gt 8 ]]; then # cores or chips
  echo "$1 runs in one process: TYPE=$TYPE has several hosts; take one that ends in -8" >&2; exit 1
fi
if [[ " $* " = *" --overwrite "* ]]; then echo "--overwrite: a pod resumes; delete the run, or name a new --workdir" >&2; exit 1; fi
if [[ " $* " = *" --resume "* ]]; then command=("$@"); fi
pod() { bash "$(dirname "$0")/tpu_pod.sh" ${dry:+--dry-run} "$@"; }
note() { echo "$(date '+%F %T') $*"; }
if [ -n "$dry" ]; then pod create; pod status; pod setup; pod run "${command[@]}"; pod run_status; pod delete; exit; fi
bash "$0" --dry-run "$@" > /dev/null # what is missing or wrong is said before a pod is billed
trap 'note "this script ends; the pod does not: start it again, or bash launch/tpu_pod.sh delete"; exit 130' INT TERM
errors="$(mktemp)"; trap 'rm -f "$errors"' EXIT
ask() { # how the request is, in `state`, which may also be an error such as no network here
  state="$(pod status 2> "$errors")" || { state="$(< "$errors")"; if [[ "$state" = *NOT_FOUND* ]]; then state=NONE; fi; }
}
asked="" made="" started="" report="" tries=0 code=""
while [ -z "$code" ]; do
  ask
  case "$state" in
    NONE)
      note "asking for a pod"
      if pod create; then asked=1 made=1; elif [ -z "$asked" ]; then exit 1; fi ;; # a first failure is the user's mistake
    SUSPENDED)
      note "the pod was preempted: asking for another"
      asked=1 started="" tries=0; pod delete || true ;;
    FAILED) note "the request failed: gcloud compute tpus queued-resources describe $NAME --zone=$ZONE says why"; exit 1 ;;
    ACTIVE)
      asked=1 report="$(pod run_status)" || report=unknown
      note "$report"
      case "${started:-new} ${report##*$'\n'}" in
        *\ running) # the workers wait for one that was rebooted, which has lost the run
          started=1 tries=0
          pod revive "${command[@]}" > /dev/null 2> "$errors" || note "a worker does not answer: $(tail -n 1 "$errors")" ;;
        "1 ended "*) code="${report##* }" ;;
        1\ unknown) ;; # no network here, or the pod is just being preempted
        *) if pod setup && pod run "${command[@]}"; then started=1; elif [ $((tries += 1)) -ge 5 ]; then code=1; fi ;;
      esac ;;
    *) note "$state" ;;
  esac
  if [ "$code:$made:$report" = 1::unknown ]; then note "a pod that may have a run does not answer: IT IS STILL BILLED"; exit 1; fi
  if [ -z "$code" ]; then sleep "${POLL:-60}"; fi
done
until pod delete || true; ask; [ "$state" = NONE ]; do
  note "THE POD IS STILL BILLED, and is deleted again for an hour, or bash launch/tpu_pod.sh delete: $state"
  if [ $((tries += 1)) -ge 60 ]; then exit $((code ? code : 1)); fi
  sleep "${POLL:-60}"
done
exit "$code"
