"""Probe an existing table: `ray job submit --working-dir . -- python jobs/probe.py TABLE`."""

import sys

from fmembed.cli import main

if __name__ == "__main__":
    main(["probe", *sys.argv[1:]])
