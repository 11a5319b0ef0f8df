"""The native kernels: built from the C++ sources on first use, then loaded from a cache.

    from scheduler.kernels.native import kernels
    out = kernels().paged_attention(q, k_cache, v_cache, ...)

There is a build for each instruction set (processor.py); the cache key covers the sources, the flags, the
compiler, and the versions of Python and torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import platformdirs
import torch
from filelock import FileLock

from scheduler.machine.processor import FLAGS, instruction_set
from scheduler.sealed import is_sealed, seal

SOURCES = Path(__file__).parent
ALWAYS = (
    "-std=c++20",
    "-O3",
    "-fopenmp",
    "-fvisibility=hidden",
    "-Wno-psabi",  # about how functions pass vectors: these are all inlined
)
BUILD_SECONDS = 25

logger = logging.getLogger(__name__)

SANITIZE = "CAROUSEL_SANITIZE"
"""With this set in the environment, a build that stops at the first address or operation that is not allowed."""
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1", "-O1")


class NativeBuildError(RuntimeError):
    """The kernels could not be built; the message says why."""


@cache
def kernels() -> ModuleType:
    """The extension module for this processor's instruction set, built if this machine has not built it before.

    Raises NativeBuildError where there is no C++ compiler or the build fails.
    """
    return load(instruction_set())


def load(instructions: str) -> ModuleType:
    """The extension module compiled for one of processor.py's instruction sets, from the cache or into it. Several
    processes may call it at once. Where the cache cannot be written, the module is built for this process alone.
    Raises NativeBuildError."""
    flags = FLAGS[instructions] + (SANITIZED if os.environ.get(SANITIZE) else ())
    compiler = os.environ.get("CXX", "c++")
    name = f"carousel_kernels_{_cache_key(compiler, flags)}"
    folder = platformdirs.user_cache_path("carousel") / "kernels" / name
    built = folder / f"{name}.so"
    if is_sealed(built):  # nobody changes it any more, so no lock is needed, nor leave to write one
        return _import(name, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if is_sealed(built):
                return _import(name, folder)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            module = _build(name, folder, compiler, flags)
            seal(built)
            return module
    except OSError as error:
        logger.warning(
            "cannot write the cache folder %s (%s): the native kernels are built for this run alone; set "
            "XDG_CACHE_HOME to a folder of yours",
            folder.parent,
            error.strerror,
        )
    with tempfile.TemporaryDirectory(prefix="carousel-kernels-") as folder_of_now:
        return _build(name, Path(folder_of_now), compiler, flags)


def _cache_key(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for source in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    facts = (compiler, _version_of(compiler), *ALWAYS, *flags, platform.machine(), sys.version, torch.__version__)
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()[:16]


def _version_of(compiler: str) -> str:
    """What the compiler calls itself, or nothing where there is none: a kernel built before still loads."""
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def _build(name: str, folder: Path, compiler: str, flags: tuple[str, ...]) -> ModuleType:
    if shutil.which(compiler) is None:
        raise NativeBuildError(f"the native kernels need a C++ compiler, and {compiler!r} is not on the PATH")
    print(f"building the native kernels (once, about {BUILD_SECONDS} s)", file=sys.stderr, flush=True)
    from torch.utils.cpp_extension import load as compile_and_load  # takes a second: only when there is a build

    preloaded = os.environ.pop("LD_PRELOAD", None)  # a sanitizer: it would watch the compiler too, for minutes
    try:
        module: ModuleType = compile_and_load(
            name,
            [str(source) for source in sorted(SOURCES.glob("*.cpp"))],
            extra_cflags=[*ALWAYS, *flags],
            extra_ldflags=["-fopenmp", *(flag for flag in flags if flag.startswith("-fsanitize"))],
            build_directory=str(folder),
        )
        return module
    except (RuntimeError, OSError) as error:
        tail = "\n".join(str(error).splitlines()[-30:])
        raise NativeBuildError(f"the native kernels could not be built:\n{tail}") from error
    finally:
        if preloaded is not None:
            os.environ["LD_PRELOAD"] = preloaded


def _import(name: str, folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.so")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
