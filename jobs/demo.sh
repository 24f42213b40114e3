#!/usr/bin/env bash
# BBC News through all-MiniLM-L6-v2 on local Ray: install from the lock, embed, probe, report.
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/install.sh demo
export HF_HUB_OFFLINE=1
exec .venv/bin/fmembed embed jobs/configs/text.yaml "$@"
