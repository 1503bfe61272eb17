"""`python -m afina.worker.launch`, as run directories of afina before 0.2 name `python -m afina.worker launch`."""

import sys

from afina.worker.node.launcher import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
