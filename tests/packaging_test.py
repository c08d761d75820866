# Copyright 2026 The tf_averaging Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The package as it is installed: what the wheel holds, and that the README's lines run from it alone."""

import email
import os
import pathlib
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile

import pytest
import tensorflow as tf

import tf_averaging as tfav
from tests import markdown_code

ROOT = markdown_code.ROOT
TIME_LIMIT = 300  # Seconds.

pytestmark = pytest.mark.slow


def run(*command, cwd, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=TIME_LIMIT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def build(kind, source, target):
    """What `pip` calls, in a copy, since setuptools leaves its own files in the tree."""
    target.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    run(sys.executable, "-c", code, cwd=source)
    (path,) = target.iterdir()
    return path


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The source distribution, and the wheel that is built from it."""
    directory = tmp_path_factory.mktemp("package")
    shutil.copytree(
        ROOT,
        directory / "tree",
        ignore=shutil.ignore_patterns(".*", "__pycache__", "output", "*.egg-info"),
    )
    source = build("sdist", directory / "tree", directory / "source")
    with tarfile.open(source) as archive:
        archive.extractall(directory / "unpacked")
    (unpacked,) = (directory / "unpacked").iterdir()
    return source, build("wheel", unpacked, directory / "wheel")


def test_wheel_holds_the_package_and_nothing_else(distributions):
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata_name,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(metadata_name))
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "tf_averaging").rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == modules | {"tf_averaging/py.typed"}
    assert any(name.endswith("LICENSE") for name in names)
    assert metadata["Name"].replace("-", "_") == "tf_averaging"
    assert metadata["Version"] == tfav.__version__
    assert metadata["Requires-Python"] == ">=3.9"
    required = {line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert {line.split("<")[0].split(">")[0].split()[0] for line in required} == {
        "tensorflow",
        "tf-keras",
        "absl-py",
    }


def test_source_distribution_can_be_tested(distributions):
    source, _ = distributions
    with tarfile.open(source) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"conftest.py", "tests/packaging_test.py", "docs/migration.md", "tools/build_docs.py"} <= names
    testdata = {str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "testdata").rglob("*.*")}
    assert {name for name in testdata if not name.endswith(".pyc")} <= names


def test_wheel_alone_runs_the_lines_of_the_readme(distributions, tmp_path):
    """In a new virtual environment with the wheel, and TensorFlow from where it is installed here."""
    _, wheel = distributions
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:  # All that installing a pure wheel does.
        archive.extractall(packages)
    # As path entries they do not bring along what is installed there for editing, this checkout say.
    dependencies = {pathlib.Path(tf.__file__).parent.parent, *map(pathlib.Path, site.getsitepackages())}
    (packages / "dependencies.pth").write_text("\n".join(map(str, dependencies)) + "\n")

    where = run(
        python, "-c", "import tf_averaging; print(tf_averaging.__file__)", cwd=tmp_path, PYTHONPATH=""
    )
    assert pathlib.Path(where.splitlines()[-1]).parent == packages / "tf_averaging"
    program = markdown_code.program_of(ROOT / "README.md")
    (tmp_path / "readme.py").write_text(program, encoding="utf-8")
    run(python, "readme.py", cwd=tmp_path, PYTHONPATH="")
    assert (tmp_path / "averaged.keras").exists()
