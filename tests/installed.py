"""The project as a user installs it: a virtual environment with the wheel, or an editable copy.

python = install(tmp_path, editable=False)          # tmp_path/venv/bin/python
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.tiny import ROOT


def install(folder: Path, editable: bool = False) -> Path:
    """Install a copy of the project into a new environment; torch and all else come from the tests' own."""
    source = folder / "source"  # a copy: pip leaves its build/ where it builds
    for package in ("data", "trainer"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    modules = {path.relative_to(source) for path in source.glob("**/*.py")}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    (packages,) = (folder / "venv/lib").glob("*/site-packages")
    (packages / "of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", *["-e"] * editable]
    subprocess.run([*pip, *options, source], check=True, cwd=folder)
    if not editable:
        shutil.rmtree(source)
        assert modules == {path.relative_to(packages) for path in packages.glob("**/*.py")}
    return python
