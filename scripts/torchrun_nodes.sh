#!/usr/bin/env bash
# torchrun for one node or several, a rank per GPU (RANKS=n: another number; one rank on a machine without a GPU).
#   bash scripts/torchrun_nodes.sh train/main.py FLAGS...
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/torchrun_nodes.sh train/main.py FLAGS...
# Several nodes: the same command on every node, with NODE_RANK 0 to NNODES-1 and the address of node 0. Under Slurm:
#   srun --ntasks-per-node 1 bash -c 'NNODES=$SLURM_NNODES NODE_RANK=$SLURM_NODEID MASTER_ADDR=... bash scripts/...'
# Every node needs the same code and versions, the model folder, the media (or the frame cache), and --output_dir on a
# disk that all nodes see: each rank writes its own shard of a checkpoint there.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$(cd "${REELRL_VENV:-.venv}/bin" && pwd):$PATH"; export PATH
NNODES=${NNODES:-1}
RANKS=${RANKS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}
[ "${RANKS:-0}" -ge 1 ] || RANKS=1

# Rendezvous. Static: node 0 listens on MASTER_ADDR:MASTER_PORT, ranks are NODE_RANK * RANKS + local rank, so a restart
# gives every rank its place again. The address has to be one that the other nodes reach, the port free and open between
# them. A node that is late is waited for JOIN_TIMEOUT_S (an allocation seldom starts everywhere at once). torchrun does
# not restart failed ranks here: give the same command again, and the run goes on from its newest complete checkpoint.
place=(--standalone)
if [ "$NNODES" -gt 1 ]; then
  : "${NODE_RANK:?several nodes: NODE_RANK (0 to NNODES-1) has to be set}"
  : "${MASTER_ADDR:?several nodes: MASTER_ADDR (the address of node 0) has to be set}"
  place=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}"
    --rdzv_conf "timeout=${JOIN_TIMEOUT_S:-1800}")
fi

# Timeouts. --phase_limit_s of train/main.py is both the longest a collective waits and the longest a phase may take; then
# every rank prints its phase and stacks, and the run ends. Keep it above the slowest phase: saving to a slow disk, or one
# rank with the longest video. It must not be short for the sake of failed nodes: a closed connection ends the run at once.
#
# Network. Two sets of connections exist: NCCL for tensors and gloo (plain TCP) for small objects. On hosts with several
# interfaces both have to be told which one the nodes share (`ip -br addr`), or they may choose a container bridge:
#   export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
# InfiniBand or RoCE is found by NCCL itself; NCCL_IB_HCA=mlx5_0,mlx5_1 names the cards, NCCL_IB_DISABLE=1 takes TCP instead,
# NCCL_IB_GID_INDEX=3 is usual for RoCE v2. NCCL_DEBUG=INFO prints what was chosen: look for "NET/IB" against "NET/Socket".
# NCCL_NVLS_ENABLE=0 where a container does not allow NVLink multicast. Do not set PYTORCH_CUDA_ALLOC_CONF to
# expandable_segments: vLLM's sleep does not work with it, and the run refuses to start.
#
# Threads. With a GPU each rank gets its share of the cores, 8 at most: vLLM turns frames into patches with them, between
# two decoding steps. torchrun alone would give every rank one. Without a GPU the ranks compute on the cores: one each.
threads=1
if [ -e /dev/nvidia0 ]; then
  threads=$(( $(nproc) / RANKS )); threads=$(( threads < 1 ? 1 : threads > 8 ? 8 : threads ))
fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
exec torchrun "${place[@]}" --nproc_per_node "$RANKS" "$@"
