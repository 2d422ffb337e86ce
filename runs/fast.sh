#!/usr/bin/env bash
# GPT-2 (124M) with the recipe that needs the fewest tokens at small scale (experiments/README.md),
# for a quarter of the steps of gpt2_124m.sh: 2.5B tokens of FineWeb-Edu. The architecture is the
# same.
#
#     bash runs/fast.sh                          # on all GPUs
#     bash runs/fast.sh --max_lr 3e-3 --B 32     # flags are passed on to train_gpt2.py
#
# This run has not been made. The recipe was found with models of at most 10M parameters in runs of
# 400,000 tokens, where a quarter of AdamW's tokens was enough. In the longest comparison, with 8
# million, it needed almost half, so it may not reach the loss of gpt2_124m.sh here. At this size
# its learning rate is a guess, three times that of gpt2_124m.sh. A run this long may need a higher
# --muon_momentum and --beta1, and --grad_clip 1. Try a few short runs before a long one.
#
# The run folder is log/fast. Every step resumes: after an interruption, run the same command again.
#
# Needs 5 GB of disk for the shards and about 4 GB for checkpoints. Expected cost of training,
# without Muon's part of a step: 2.7 hours on one H100 or 20 minutes on eight, under the assumption
# of docs/cluster.md (260,000 tokens/s per GPU). An estimate, not a measurement.
set -euo pipefail
# shellcheck source=runs/common.sh
source "$(dirname "$0")/common.sh"

LOG=log/fast
count_gpus

run python fineweb.py --max_tokens 2.6B

run torchrun --standalone --nproc_per_node="$GPUS" train_gpt2.py --log_dir $LOG --resume \
    --max_steps 4768 --warmup_steps 95 --max_lr 1.8e-3 "${FAST[@]}" \
    --lr_decay linear --min_lr 0 "$@"

run python plot.py $LOG

# Last, because it fails if one of the benchmarks can't be downloaded.
run torchrun --standalone --nproc_per_node="$GPUS" evaluate.py --models $LOG/model_final.pt
