"""``python -m fedgrove``: the command line."""

import sys

from fedgrove.cli import console

sys.exit(console())
