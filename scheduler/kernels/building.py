"""From the C++ sources to a shared object: by any compiler of C++20, and without torch or Python's headers.

Each source is compiled by itself, as many at a time as there are cores. What was compiled is kept until the
library is whole, so that a build which was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from scheduler.machine.processor import FLAGS
from scheduler.sealed import is_sealed, seal

SOURCES = Path(__file__).parent

ALWAYS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffunction-sections",
    "-Wno-psabi",  # about how functions pass vectors: these are all inlined
)
LINKED = (
    "-shared",
    "-pthread",
    "-static-libstdc++",
    "-static-libgcc",
    "-Wl,--exclude-libs,ALL",  # torch has brought another C++ library: names of this one must not meet those
    "-Wl,--gc-sections",
)
"""The library needs nothing but the C library, whichever compiler it was built by."""

SANITIZE = "CAROUSEL_SANITIZE"
"""With this set in the environment, a build that stops at the first address or operation that is not allowed."""
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1", "-O1")

Progress = Callable[[int, int], None]
"""Told how many files are compiled, and of how many."""


class NativeBuildError(RuntimeError):
    """The kernels could not be built; the message says why."""


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def flags_of(instructions: str) -> tuple[str, ...]:
    """For one of processor.py's instruction sets."""
    return (*ALWAYS, *FLAGS[instructions], *(SANITIZED if os.environ.get(SANITIZE) else ()))


def version_of(flags: tuple[str, ...]) -> str:
    """Of what these sources become by this compiler."""
    files = sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")))
    return _digest(compiler().encode(), _compilers_name().encode(), repr(flags).encode(), *map(_content, files))


def build(target: Path, instructions: str, progress: Progress) -> None:
    """Write the library to `target`, and meanwhile what is compiled to a folder beside it. Raises NativeBuildError
    and OSError."""
    if shutil.which(compiler()) is None:
        raise NativeBuildError(f"the native kernels need a C++ compiler, and {compiler()!r} is not on the PATH")
    objects = target.with_suffix(".objects")
    objects.mkdir(parents=True, exist_ok=True)
    flags = flags_of(instructions)
    # Those of templates take longest, so they come first.
    sources = sorted(SOURCES.glob("*.cpp"), key=lambda source: (not source.stem.startswith("gemm_"), source))
    headers = map(_content, sorted(SOURCES.glob("*.h")))
    shared = _digest(_compilers_name().encode(), repr(flags).encode(), *headers)
    progress(0, len(sources))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = [pool.submit(_compiled, source, objects, flags, shared) for source in sources]
        try:
            for count, future in enumerate(as_completed(compiled), 1):
                future.result()
                progress(count, len(sources))
        finally:
            pool.shutdown(cancel_futures=True)
    _run([*flags, *LINKED, *(str(future.result()) for future in compiled), "-o", str(target)])
    shutil.rmtree(objects)


def _compiled(source: Path, folder: Path, flags: tuple[str, ...], shared: str) -> Path:
    """The object of a source, compiled unless it is there. `shared`: of what all sources are compiled with."""
    key = _digest(shared.encode(), _content(source))
    target = folder / f"{source.stem}.{key}.o"
    if not is_sealed(target):
        _run([*flags, "-c", str(source), "-o", str(target)])
        seal(target)
    return target


def _run(arguments: list[str]) -> None:
    # A sanitizer that is preloaded would watch the compiler too, for minutes.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run([compiler(), *arguments], env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        tail = "\n".join(result.stderr.splitlines()[-30:])
        raise NativeBuildError(f"the native kernels could not be built:\n{tail}")


def _compilers_name() -> str:
    """With its version; nothing where there is none: kernels that were built before still load."""
    try:
        return subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def _content(file: Path) -> bytes:
    return file.name.encode() + b"\0" + file.read_bytes()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]
