#!/usr/bin/env bash
# Start a run as the original scripts do; flags behind the first word go to the trainer as they are.
#
#   MODEL=internlm-xcomposer2-vl-7b DATA=data.txt ./torchrun.sh full --output_dir output/pets
#   MODEL=… DATA=… GPUS_PER_NODE=8 NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 ./torchrun.sh lora
#   ./torchrun.sh demo [OUT]
#
# A run on one machine takes a free port of its own, so several can run at once; MASTER_PORT (by default 6001
# with more machines) names one.
#
# Exit status: the trainer's own (0, 2, 75, …), where torchrun itself says 1 for every failure.
set -euo pipefail

usage="usage: [MODEL=folder DATA=data.txt] $0 full|lora|demo [flags]"
mode=${1:-}
shift || true
cd "$(dirname "$0")"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

case $mode in
  demo) exec python -m trainer.demo "$@" ;;
  full) extra=() ;;
  lora) extra=(--use_lora True) ;;
  *) echo "$usage" >&2; exit 2 ;;
esac

ranks=${GPUS_PER_NODE:-$(python -c 'import torch; print(max(1, torch.accelerator.device_count()))')}
if [ "${NNODES:-1}" = 1 ] && [ -z "${MASTER_PORT:-}" ]; then
  meeting=(--standalone)
else
  meeting=(--nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}")
  meeting+=(--master_addr "${MASTER_ADDR:-localhost}" --master_port "${MASTER_PORT:-6001}")
fi
XCOMPOSER_STATUS_FILE=$(mktemp)
export XCOMPOSER_STATUS_FILE
trap 'rm -f "$XCOMPOSER_STATUS_FILE"' EXIT
set -m # a process group of its own, so that a signal to this script reaches the trainer once, through us
# torchrun passes the listed signals on, and lets the step and its save finish for ten minutes.
torchrun --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 600 \
    --nproc_per_node "$ranks" "${meeting[@]}" -m trainer.main \
    ${MODEL:+--model_name_or_path "$MODEL"} ${DATA:+--data_path "$DATA"} "${extra[@]}" "$@" &
run=$!
for signal in INT TERM USR1; do
  # shellcheck disable=SC2064
  trap "kill -$signal $run 2>/dev/null || true" "$signal"
done
status=0
while wait "$run" || status=$?; kill -0 "$run" 2>/dev/null; do status=0; done
if [ -s "$XCOMPOSER_STATUS_FILE" ]; then
  status=$(cat "$XCOMPOSER_STATUS_FILE")
fi
exit "$status"
