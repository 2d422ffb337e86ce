#!/usr/bin/env bash
# Every test that is neither slow nor needs a GPU. Arguments go to pytest: bash test.sh -k dataloader
set -euo pipefail
cd "$(dirname "$0")"

[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
.venv/bin/python -m pytest -q -n auto --dist loadfile -m "not slow and not gpu" "$@"
