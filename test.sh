#!/usr/bin/env bash
# Runs the tests that are neither slow nor need a GPU. Arguments go to pytest, for example:
#
#     bash test.sh -k dataloader
set -euo pipefail
cd "$(dirname "$0")"

[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
# One worker more than there are cores, because many tests wait for another process.
workers=$(($(getconf _NPROCESSORS_ONLN) + 1))
.venv/bin/python -m pytest -q -n $workers --dist worksteal -m "not slow and not gpu" "$@"
