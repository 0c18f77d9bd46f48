"""What building the native backend says when it cannot."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CMAKE = shutil.which("cmake")

pytestmark = pytest.mark.skipif(CMAKE is None, reason="cmake is not on the path")


def configure(build: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run CMake on the checkout with a changed environment."""
    return subprocess.run(
        [str(CMAKE), "-S", str(ROOT), "-B", str(build), *options],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.parametrize("how", ["CXX names nothing", "PATH has no compiler"])
def test_without_a_compiler_the_build_says_what_is_missing(how: str, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("make", "ninja"):  # CMake asks for one of them first
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    missing = str(tools / "g++")
    changes = {"CXX": missing} if how == "CXX names nothing" else {"PATH": str(tools), "CXX": ""}
    done = configure(tmp_path / "build", **changes)
    message = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert "Quire's native kernels need a C++17 compiler, and none was found" in message
    assert "apt install g++" in message
    assert "environment variable CXX" in message


def test_an_unknown_variant_is_refused_by_name(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DQUIRE_VARIANTS=portable;sse9", "-DQUIRE_CORE=ONLY")
    assert done.returncode != 0
    assert "QUIRE_VARIANTS: 'sse9' is none of portable" in " ".join(done.stderr.split())
