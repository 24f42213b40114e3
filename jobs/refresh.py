"""Refresh a table: `ray job submit --working-dir . -- python jobs/refresh.py CONFIG [flags]`.

The same as `fmembed refresh`. A submitted job runs in a copy of its folder: give `--output` as an
absolute path on shared storage or as a URL.
"""

import sys

from fmembed.cli import main

if __name__ == "__main__":
    main(["refresh", *sys.argv[1:]])
