#!/usr/bin/env bash
# The whole pipeline in small, on any machine with Python 3.11+ and no GPU: text -> shards -> a pretrained GPT-2 ->
# samples and pictures. Nothing is downloaded but the requirements: the text is the documentation inside Python.
#
#     bash quickstart.sh
#
# Run again, it goes on where it was, and does not redo what is done. STEPS=50 makes it shorter.
set -euo pipefail
cd "$(dirname "$0")"

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
PATH="$PWD/.venv/bin:$PATH"
DATA=datasets/pydoc LOG=log/quickstart

run() {
    printf '\n$'
    for word in "$@"; do
        [[ $word =~ ^[[:alnum:]_./-]+$ ]] && printf ' %s' "$word" || printf " '%s'" "$word"
    done
    echo
    "$@"
}

run python fineweb.py --source pydoc --train_tokenizer 4096 --out_dir $DATA

run python train_gpt2.py --data_dir $DATA --log_dir $LOG --resume \
    --n_layer 4 --n_head 4 --n_embd 128 --block_size 256 --dtype float32 \
    --B 16 --T 256 --total_batch_size 4096 --max_steps "${STEPS:-600}" --warmup_steps 50 --max_lr 3e-3 --min_lr 3e-4 \
    --val_every 50 --val_tokens 60000 --hellaswag_every 0 --sample_every 200 --sample_prompt "The function returns" \
    --rolling_every 100

[ $LOG/samples.txt -nt $LOG/model_final.pt ] ||
    run python sample.py --model $LOG/model_final.pt --prompt "Return" --num_samples 3 --max_tokens 60 \
        --temperature 0.8 --out $LOG/samples.txt

[ $LOG/log_plot.png -nt $LOG/samples.txt ] ||
    run python plot.py $LOG

echo
echo "Final validation loss: $(awk '$2 == "val" {loss = $3} END {print loss}' $LOG/log.txt) nats per token"
echo "A sample:"
sed '/^-----/,$d; s/^/    /' $LOG/samples.txt
echo "Pictures: $LOG/log_plot.png, $LOG/validation_loss.png and others beside them"
