#!/usr/bin/env bash
# Installs the project with its test extra from the lock and runs the whole suite.
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/install.sh test
export HF_HUB_OFFLINE=1
exec .venv/bin/python -m pytest "$@"
