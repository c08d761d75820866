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
"""What the callbacks have in common: they are of both Kerases, and they know the averaging optimizer."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Optional

from tf_averaging import batch_norm
from tf_averaging import kerases
from tf_averaging import side_by_side
from tf_averaging.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from tf_averaging.averaging_optimizer import averaging_optimizer
from tf_averaging.averaging_optimizer import find_averaging_optimizer

_CALLBACKS = kerases.bases("callbacks.Callback")


class AveragingCallback(*_CALLBACKS):  # type: ignore[misc]
    """A callback of every Keras at once, for models with an averaging optimizer."""

    def __init__(self, optimizer: Optional[AveragedOptimizerWrapper]):
        for base in _CALLBACKS:  # Neither calls the other's.
            base.__init__(self)
        self.params: Dict[str, Any] = {}  # A custom loop may not set any.
        # What tf_keras asks: nothing here reads logs, so there is no reason to wait for their values.
        self._supports_tf_logs = True
        self._given_optimizer = None if optimizer is None else averaging_optimizer(optimizer)

    @property
    def model(self) -> Any:
        """The model that is trained or evaluated."""
        return self._model

    @model.setter
    def model(self, model: Any) -> None:
        # An attribute in tf_keras, which sets it; a property that reads `_model` in Keras 3.
        self._model = model

    @property
    def _swaps(self) -> List[Any]:
        """The `SwapAverageWeights` of this training, in order; all callbacks share its parameters."""
        return self.params.setdefault("swap_average_weights", [])

    @property
    def optimizer(self) -> AveragedOptimizerWrapper:
        """The averaging optimizer: the one given, or the one in the model's optimizer."""
        if self._given_optimizer is not None:
            return self._given_optimizer
        return averaging_optimizer(self.model)


class SavesAverages:
    """Stands in for a model before a `ModelCheckpoint`: its averages are saved; all else is the model's.

    Only the writing of a file may see the averages, and `ModelCheckpoint` of neither Keras has a public
    method for that moment. Both write by `model.save` and `model.save_weights`.
    """

    def __init__(self, model, averages_in_model: Callable[[], ContextManager]):
        self._model = model
        self._averages_in_model = averages_in_model

    def save(self, *args, **kwargs) -> None:
        with self._averages_in_model():
            self._model.save(*args, **kwargs)

    def save_weights(self, *args, **kwargs) -> None:
        with self._averages_in_model():
            self._model.save_weights(*args, **kwargs)

    def __getattr__(self, name: str):
        # Copying looks for special methods, and for those below before they are there.
        if name in ("_model", "_averages_in_model") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._model, name)


def follow(optimizer: AveragedOptimizerWrapper, model: Any) -> None:
    """Has the optimizer average the model's variables.

    One that the model is not compiled with may train a part of it alone, as in a GAN. It averages what it
    was told to, or what it trains.
    """
    selection = optimizer._updates.selection
    if not selection.is_fixed:  # A list of variables may be of anything.
        kerases.check_same_keras(optimizer.keras, model)
    is_told = selection.is_fixed or selection.model is not None or selection.trainable_only
    if find_averaging_optimizer(model) is optimizer or not is_told:
        optimizer.shadow_copy(model)


def hold(optimizer: AveragedOptimizerWrapper, averages: bool) -> None:
    """Makes the model hold the averages, or the raw weights."""
    swapped = side_by_side.in_model(optimizer)  # Of several averages any one.
    # Before there are averages they are the weights.
    if optimizer.has_shadow_copy and (swapped is not None) != averages:
        (swapped or optimizer).swap_weights()


@contextlib.contextmanager
def holding(optimizer: AveragedOptimizerWrapper, averages: bool) -> Iterator[None]:
    """A context in which the model holds the averages, or the raw weights; then what it held before."""
    before = side_by_side.in_model(optimizer)
    hold(optimizer, averages)
    try:
        yield
    finally:
        hold(before or optimizer, averages=before is not None)


def check_data(name: str, data: Any, steps_name: str, steps: Optional[int]) -> None:
    """Refuses data that are gone after one pass, or never end."""
    if steps is None and (hasattr(data, "__next__") or batch_norm.is_endless(data)):
        raise ValueError(
            f"Expected `{name}` to be data that can be read again, since that happens at the end of each "
            f"epoch: arrays or a `tf.data.Dataset`; or, if they never end, `{steps_name}` with them. "
            f"Received: {name}={data!r}"
        )


def checked_bool(name: str, value: bool) -> bool:
    """Returns `value`, which must be a bool."""
    if not isinstance(value, bool):
        raise TypeError(
            f"Expected `{name}` to be a bool. Received: {name}={value!r} of type {type(value)}"
        )
    return value
