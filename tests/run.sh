#!/usr/bin/env bash
# Installs the project with its test extra from the lock and runs the whole suite; with --quick, for
# the inner loop, only what needs no Ray and no long time.
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/install.sh test
export HF_HUB_OFFLINE=1
if [[ ${1:-} == --quick ]]; then
  shift
  set -- tests/unit -m "not ray and not slow" "$@"
fi
# Two at once, see tests/conftest.py for which.
exec .venv/bin/python -m pytest -n 2 "$@"
