"""`python -m afina.report RUN_DIR`."""

import sys

from afina.reports import main

sys.exit(main())
