"""What pyproject.toml cannot say: a wheel has the kernels of all instruction sets, and belongs to no Python."""

from __future__ import annotations

import platform
import sys
import types
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

# The package without what it imports by itself, which is not there while it is built.
package = types.ModuleType("scheduler")
package.__path__ = [str(Path(__file__).parent / "scheduler")]
sys.modules["scheduler"] = package

from scheduler.kernels.building import build, flags_of, version_of  # noqa: E402
from scheduler.machine.processor import FLAGS  # noqa: E402

PREBUILT = Path("scheduler/kernels/prebuilt")


class BuildWithKernels(build_py):
    """Compiles them, unless the package stays where its sources are: then it does so when it is first used."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        for instructions in FLAGS if is_x86 else ("portable",):
            version = version_of(flags_of(instructions))
            target = Path(self.build_lib) / PREBUILT / f"{instructions}.{version}.so"
            if target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            for older in target.parent.glob(f"{instructions}.*.so"):
                older.unlink()
            print(f"compiling the kernels for {instructions}", flush=True)
            build(target, instructions, lambda count, total: None)


class PlatformWheel(bdist_wheel):
    """For any Python 3, on this kind of machine."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class WithLibraries(Distribution):
    """What tells that the wheel is for one kind of machine."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel}, distclass=WithLibraries)
