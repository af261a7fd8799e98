#!/usr/bin/env bash
# Keeps one run of simclr going in the background on this machine: restarts it after exit code 42 (preempted and saved) and
# 128 and above (killed, or a peer was lost), at most 50 times, until it ends by itself or is stopped.
#   bash launch/restart.sh start pretrain --config=configs/v1.py:1x --workdir=gs://BUCKET/my-run --resume
#   bash launch/restart.sh revive pretrain ...      start with --resume, but only where the run was lost, as by a reboot
#   bash launch/restart.sh status | log | stop
# Output goes to run.log.  A second start while the first run is active changes nothing.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
action="${1:-}"
shift || true

alive() { # whether the process in run.pid is still this script, of this checkout
  [ -s run.pid ] && [ "/proc/$(< run.pid)/cwd" -ef . ] && tr '\0' ' ' < "/proc/$(< run.pid)/cmdline" 2> /dev/null | grep -q "launch/restart.sh "
}

resuming() { # `again`: the command of a start after the first, which would delete what was saved, or find that the folder is not empty
  again=("$@")
  case "${1:-}" in
    distill | downstream | finetune | pretrain | quickstart | transfer) again=("${@/#--overwrite/--resume}" --resume) ;;
  esac
}

case "$action" in
  start)
    if alive; then echo "a run is already active"; exit 0; fi
    rm -f run.exit run.stopped
    setsid nohup bash launch/restart.sh keep "$@" >> run.log 2>&1 < /dev/null &
    echo $! > run.pid ;;
  revive) # by now the other workers may have been started again
    resuming "$@"
    alive || [ -e run.exit ] || [ -e run.stopped ] || exec bash launch/restart.sh start "${again[@]}" ;;
  keep)
    stopped="" child=""
    resuming "$@"
    trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child" 2> /dev/null' TERM
    for ((restarts = 0; restarts <= 50; restarts++)); do
      .venv/bin/simclr "$@" &
      child=$!
      [ -z "$stopped" ] || kill -TERM "$child" # the signal came before there was a child to pass it to
      # A trapped signal ends `wait` before the process has ended.
      while wait "$child"; code=$?; kill -0 "$child" 2> /dev/null; do :; done
      if [ -n "$stopped" ] || { [ "$code" -ne 42 ] && [ "$code" -lt 128 ]; }; then break; fi
      sleep "${PAUSE:-30}" &
      child=$!
      wait "$child"
      [ -z "$stopped" ] || break
      set -- "${again[@]}"
    done
    # A machine that is shut down sends the same signal as `stop`, and then the run has not ended.
    if [ -z "$stopped" ] || [ -e run.stopped ] || { [ "$code" -ne 42 ] && [ "$code" -lt 128 ]; }; then echo "$code" > run.exit; fi ;;
  status)
    tail -n 5 run.log 2> /dev/null | awk 1 # ends the last line, so that the answer has its own
    if alive; then echo running; elif [ -s run.exit ]; then echo "ended $(< run.exit)"; else echo none; fi ;;
  log) tail -n 50 -f run.log ;;
  stop)
    touch run.stopped
    if alive; then kill -TERM "$(< run.pid)"; fi ;;
  *) echo "$action: expected start, status, log or stop" >&2; exit 1 ;;
esac
