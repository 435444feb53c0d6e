"""`python src/main.py ...` is `phitune train ...`."""

import sys

from phitune.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
