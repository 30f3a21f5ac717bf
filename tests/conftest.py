"""What holds for every test."""

import signal

# A shell's background job is started with SIGINT ignored, which children inherit; the tests of Ctrl-C need it heard.
signal.signal(signal.SIGINT, signal.default_int_handler)
