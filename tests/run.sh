#!/usr/bin/env bash
# Installs the project with its test extra from the lock and runs the whole suite; with --quick, for
# the inner loop, only what needs no Ray and no long time.
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/install.sh test
export HF_HUB_OFFLINE=1
# Two tests at once: one alone keeps two cores half busy, the rest of the time it waits for Ray. A
# file stays with one process, as what it sets up is set up once; the files that take long come
# first, as they are sorted.
at_once=(-n 2 --dist loadfile --no-loadscope-reorder)
if [[ ${1:-} == --quick ]]; then
  shift
  set -- tests/unit -m "not ray and not slow" "$@"
fi
exec .venv/bin/python -m pytest "${at_once[@]}" "$@"
