"""`python -m afina.worker.settle`, as run directories of afina before 0.2 name `python -m afina.worker finish`."""

import sys

from afina.worker.node.finish import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
