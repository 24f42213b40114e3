"""`python -m fmembed.cli`."""

from fmembed.cli import main

if __name__ == "__main__":
    main()
