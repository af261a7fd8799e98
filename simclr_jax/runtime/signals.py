"""How signals stop a run outside of the training steps, and the immediate answer to whoever sends one.

Python runs a handler between two bytecodes of the main thread, which may be compiling for minutes.  So a thread receives
each signal through Python's wakeup file descriptor, says what will happen, and ends the process on the second signal.
"""

import contextlib
import os
import signal
import sys
import threading

from simclr_jax.runtime import errors, lock

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 2.0  # seconds that a second signal waits for a disk or bucket to give back the locks
during_steps = False  # whether the loop turns a signal into a stop after the step, see loop.py


class Stopped(BaseException):
  """SIGTERM or SIGHUP arrived outside of the training steps."""

  exit_code = 42


def exit_code(number: int) -> int:
  """The exit code of a process stopped by a signal: 130 for Ctrl-C, otherwise 42, after which schedulers restart it."""
  return 130 if number == signal.SIGINT else 42


@contextlib.contextmanager
def heard():
  """Within it a first signal is answered at once with one line, and a second one ends the process; in the main thread.

  SIGTERM and SIGHUP raise Stopped; SIGINT raises KeyboardInterrupt as usual.  An ignored signal, such as SIGHUP under nohup,
  stays ignored.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  heard = []  # numbers of the signals
  read, write = os.pipe()
  os.set_blocking(write, False)
  old = {n: signal.signal(n, _stop) for n in STOPPING[1:] if signal.getsignal(n) == signal.SIG_DFL}
  before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  listener = threading.Thread(target=_listen, args=(read, heard), daemon=True, name="signals")
  listener.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    os.write(write, bytes(1))  # not closed alone: a forked process may have the other copy
    listener.join()
    for number, handler in old.items():
      # A process that was told to stop is on its way out, where Python takes its handlers away: it keeps its exit code.
      signal.signal(number, signal.SIG_IGN if heard else handler)
    os.close(write)
    os.close(read)


def _stop(number, frame):
  signal.signal(number, lambda *_: None)  # a second one is for the listener
  name = signal.Signals(number).name
  raise Stopped(f"{name}: stopped; what was saved is complete; {errors.to_resume}")


def _listen(read, heard):
  while True:
    for number in os.read(read, 64):
      if number == 0:
        return
      if number not in STOPPING:
        continue
      name = signal.Signals(number).name
      if heard:
        _say(f"{name}: stopped at once; what was saved before is complete; {errors.to_resume}")
        release = threading.Thread(target=lock.release_all, daemon=True)
        release.start()
        release.join(PATIENCE)
        os._exit(exit_code(number))
      heard.append(number)
      when = "after this step" if during_steps else "as soon as possible"
      _say(f"{name}: stopping {when}; a second signal stops at once")


def _say(text):
  print(f"simclr: {text}", file=sys.stderr, flush=True)
