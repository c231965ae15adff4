#!/usr/bin/env bash
# Start a run as the original scripts do; flags behind the first word go to the trainer as they are.
#
#   MODEL=internlm-xcomposer2-vl-7b DATA=data.txt ./torchrun.sh full --output_dir output/pets
#   MODEL=… DATA=… GPUS_PER_NODE=8 NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 ./torchrun.sh lora
#   ./torchrun.sh demo [OUT] [--family qwen2_5_vl]
#
# It may be called from any folder, by a path or a link: this project is found beside it, and relative paths mean
# what they mean where it is called. A run on one machine takes a free port of its own, so several can run at once;
# MASTER_PORT (by default 6001 with more machines) names one.
#
# Exit status: the trainer's own (0, 2, 75, …). Signals reach the trainer through trainer/launch.py.
set -euo pipefail

usage="usage: [MODEL=folder DATA=data.txt] $0 full|lora|demo [flags]"
mode=${1:-}
shift || true
project=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
export PYTHONPATH="$project${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1 # a data.py or trainer.py where it is called is not ours
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
echo "starting $ranks ranks on this machine" >&2
exec python -m trainer.launch --nproc_per_node "$ranks" "${meeting[@]}" -m trainer.main \
    ${MODEL:+--model_name_or_path "$MODEL"} ${DATA:+--data_path "$DATA"} "${extra[@]}" "$@"
