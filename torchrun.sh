#!/usr/bin/env bash
# Start a run as the original scripts do; flags behind the first word go to the trainer as they are.
#
#   MODEL=internlm-xcomposer2-vl-7b DATA=data.txt ./torchrun.sh full --output_dir output/pets
#   MODEL=… DATA=… GPUS_PER_NODE=8 NNODES=2 MASTER_ADDR=10.0.0.1 RESTARTS=3 ./torchrun.sh lora    # on each machine
#   srun ./torchrun.sh full …                      # one task on each machine of a Slurm job is all that it needs
#   ./torchrun.sh demo [OUT] [--family qwen2_5_vl]
#
# It may be called from any folder, by a path or a link: this project is found beside it, and relative paths mean
# what they mean where it is called. A run on one machine takes a free port of its own, so several can run at once;
# MASTER_PORT (by default 6001 with more machines) names one.
#
# Several machines meet at MASTER_ADDR, which is one of them, in any order. RESTARTS=N starts the ranks again, up to
# N times, when one has failed or a machine was lost and is back. NNODES=2:4 starts with 2 machines, takes in more, up
# to 4, and goes on without those that are lost; others are spares: give --global_batch_size, so that the batches stay
# the same. With NODE_RANK, as in the original scripts, machines have fixed numbers, and MASTER_ADDR is that of 0.
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

nodes=${NNODES:-${SLURM_STEP_NUM_NODES:-1}}
restarts=${RESTARTS:-0}
node_rank=${NODE_RANK:-}
address=${MASTER_ADDR:-}
port=${MASTER_PORT:-6001}
if [ -n "${SLURM_STEP_NUM_NODES:-}" ]; then # under srun
  if [ "$SLURM_STEP_NUM_TASKS" != "$SLURM_STEP_NUM_NODES" ]; then
    echo "error: srun starts $SLURM_STEP_NUM_TASKS tasks on $SLURM_STEP_NUM_NODES machines; one on each starts all" \
        "ranks there: give srun --ntasks-per-node=1" >&2
    exit 2
  fi
  node_rank=${node_rank:-$SLURM_NODEID}
  hosts=${address:-$(scontrol show hostnames "$SLURM_STEP_NODELIST")}
  address=${hosts%%$'\n'*}
  port=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID + SLURM_STEP_ID) % 10000))}
fi

ranks=${GPUS_PER_NODE:-$(python -c 'import torch; print(max(1, torch.accelerator.device_count()))')}
if [ "$nodes" = 1 ] && [ -z "${MASTER_PORT:-}" ]; then
  meeting=(--standalone)
elif [ "$nodes" = 1 ] || { [ -n "$node_rank" ] && [ "$restarts" = 0 ] && [ "${nodes/:/}" = "$nodes" ]; }; then
  meeting=(--nnodes "$nodes" --node_rank "${node_rank:-0}")
  meeting+=(--master_addr "${address:-localhost}" --master_port "$port")
elif [ -z "$address" ]; then
  echo "error: NNODES=$nodes needs MASTER_ADDR, the address of one of the machines" >&2
  exit 2
else
  meeting=(--nnodes "$nodes" --rdzv_backend c10d --rdzv_endpoint "$address:$port")
  meeting+=(--rdzv_id "${SLURM_JOB_ID:-xcomposer}" --rdzv_conf join_timeout=1800)
fi
echo "starting $ranks ranks on this machine" >&2
exec python -m trainer.launch --nproc_per_node "$ranks" "${meeting[@]}" --max_restarts "$restarts" -m trainer.main \
    ${MODEL:+--model_name_or_path "$MODEL"} ${DATA:+--data_path "$DATA"} "${extra[@]}" "$@"
