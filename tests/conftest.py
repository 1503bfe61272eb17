"""What a shell starts in its background ignores Ctrl-C, and so would all that these tests start."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
