"""What all tests need of the process that they run in."""

import signal

# A suite that a script has started in the background ignores Ctrl-C, and so would every process of a test.
signal.signal(signal.SIGINT, signal.default_int_handler)
