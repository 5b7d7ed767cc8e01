#!/usr/bin/env bash
# Start, or go on with, the run of pretrain.yaml on this node; run it on every node with the same settings but NODE_RANK.
#   examples/aquila2_34b/pretrain.sh [flags of pretrain_aquila.py]
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, GPUS_PER_NODE, SAVE and PYTHON may be set. SAVE must be a folder that
# every node sees; where it holds a checkpoint, the run continues from it: pretrain.yaml sets resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" \
    --node-rank "${NODE_RANK:-0}" \
    --nproc-per-node "${GPUS_PER_NODE:-8}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" \
    --master-port "${MASTER_PORT:-29500}" \
    pretrain_aquila.py \
    --config examples/aquila2_34b/pretrain.yaml \
    --save "${SAVE:-checkpoints/aquila2_34b}" "$@"
