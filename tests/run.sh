#!/usr/bin/env bash
# Installs the project with its test extra from the lock and runs the whole suite; with --quick, for
# the inner loop, only what needs no Ray and no long time.
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/install.sh test
export HF_HUB_OFFLINE=1
if [[ ${1:-} == --quick ]]; then
  shift
  # Two at once: a file stays with one process, as what it sets up is set up once.
  set -- -n 2 --dist loadfile tests/unit -m "not ray and not slow" "$@"
fi
exec .venv/bin/python -m pytest "$@"
