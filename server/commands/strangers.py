"""Other people's packages that have the names of ours: `scheduler`, `server` and `carousel` are taken on the
package index, and where one of those was installed too, its files lie among ours."""

from __future__ import annotations

from importlib.metadata import Distribution, PackageNotFoundError, distribution

NAMES = ("scheduler", "server", "carousel")


def strangers() -> list[str]:
    """What is installed, by its name and version, that brings files of a package of ours."""
    found = []
    for name in NAMES:
        try:
            other = distribution(name)
        except PackageNotFoundError:
            continue
        if _is_in_the_way(other):
            found.append(f"{name} {other.version}")
    return found


def _is_in_the_way(other: Distribution) -> bool:
    if any(point.value.startswith("server.commands.main") for point in other.entry_points):
        return False  # ours, by the name that it had before
    return any(file.name == "__init__.py" and file.parent.as_posix() in NAMES for file in other.files or ())


def told_of(found: list[str]) -> str:
    names = " and ".join(each.split()[0] for each in found)
    return (
        f"{', '.join(found)} is another project, whose files have the names of Carousel's: install Carousel into "
        f"an environment of its own, or remove that one (pip uninstall {names}) and install Carousel again"
    )
