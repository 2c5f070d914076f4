"""Threads that run one at a time, from pause to pause: how blocking code is stopped between every two of its steps.

The driver resumes a task; the task runs for so many pauses, or until it waits for something, and hands control back.
No two threads ever run at once and no clock has a say, so the same choices give the same history.
"""

from _thread import LockType, allocate_lock, start_new_thread
from collections.abc import Callable
from threading import get_ident, main_thread

#: A task that passes so many pauses without waiting runs in circles.
_STEPS_MAX = 20_000


class Killed(BaseException):
    """SIGKILL: raised at the pause a task stands at, and at every later one, so that its clean-up does nothing."""


class Task:
    """One thread of control of a simulated process."""

    #: Pauses that all tasks have come to.
    passed = 0

    def __init__(self, name: str, body: Callable[[], None]) -> None:
        self.name = name
        self.done = False
        self.error: BaseException | None = None
        #: Where it stands, in words.
        self.at = "the beginning"
        self._body = body
        self._resume, self._paused = _taken(), _taken()
        self._began = False
        self._killed = False
        self._left = 0

    def run(self, steps: int | None = None) -> None:
        """Run for so many pauses, or until it waits or ends."""
        if self.done:
            return
        self._left = steps or _STEPS_MAX
        if self._began:
            self._resume.release()
        else:
            self._began = True
            start_new_thread(self._run, ())
        self._paused.acquire()
        assert steps or self._left > 0, f"{self.name} runs in circles at {self.at}"

    def kill(self) -> None:
        self._killed = True
        if not self._began:
            self.done = True
        self.run()
        assert self.done

    def _run(self) -> None:
        _tasks[get_ident()] = self
        try:
            self._body()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001  handed to the driver
            self.error = error
        finally:
            del _tasks[get_ident()]
            self.done = True
            self._paused.release()

    def pause(self, at: str, waits: bool) -> None:
        if not self._killed:
            self.at = at
            Task.passed += 1
            self._left -= 1
            if self._left > 0 and not waits:
                return
            self._paused.release()
            self._resume.acquire()
        if self._killed:
            raise Killed


_tasks: dict[int, Task] = {}


def _taken() -> LockType:
    lock = allocate_lock()
    lock.acquire()
    return lock


def current() -> Task | None:
    """The task that runs, None for the driver."""
    return _tasks.get(get_ident())


def pause(at: str, *, waits: bool = False) -> None:
    """Where the driver may stop a task, for a while or for ever. Does nothing when the driver itself calls."""
    task = _tasks.get(get_ident())
    if task is not None:
        task.pause(at, waits)
    else:
        assert get_ident() == main_thread().ident, f"a thread that the simulation does not drive came to: {at}"
