#!/usr/bin/env bash
# A model that writes descriptions of fantasy locations: make the data, finetune, sample.
#
#     bash runs/fantasy.sh                              # from quickstart.sh's model
#     bash runs/fantasy.sh gpt2 log/fantasy_gpt2        # from another model, into another folder
#     OPENAI_API_KEY=... bash runs/fantasy.sh ...       # descriptions by gpt-4.1, not a grammar
#
# The model is a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl. Without a key, the
# descriptions come from a grammar: that needs no network and costs nothing. With one, they cost
# money; `python generate_finetune_data.py --dry_run --num_samples 300` estimates how much.
#
# Run it again to resume it after an interruption: finished parts are not repeated.
set -euo pipefail
# shellcheck source=runs/common.sh
source "$(dirname "$0")/common.sh"

MODEL=${1:-log/quickstart/model_final.pt}
OUT=${2:-log/fantasy}
[[ $MODEL != *.pt ]] || [ -f "$MODEL" ] ||
    { echo "error: no $MODEL: run quickstart.sh first, or name another model" >&2; exit 1; }

# Descriptions of the grammar and of a model can't be mixed, hence the two folders.
if [ -n "${OPENAI_API_KEY:-}" ]; then
    DATA=datasets/fantasy_api
    run python generate_finetune_data.py --num_samples 300 --out_dir $DATA
else
    DATA=datasets/fantasy_offline
    run python generate_finetune_data.py --num_samples 300 --out_dir $DATA --offline
fi

# Sequences and batches are small enough for the quickstart's model and 300 descriptions.
run python finetune.py --init_from "$MODEL" --data $DATA/finetune_data.txt --out_dir "$OUT" --resume \
    --T 256 --total_batch_size 4096 --search_epochs 1 --dropout 0 --num_samples 20 \
    --general_data datasets/pydoc

# shellcheck disable=SC2012 # the folder names have no odd characters
BEST=$(ls -t "$OUT"/final_lr_*/model_best.pt | head -n 1)
[ "$OUT/samples.txt" -nt "$BEST" ] ||
    run python sample.py --model "$BEST" --prompt "<LOC>" --num_samples 3 --max_tokens 200 \
        --temperature 0.9 --top_k 50 --out "$OUT/samples.txt"

echo
echo "A sample:"
sed '/^-\{80\}$/,$d; s/^/    /' "$OUT/samples.txt"
echo "Before and after finetuning: $OUT/report.md"
