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
"""What the scripts of this folder share: recorded weights, from which averages are computed again."""

import importlib.metadata
import platform

import numpy as np

from tests import numpy_averages


class Record:
    """The values of variables before training and after each step.

    Args:
      variables: those of a model that exists in full, before its first step.
    """

    def __init__(self, variables):
        self.variables = list(variables)
        self.steps = []
        self.add()

    def add(self):
        self.steps.append([variable.numpy() for variable in self.variables])

    def callback(self, keras):
        """One for `fit` that records after each batch."""
        return keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: self.add())

    def averages(self, scheme):
        """The averages in float64, computed by NumPy."""
        return [
            numpy_averages.expected_average(scheme, [step[index] for step in self.steps])
            for index in range(len(self.variables))
        ]

    def check(self, optimizer, scheme, evaluate):
        """Averages are those of NumPy; `evaluate` sees them, and nothing else, while they are swapped in.

        Returns:
          What `evaluate` returns with the averages in the model.
        """
        expected = self.averages(scheme)
        assert len(self.steps) > 4
        assert int(optimizer.num_averaged) == len(numpy_averages.due_steps(scheme, len(self.steps) - 1))
        assert_close([optimizer.get_average(variable) for variable in self.variables], expected)
        weights, raw = [variable.numpy() for variable in self.variables], evaluate()
        with optimizer.swapped_weights():
            assert_close([variable.numpy() for variable in self.variables], expected)
            averaged = evaluate()
        for variable, before in zip(self.variables, weights):
            np.testing.assert_array_equal(variable.numpy(), before, err_msg=variable.name)
        assert not np.allclose(raw, averaged), "The averages change nothing: this shows nothing."
        np.testing.assert_array_equal(evaluate(), raw)
        return averaged


def assert_close(actual, expected):
    """Two lists of arrays agree up to the rounding of float32."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-6)


def report(*packages):
    """Prints what ran."""
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    print("Averages are right:", ", ".join([*versions, f"Python {platform.python_version()}"]))
