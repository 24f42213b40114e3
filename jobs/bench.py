"""Measure this machine beside other ways: `python jobs/bench.py`. The same as `fmembed bench`."""

import sys

from fmembed.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
