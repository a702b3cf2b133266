"""A child process that analyzes, one payload after the other, until its service is gone.

It is started by `ProcessExecutor` as a Python of its own, which imports this, the analysis, and
nothing else of the service: no journal, no lock, no server.
"""

import ctypes
import functools
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection

from jobs import analysis, errors, model

#: A process asks the kernel for this signal when its parent ends (prctl(2)).
_PR_SET_PDEATHSIG = 1


def serve(descriptor: int, parent_pid: int) -> None:
    """Load the analysis that is told first, say whether it could be loaded, and serve.

    Each message to the parent is the id of a job and a `Progress`, or at the end its `Ending`.
    """
    _die_with(parent_pid)
    _leave_signals_to_the_parent()
    parent = Connection(descriptor)
    os.set_inheritable(descriptor, False)  # noqa: FBT003 - it takes no keyword
    os.register_at_fork(after_in_child=parent.close)  # or the parent would not see this one end
    try:
        load, name = parent.recv()
        analyze = analysis.with_progress(load(name))
    except errors.ConfigError as exc:
        parent.send(exc.problems)
        return
    parent.send(())
    sending = threading.Lock()  # an analysis may report from threads of its own

    def send(job_id: str, message: analysis.Progress | model.Ending) -> None:
        with sending:
            parent.send((job_id, message))

    while True:
        try:
            job_id, body = parent.recv()
        except EOFError:  # the service has closed its end
            return
        send(job_id, analysis.run(analyze, body, functools.partial(send, job_id)))


def _die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when the service ends, even by kill -9."""
    if sys.platform == "linux":  # pragma: no branch
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it had ended before
        os._exit(1)


def _leave_signals_to_the_parent() -> None:
    # A drain lets analyses end, so what a service manager sends to all processes is passed over.
    # By a handler: signals that are ignored would stay so in what the analysis starts.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
