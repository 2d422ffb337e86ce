#!/usr/bin/env bash
# Tiny Shakespeare (1.1 MB of text) on a laptop: a vocabulary of 1,024 tokens learned from it and a
# model of 4 layers. On 2 cores of an Intel Xeon with AMX, training took 1 min 44 s and ended at a
# validation loss of 4.03 nats per token. On an AMD EPYC with AVX2 only it took 3 min 55 s.
#
#     bash runs/shakespeare.sh              # downloads the text with curl
#     bash runs/shakespeare.sh input.txt    # uses this file, which may be any plain text
#
# An interrupted run resumes when the script is run again. To train on another text, delete
# datasets/shakespeare and log/shakespeare first.
set -euo pipefail
TEXT=${1:+$(realpath -- "$1")}
# shellcheck source=runs/common.sh
source "$(dirname "$0")/common.sh"

URL=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
DATA=datasets/shakespeare
LOG=log/shakespeare

if [ -z "$TEXT" ]; then
    TEXT=datasets/shakespeare.txt
    # The download gets its final name only when it is complete.
    [ -f $TEXT ] || {
        mkdir -p datasets
        run curl --fail --silent --show-error --output $TEXT.tmp $URL ||
            { echo "error: no download; with a file: bash runs/shakespeare.sh FILE" >&2; exit 1; }
        mv $TEXT.tmp $TEXT
    }
fi

run python fineweb.py --source text --data_files "$TEXT" --train_tokenizer 1024 --out_dir $DATA

run python train_gpt2.py --data_dir $DATA --log_dir $LOG --resume \
    --n_layer 4 --n_head 4 --n_embd 128 --block_size 256 --dropout 0.1 \
    --B 16 --T 256 --total_batch_size 4096 \
    --max_steps 250 --warmup_steps 5 --max_lr 8e-3 \
    "${FAST[@]}" \
    --val_every 50 --sample_every 0 --hellaswag_every 0 --rolling_every 100

run python sample.py --model $LOG/model_final.pt --prompt "ROMEO:" --num_samples 1

run python plot.py $LOG
