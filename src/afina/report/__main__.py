"""`python -m afina.report RUN_DIR`."""

import sys

from afina.report import main

sys.exit(main())
