"""The engine's own process, from its first moment: `python -m scheduler.process.child FD PARENT FOLDER`.

FD is the pulse's file, PARENT the process to live and die with, FOLDER where the sockets are; the settings are one
JSON line on stdin. What takes seconds to import comes last: the pulse has to beat, and signals have to be out of
the way, before that.
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
import platformdirs

from scheduler.wire.messages import Launch
from scheduler.wire.pulse import BEAT_SECONDS, Pulse


def main() -> None:
    # These reach the whole process group, or all of a service; the parent decides when the engine stops.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pulse = Pulse(int(sys.argv[1]))
    folder = Path(sys.argv[3])
    threading.Thread(target=live, args=(pulse, int(sys.argv[2]), folder), name="pulse", daemon=True).start()
    line = sys.stdin.buffer.readline()
    if not line:  # the parent has gone
        shutil.rmtree(folder, ignore_errors=True)
        return
    # torch keeps what it compiles in the temporary folder, and makes a place there even if it compiles nothing.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(platformdirs.user_cache_path("carousel") / "inductor"))
    from scheduler.process.loop import run

    run(msgspec.json.decode(line, type=Launch), folder, pulse)


def live(pulse: Pulse, parent: int, folder: Path) -> None:
    """Beat for as long as the parent lives. When it is gone, the process ends at once, whatever it is doing, and
    removes the folder: nobody else is left to do that."""
    while os.getppid() == parent:
        pulse.beat()
        time.sleep(BEAT_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main()
