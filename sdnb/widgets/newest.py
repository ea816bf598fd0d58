"""Work in the background, one job at a time: of several asked for under one name, the newest wins."""

import logging
import threading
from collections.abc import Callable

LOGGER = logging.getLogger(__name__)
Job = Callable[[Callable[[], bool]], None]


class Newest:
    """A thread that runs jobs in turn; one that was overtaken before it began never runs.

    A job is called with a function that says whether it is still the newest under its name: a long job asks
    now and then, and shows nothing once the answer is no. One that raises is logged, and the next one runs.
    """

    def __init__(self):
        self._change = threading.Condition()
        self._newest: dict[str, int] = {}
        self._waiting: dict[str, tuple[int, Job]] = {}
        self._busy = False
        threading.Thread(target=self._work, daemon=True, name="sdnb-explorer").start()

    def submit(self, name: str, job: Job) -> None:
        """Ask for a job in the place of every older one of the same name.

        Args:
            name: whose job it is.
            job: what to do.
        """
        with self._change:
            number = self._newest[name] = self._newest.get(name, 0) + 1
            self._waiting.pop(name, None)  # the new one queues behind the other names
            self._waiting[name] = (number, job)
            self._change.notify_all()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is left to do.

        Args:
            timeout_s: seconds at most; None for no limit.

        Returns:
            Whether all is done.
        """
        with self._change:
            return self._change.wait_for(lambda: not self._waiting and not self._busy, timeout_s)

    def _work(self) -> None:
        while True:
            with self._change:
                self._busy = False
                self._change.notify_all()
                self._change.wait_for(lambda: self._waiting)
                name = next(iter(self._waiting))
                number, job = self._waiting.pop(name)
                self._busy = True
            try:
                job(lambda name=name, number=number: self._newest[name] == number)
            except Exception:
                LOGGER.exception("a job of %s failed", name)
