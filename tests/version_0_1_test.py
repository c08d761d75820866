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
"""What version 0.1 has written restores, and the run goes on as the one that never stopped."""

import functools
import pathlib
import warnings

import numpy as np
import pytest
import tf_keras

from tests import testing_utils
from tests.testdata.version_0_1 import cases

# When a file is restored: before any variable exists (but bare ones), when all are built, or after a
# step; or a model is made from it.
MOMENTS = {
    "checkpoint": ["early", "late"],
    "variables": ["early", "late"],
    ".weights.h5": ["built"],
    ".keras": ["loaded"],
    ".h5": ["loaded"],
}


def restored(case, moment):
    """The case's model, restored from its file."""
    if moment == "loaded":
        model = tf_keras.models.load_model(case.path)
        cases.say_what_is_averaged(case, model)
        return model
    model = cases.new_model(case, seed=2, built=False)
    if moment == "early":
        restore(case, model)
    cases.build(case, model)
    if moment == "late":
        if "begun" in case.options:
            cases.averaging(model).begin_averaging(cases.START + 1)  # The file says another one.
        cases.train(model, 0, 1)
    if moment != "early":
        restore(case, model)
    return model


def restore(case, model):
    if case.form == ".weights.h5":
        model.load_weights(case.path)
    else:
        cases.checkpoint_of(case, model).restore(case.path)


def expected_of(case):
    """The states that were recorded: "saved" and, unless the file keeps weights only, "continued"."""
    states = {}
    with np.load(pathlib.Path(case.path).parent / "expected.npz") as file:
        for key in file.files:
            when, name = key.split("/", 1)
            states.setdefault(when, {})[name] = file[key]
    return states


@functools.cache
def weights_without_averaging(case):
    """What the inner optimizer alone makes of the case's weights, in as many steps."""
    model = cases.new_model(case, seed=1, bare=True)
    cases.train(model, 0, cases.STEPS_BEFORE + cases.STEPS_AFTER)
    return {f"weight/{v.name}": v.numpy().tobytes() for v in model.variables}


def computes_alike(case, expected):
    """Whether training takes the recorded steps bit for bit here, whatever averages.

    TensorFlow's matrix products round differently on another processor, or in another release.
    """
    # To scale the loss changes no bit of float32 gradients.
    matters = {"float16", "loss_scaling"} if "float16" in case.options else set()
    form = "variables" if case.form == "variables" else "checkpoint"
    options = tuple(sorted(matters.intersection(case.options)))
    weights = weights_without_averaging(case._replace(form=form, scheme="swa", options=options))
    return all(expected[name].tobytes() == value for name, value in weights.items())


def assert_holds(case, model, expected, exactly=True):
    state = cases.state_of(case, model)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        if exactly or value.dtype.kind != "f":
            testing_utils.assert_same_bits([state[name]], [value], name)
        else:
            tolerance = 1e-2 if "float16" in case.options else 1e-3
            np.testing.assert_allclose(state[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


def assert_went_on(case, model, expected):
    """Asserts the recorded end, to the last bit wherever training without averaging gets to it."""
    try:
        assert_holds(case, model, expected)
    except AssertionError:
        if computes_alike(case, expected):
            raise
        assert_holds(case, model, expected, exactly=False)
        warnings.warn("This machine rounds otherwise; compared with tolerances.", stacklevel=2)


def assert_averages_are_slots(case, model):
    optimizer = cases.averaging(model)
    for variable in cases.averaged(case, model):
        slot = optimizer.get_slot(variable, "average")
        average = optimizer.get_average(variable)
        testing_utils.assert_same_bits([slot.numpy()], [average.numpy()], variable.name)


@pytest.mark.parametrize(
    ("case", "moment"),
    [
        pytest.param(case, moment, id=f"{case.name}-{moment}")
        for case in cases.CASES
        for moment in MOMENTS[case.form]
    ],
)
def test_restores_and_goes_on(case, moment):
    expected = expected_of(case)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "The initializer .* is unseeded")  # Of a model that is loaded.
        model = restored(case, moment)
    assert_holds(case, model, expected["saved"])
    if case.keeps_weights_only:
        return
    optimizer = cases.averaging(model)
    if optimizer.weights_swapped:
        optimizer.swap_weights()
    assert_averages_are_slots(case, model)
    cases.train(model, cases.STEPS_BEFORE, cases.STEPS_AFTER)
    assert_went_on(case, model, expected["continued"])
    assert_averages_are_slots(case, model)
