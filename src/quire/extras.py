"""Extras: what each asks for and what of it is installed, as the metadata of packages says."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

__all__ = ["Part", "extras", "why_off", "why_unfit"]


@dataclass(frozen=True)
class Part:
    """A distribution that an extra asks for.

    wanted     versions, like ``>=3.5``
    installed  the version that is there, or None
    """

    name: str
    wanted: str
    installed: str | None

    @property
    def fits(self) -> bool:
        """True where it is there, in a version that is asked for.

        Builds ahead of a release count as that; a version that says nothing is left to who made it.
        """
        if self.installed is None:
            return False
        try:
            return SpecifierSet(self.wanted).contains(Version(self.installed).base_version)
        except InvalidVersion:
            return True


def extras() -> dict[str, tuple[Part, ...]]:
    """For every extra the parts that it has on this system; none where Quire is not installed."""
    try:
        found = importlib.metadata.metadata("quire")
    except importlib.metadata.PackageNotFoundError:
        return {}
    asked = [Requirement(text) for text in found.get_all("Requires-Dist") or []]
    names = found.get_all("Provides-Extra") or []
    return {name: tuple(_part(each) for each in asked if _is_of(each, name)) for name in names}


def why_unfit(extra: str) -> str | None:
    """Which installed parts of ``extra`` are of versions that it does not take, and what to do.

    None where there are no such; what is missing is no reason here, since an import says so.
    """
    present = [part for part in extras().get(extra, ()) if part.installed is not None]
    return why_off(extra, present)


def why_off(extra: str, parts: Sequence[Part]) -> str | None:
    """What of these parts of ``extra`` is missing or unfit, and what to do; None for nothing."""
    missing = [part.name for part in parts if part.installed is None]
    reasons = [f"{', '.join(missing)} not installed"] if missing else []
    reasons += [
        f"{part.name} {part.installed} is installed, and {part.wanted} is needed"
        for part in parts
        if part.installed is not None and not part.fits
    ]
    return f"{'; '.join(reasons)}; pip install -U 'quire[{extra}]'" if reasons else None


def _is_of(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and all(
        marker.evaluate({"extra": name}) is (name == extra) for name in ("", extra)
    )


def _part(requirement: Requirement) -> Part:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    return Part(requirement.name, str(requirement.specifier), version)
