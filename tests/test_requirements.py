"""constraints.txt, which make lock writes, against requirements*.txt and against what is installed."""

import re
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

import pytest
from conftest import REPO
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

FILES = sorted(path.name for path in REPO.glob("requirements*.txt"))
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
PLATFORMS = {"linux": ("Linux", "posix"), "darwin": ("Darwin", "posix"), "win32": ("Windows", "nt")}
# no address, no path, and no label of one index as in 2.13.0+cpu
LINE = re.compile(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; [^;#@/\\]+)?")


def lines_of(name: str) -> list[str]:
    return [line for line in (REPO / name).read_text().splitlines() if line and not line.startswith("#")]


def requirements_of(name: str) -> list[Requirement]:
    return [Requirement(line.split("#")[0]) for line in lines_of(name) if not line.startswith("-r ")]


def environment(python: str, platform: str) -> dict[str, str]:
    system, os_name = PLATFORMS[platform]
    return {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": platform,
        "platform_system": system,
        "os_name": os_name,
        "implementation_name": "cpython",
    }


def locked(where: dict[str, str]) -> dict[str, list[Version]]:
    """The versions of each package that are locked for an environment: there should be one."""
    versions: dict[str, list[Version]] = {}
    for requirement in requirements_of("constraints.txt"):
        if requirement.marker is None or requirement.marker.evaluate(where):
            (specifier,) = requirement.specifier
            versions.setdefault(canonicalize_name(requirement.name), []).append(Version(specifier.version))
    return versions


def test_lock_has_names_and_versions_only():
    assert [line for line in lines_of("constraints.txt") if not LINE.fullmatch(line)] == []


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_locked_within_its_range(python, platform):
    where = environment(python, platform)
    versions = locked(where)
    assert {name: several for name, several in versions.items() if len(several) > 1} == {}
    for name in FILES:
        for requirement in requirements_of(name):
            if requirement.marker is None or requirement.marker.evaluate(where):
                (pinned,) = versions.get(canonicalize_name(requirement.name), [None])
                assert pinned, f"{name}: {requirement} is not in constraints.txt; run: make lock"
                assert pinned in requirement.specifier, f"{name}: {requirement}, locked at {pinned}"


def test_what_make_installed_is_locked():
    if Path(sys.prefix).resolve() != (REPO / ".venv").resolve():
        pytest.skip("this is not the environment that make sets up")
    # not all of sys.path: setuptools adds its own copies of other packages to it
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    installed = {canonicalize_name(package.name): package.version for package in distributions(path=folders)}
    wrong = {
        name: f"{installed[name]}, locked at {pinned}"
        for name, (pinned,) in locked({}).items()
        if name in installed and Version(Version(installed[name]).public) != pinned  # without +cpu
    }
    assert not wrong
