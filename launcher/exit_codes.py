"""What commands and runs end with."""

DONE = 0
FAILED = 1
MISTAKE = 2  # the user's, told in one line
STOPPED = 75  # a run that was asked to stop and has saved: the same command goes on (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # by Ctrl-C, as shells say it
