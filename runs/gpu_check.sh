#!/usr/bin/env bash
# Checks and measures everything that needs a GPU, in under nine minutes, and writes a report:
#
#     bash runs/gpu_check.sh                              # one GPU, GPT-2 (124M)
#     bash runs/gpu_check.sh --nanogpt ../nanoGPT         # compared with nanoGPT
#     bash runs/gpu_check.sh --small --device cpu         # no GPU: only tries the script
#
# Results are in log/gpu_check/report.md. It needs no network and installs nothing: it uses .venv if
# there is one, else the Python in PATH, whose torch may be built for the machine's driver.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=python3
[ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
exec "$PYTHON" -m bench.gpu_check "$@"
