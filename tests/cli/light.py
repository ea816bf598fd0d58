"""`sdnb` for tests of runs: what kernels are forked from imports little, for notebooks that need nothing.

python tests/cli/light.py run MODEL ... ; with PLAIN_KERNELS in the environment, as on a machine that does not
fork them. Workers import this file, too, but for its last lines.
"""

import os
import sys

from sdnb.cli import kernels
from sdnb.cli.main import main

kernels.PRELOADED[:] = ["sdnb.cli.fork_server", "ipykernel.ipkernel"]
if "PLAIN_KERNELS" in os.environ:
    kernels.forks = lambda: False

if __name__ == "__main__":
    sys.exit(main())
