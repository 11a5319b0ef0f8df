"""The engine's own process, from its first moment: started as `python -m scheduler.engine.process FD PARENT`.

FD is the pulse's file, PARENT the process to live and die with; the settings are one JSON line on stdin. What
takes seconds to import comes last: the pulse has to beat, and signals have to be out of the way, before that.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec

from scheduler.engine.pulse import BEAT_SECONDS, Pulse
from scheduler.messages import Launch


def main() -> None:
    # These reach the whole process group, or all of a service; the parent decides when the engine stops.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pulse = Pulse(int(sys.argv[1]))
    life = Life(pulse, int(sys.argv[2]))
    threading.Thread(target=life.go_on, name="pulse", daemon=True).start()
    line = sys.stdin.buffer.readline()
    if not line:  # the parent has gone, or does not need an engine any more
        return
    launch = msgspec.json.decode(line, type=Launch)
    life.folder = Path(launch.folder)

    from scheduler.engine.loop import run

    run(launch, pulse)


class Life:
    """Beats for as long as the parent lives. When it is gone, the process ends at once, whatever it is doing."""

    def __init__(self, pulse: Pulse, parent: int) -> None:
        self._pulse = pulse
        self._parent = parent
        self.folder: Path | None = None
        """Of the sockets: nobody else is left to remove it."""

    def go_on(self) -> None:
        while os.getppid() == self._parent:
            self._pulse.beat()
            time.sleep(BEAT_SECONDS)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(1)


if __name__ == "__main__":
    main()
