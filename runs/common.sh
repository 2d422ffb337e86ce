# shellcheck shell=bash
# Shared by quickstart.sh and the scripts in this folder, which source it. It changes to the root of
# the repository, installs the requirements into .venv, puts .venv first in PATH, and defines FAST,
# `run` and `count_gpus`.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: Python 3.11 or newer is needed" >&2; exit 1; }
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
PATH="$PWD/.venv/bin:$PATH"

# The flags of the recipe that needs the fewest tokens (experiments/README.md).
# shellcheck disable=SC2034
read -rd '' -a FAST < runs/fast.flags || true

# Print a command as one would type it, then run it.
run() {
    printf '\n$'
    for word in "$@"; do
        [[ $word =~ ^[[:alnum:]_./-]+$ ]] && printf ' %s' "$word" || printf " '%s'" "$word"
    done
    echo
    "$@"
}

# Set GPUS to their number, and end the script if there are none.
count_gpus() {
    GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
    [ "$GPUS" -gt 0 ] || {
        echo "error: no CUDA GPU found; on a CPU this run takes months: try quickstart.sh" >&2
        exit 1
    }
}
