"""``python -m fedgrove``: the command line."""

import sys

from fedgrove.cli import main

sys.exit(main())
