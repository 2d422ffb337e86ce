#!/usr/bin/env bash
# From raw text to a tiny GPT-2, its samples and plots, in about 7 minutes on 2 CPU cores without
# AVX-512. It needs Python 3.11+ and no GPU. The text is Python's own documentation, so only the
# requirements are downloaded.
#
#     bash quickstart.sh
#
# It runs four of the stages: fineweb.py, train_gpt2.py, sample.py and plot.py. The README shows how
# to evaluate, finetune and export a model.
#
# An interrupted quickstart resumes when it is run again; finished steps are not repeated.
# STEPS=50 makes training shorter. Remove log/quickstart before a run of another length: it would
# extend the run that is there, whose learning rate has already fallen.
set -euo pipefail
# shellcheck source=runs/common.sh
source "$(dirname "$0")/runs/common.sh"

DATA=datasets/pydoc
LOG=log/quickstart

run python fineweb.py --source pydoc --train_tokenizer 4096 --out_dir $DATA

# FAST, the warmup and the learning rate are a recipe that learns from fewer tokens than AdamW with
# its usual settings; the linear decay is better in runs of more than a million tokens
# (experiments/README.md).
run python train_gpt2.py --data_dir $DATA --log_dir $LOG --resume \
    --n_layer 4 --n_head 4 --n_embd 128 --block_size 256 \
    --B 16 --T 256 --total_batch_size 4096 \
    --max_steps "${STEPS:-450}" --warmup_steps 9 --max_lr 8e-3 \
    "${FAST[@]}" --lr_decay linear --min_lr 0 \
    --val_every 50 --val_tokens 60000 --hellaswag_every 0 \
    --sample_every 200 --sample_prompt "The function returns" --rolling_every 100

# Sample and plot again only if training has produced a newer model.
[ $LOG/samples.txt -nt $LOG/model_final.pt ] ||
    run python sample.py --model $LOG/model_final.pt --prompt "Return" --num_samples 3 \
        --max_tokens 60 --temperature 0.8 --out $LOG/samples.txt

[ $LOG/log_plot.png -nt $LOG/samples.txt ] ||
    run python plot.py $LOG

echo
loss=$(awk '$2 == "val" {loss = $3} END {print loss}' $LOG/log.txt)
echo "Final validation loss: $loss nats per token"
echo "A sample:"
# Up to the first line of 80 hyphens, which sample.py writes behind each sample
sed '/^-\{80\}$/,$d; s/^/    /' $LOG/samples.txt
echo "Plots: $LOG/log_plot.png, $LOG/validation_loss.png and others in the same folder"
