"""`python -m genkernels.cli` is the command `genkernels`."""

import sys

from . import main

sys.exit(main())
