"""Wheels that cannot be installed beside the CPU lane, fetched by pip and read as source."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

INSTALLED = "installed"
CACHE = Path(os.environ.get("RLXF_WHEEL_CACHE", Path.home() / ".cache" / "rlxf" / "wheels"))


def wheel(requirement: str) -> zipfile.ZipFile:
    """The wheel of a pinned requirement (``name==version``), downloaded once; its dependencies are not."""
    folder = CACHE / requirement.replace("==", "-")
    if not list(folder.glob("*.whl")):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
        subprocess.run([*command, requirement], check=True, timeout=240)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def source(requirement: str, path: str) -> str:
    """One file of a wheel, as text; with ``INSTALLED`` that of the package that can be imported here."""
    if requirement == INSTALLED:
        package, _, inside = path.partition("/")
        spec = find_spec(package)
        assert spec is not None, f"{package} is not installed"
        assert spec.origin is not None
        return (Path(spec.origin).parent / inside).read_text()
    return wheel(requirement).read(path).decode()
