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
"""Writes the files beside it, with what they hold and how the runs went on.

    python -m tests.testdata.version_0_1.write

It needs version 0.1 of the package: the files are never written again, and later versions must restore
them. And TensorFlow 2.16, the oldest release that 0.1 supports: tf_keras 2.16 cannot load models that
newer releases have saved, while newer ones load its own.
"""

import pathlib
import shutil

import numpy as np
import tensorflow as tf

import tf_averaging as tfav
from tests.testdata.version_0_1 import cases


def write(case: cases.Case) -> None:
    """Trains, saves, and trains on: the file, and in `expected.npz` the state then and at the end."""
    path = pathlib.Path(case.path)
    shutil.rmtree(path.parent, ignore_errors=True)
    path.parent.mkdir()
    model = cases.new_model(case, seed=1)
    optimizer = cases.averaging(model)
    cases.say_what_is_averaged(case, model)
    if "begun" in case.options:
        optimizer.begin_averaging(cases.START)
    cases.train(model, 0, cases.STEPS_BEFORE)
    if "statistics" in case.options:
        with optimizer.swapped_weights():
            tfav.update_batch_norm(
                model, np.linspace(-1, 2, 32, dtype=np.float32).reshape(8, 4), verbose=0
            )
    if "swapped" in case.options:
        optimizer.swap_weights()
    save(case, model, path)
    states = {"saved": cases.state_of(case, model)}
    if not case.keeps_weights_only:
        if "swapped" in case.options:
            optimizer.swap_weights()
        cases.train(model, cases.STEPS_BEFORE, cases.STEPS_AFTER)
        states["continued"] = cases.state_of(case, model)
    arrays = {f"{when}/{key}": array for when, state in states.items() for key, array in state.items()}
    for key, array in arrays.items():
        assert np.all(np.isfinite(array)), key
    np.savez_compressed(path.parent / "expected.npz", **arrays)


def save(case: cases.Case, model, path: pathlib.Path) -> None:
    if case.form in ("checkpoint", "variables"):
        cases.checkpoint_of(case, model).save(str(path.parent / "ckpt"))
        (path.parent / "checkpoint").unlink()  # Only says which one is the latest.
    elif case.form == ".weights.h5":
        model.save_weights(str(path))
    else:
        model.save(str(path))


def main() -> None:
    versions = tfav.__version__, tf.__version__
    if not (versions[0].startswith("0.1.") and versions[1].startswith("2.16.")):
        raise SystemExit(f"Expected tf_averaging 0.1 and TensorFlow 2.16. Received: {versions}")
    for case in cases.CASES:
        write(case)


if __name__ == "__main__":
    main()
