#!/usr/bin/env bash
# The full reproduction of GPT-2 (124M) on one machine with GPUs: 10B tokens of FineWeb-Edu,
# pretraining, the benchmarks and the plots.
#
#     bash runs/gpt2_124m.sh              # on all GPUs
#     bash runs/gpt2_124m.sh --B 32       # flags are passed on to train_gpt2.py
#
# The run folder is log/, the default of all stages.
#
# Every step resumes: after an interruption, run the same command again. For a cluster, see
# docs/cluster.md.
#
# Needs 20 GB of disk for the shards and about 10 GB for checkpoints. With the default B=64, it
# needs about 28 GB of memory per GPU (computed, not measured; README.md lists smaller values of B).
# B * 1024 * the number of GPUs must divide 524,288.
#
# Expected cost of training: 10.7 hours on one H100 or 1.35 hours on eight, 27 dollars either way at
# 2.50 dollars per GPU and hour. This is an estimate, not a measurement: it assumes 260,000 tokens/s
# per GPU (docs/cluster.md). Downloading and tokenizing the text takes hours more, depending on the
# network and the CPU. It needs no GPU, so prepare datasets/ before you rent one.
set -euo pipefail
# shellcheck source=runs/common.sh
source "$(dirname "$0")/common.sh"

count_gpus

run python fineweb.py

run torchrun --standalone --nproc_per_node="$GPUS" train_gpt2.py --resume "$@"

run python plot.py

# Last, because it fails if one of the benchmarks can't be downloaded.
run torchrun --standalone --nproc_per_node="$GPUS" evaluate.py
