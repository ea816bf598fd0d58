"""What a fork server imports first: how it ends, also in the seconds in which it imports the rest.

At an interrupt from the keyboard, which reaches all processes of a terminal, it ends without a word, and when
the thread that started it ends (the main one, as a run does it), it is killed. By itself it would print a
traceback, and notice that it is not wanted any more when all is imported.
"""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where interrupts are ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)
ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
