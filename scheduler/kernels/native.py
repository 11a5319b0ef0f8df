"""The native kernels: those that a wheel brought, or built from the C++ sources on first use and then kept.

    from scheduler.kernels.native import kernels
    out = kernels().paged_attention(q, k_cache, v_cache, ...)

There is a library for each instruction set (processor.py). A wheel has them all in prebuilt/; what is built here
goes into the user's cache, by a name that covers the sources, the flags and the compiler.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from functools import cache
from pathlib import Path

import platformdirs
from filelock import FileLock
from tqdm import tqdm

from scheduler.kernels.building import SOURCES, NativeBuildError, build, flags_of, version_of
from scheduler.kernels.library import Kernels
from scheduler.machine.processor import instruction_set
from scheduler.sealed import is_sealed, seal

__all__ = ["PREBUILT", "NativeBuildError", "kernels", "load"]

logger = logging.getLogger(__name__)

PREBUILT = SOURCES / "prebuilt"
"""Libraries by their instruction sets and versions: `avx2.0123456789abcdef.so`. A clone has none."""


@cache
def kernels() -> Kernels:
    """Those for this processor's instruction set, built if no wheel brought them and they were not built before.

    Raises NativeBuildError where there is no C++ compiler or the build fails.
    """
    return load(instruction_set())


def load(instructions: str) -> Kernels:
    """The kernels for one of processor.py's instruction sets. Several processes may call it at once. Where the
    cache cannot be written, they are built for this process alone. Raises NativeBuildError."""
    for file in PREBUILT.glob(f"{instructions}.*.so"):
        return Kernels(file, file.stem)
    name = f"{instructions}.{version_of(flags_of(instructions))}"
    folder = platformdirs.user_cache_path("carousel") / "kernels" / name
    built = folder / "kernels.so"
    if is_sealed(built):  # nobody changes it any more, so no lock is needed, nor leave to write one
        return Kernels(built, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")):
            if not is_sealed(built):
                _build(built, instructions)
                seal(built)
    except OSError as error:
        logger.warning(
            "cannot write the cache folder %s (%s): the native kernels are built for this run alone; set "
            "XDG_CACHE_HOME to a folder of yours",
            folder.parent,
            error.strerror,
        )
    else:
        return Kernels(built, name)
    folder_of_now = Path(tempfile.mkdtemp(prefix="carousel-kernels-"))
    try:
        _build(folder_of_now / "kernels.so", instructions)
        return Kernels(folder_of_now / "kernels.so", name)
    finally:
        shutil.rmtree(folder_of_now)


def _build(target: Path, instructions: str) -> None:
    with tqdm(desc="building the native kernels (once)", unit="file") as bar:

        def tell(count: int, total: int) -> None:
            bar.total = total
            bar.update(count - bar.n)

        build(target, instructions, tell)
