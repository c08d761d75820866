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
"""Runs the test suite on the oldest and the newest supported releases, the wheel on its own, and clients.

    nox                       # everything
    nox -s tests -- -x tests/swap_test.py
    nox -s wheel
    nox -s "clients(client='transformers')"

Each session has a virtual environment of its own, in `.nox`. The Python versions must be installed.
"""

import pathlib

import nox

# Python, TensorFlow: pyproject.toml and docs/compatibility.md say the same.
RELEASES = [("3.9", "2.16"), ("3.11", "2.21"), ("3.13", "2.21")]
# As `make test` does.
TWO_PROCESSES = ["--numprocesses=2", "--dist=loadfile", "--no-loadscope-reorder"]
# Libraries that the package is tried with: docs/compatibility.md has the results.
CLIENTS = {
    "transformers": ("transformers_bert", "2.21", ["transformers==4.57.*"]),
    "recommenders": ("recommenders_retrieval", "2.21", ["tensorflow-recommenders==0.7.*"]),
    "probability": ("probability_layers", "2.21", ["tensorflow-probability==0.25.*"]),
    # 0.19 needs a typing-extensions and a Probability of its time.
    "tf-agents": ("agents_dqn", "2.16", ["tf-agents==0.19.*"]),
    "keras-tuner": ("tuner_search", "2.21", ["keras-tuner==1.4.*", "tensorboard==2.21.*"]),
    "model-optimization": ("model_optimization", "2.21", ["tensorflow-model-optimization==0.8.*"]),
    "tf-models": ("models_trainer", "2.20", ["tf-models-official==2.20.*"]),
    "keras-hub": ("hub_bert", "2.21", ["keras-hub==0.32.*"]),
}
WITH_KERAS_3 = ("keras-tuner", "keras-hub")


@nox.session
@nox.parametrize("python,tensorflow", RELEASES)
def tests(session: nox.Session, tensorflow: str) -> None:
    """The whole test suite, or what is named after `--`."""
    releases = [f"{package}=={tensorflow}.*" for package in ("tensorflow", "tf-keras", "tensorboard")]
    session.install("--editable", ".[test,examples]", *releases)
    session.run("python", "-m", "pytest", *(session.posargs or TWO_PROCESSES))


@nox.session
def wheel(session: nox.Session) -> None:
    """Installs the wheel with its dependencies, and runs the README's lines away from the checkout."""
    directory = pathlib.Path(session.create_tmp())
    session.run(
        "python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(directory), "."
    )
    (built,) = directory.glob("tf_averaging-*.whl")
    session.install(str(built))
    readme = session.run("python", "-m", "tests.markdown_code", "README.md", silent=True)
    (directory / "readme.py").write_text(readme, encoding="utf-8")
    session.chdir(directory)
    session.run("python", "readme.py")


@nox.session(python="3.11")
@nox.parametrize("client", list(CLIENTS))
def clients(session: nox.Session, client: str) -> None:
    """A script of tests/clients with the library that it is for."""
    script, tensorflow, packages = CLIENTS[client]
    releases = [f"{package}=={tensorflow}.*" for package in ("tensorflow", "tf-keras")]
    session.install("--editable", ".", *releases, *packages)
    legacy = "0" if client in WITH_KERAS_3 else "1"
    session.run("python", "-m", f"tests.clients.{script}", env={"TF_USE_LEGACY_KERAS": legacy})
