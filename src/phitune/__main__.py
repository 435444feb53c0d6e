"""`python -m phitune` is `phitune`."""

import sys

from phitune.cli import main

sys.exit(main())
