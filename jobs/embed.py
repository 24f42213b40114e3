"""Embed a dataset: `ray job submit --working-dir . -- python jobs/embed.py CONFIG [flags]`.

The same as `fmembed embed`. A submitted job runs in a copy of its folder: give `--output` as an
absolute path on shared storage or as a URL.
"""

import sys

from fmembed.cli import main

if __name__ == "__main__":
    main(["embed", *sys.argv[1:]])
