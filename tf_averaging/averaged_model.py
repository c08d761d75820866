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
"""A second model that holds the averages: a teacher for the first one, or the one to export."""

from __future__ import annotations

import tempfile
from typing import Any, Dict, List, Optional, Tuple

import tensorflow as tf

from tf_averaging import kerases
from tf_averaging.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from tf_averaging.averaging_optimizer import check_averages
from tf_averaging.averaging_optimizer import find_averaging_optimizer
from tf_averaging.core import variables as core_variables


def averaged_model(
    model: Any,
    optimizer: Optional[AveragedOptimizerWrapper] = None,
    target: Any = None,
    which: int = 0,
) -> Any:
    """Returns a model of the same architecture that holds the averages of `model`'s weights.

    What is not averaged (statistics of BatchNormalization, by default) is what `model` holds when it
    shows its averages. Averages are read, never swapped, so training is not disturbed, whether the
    weights are swapped or not.

    As the teacher of a Mean Teacher (arXiv:1703.01780) or the target network of BYOL (arXiv:2006.07733),
    refreshed between steps, by a callback for example:

    >>> student = tf.keras.Sequential([tf.keras.Input([2]), tf.keras.layers.Dense(1)])
    >>> student.compile(tfav.ExponentialMovingAverage("sgd"), "mse")
    >>> teacher = tfav.averaged_model(student)
    >>> refresh = tf.keras.callbacks.LambdaCallback(
    ...     on_batch_end=lambda batch, logs: tfav.averaged_model(student, target=teacher))
    >>> _ = student.fit(tf.ones([8, 2]), tf.ones([8, 1]), callbacks=[refresh], verbose=0)

    Args:
      model: a built model of Keras 3 or tf_keras.
      optimizer: the averaging optimizer, or one around it; None for the one that `model` is compiled
        with.
      target: a model of the same architecture to set, an earlier result for example; None for a new one,
        which is a clone of `model`, under the same strategy, and not compiled. What is frozen may differ.
      which: of several averages, the place in the list of the one to use.

    Returns:
      `target`, or the new model.

    Raises:
      TypeError: if `model` or `target` is not a Keras model.
      ValueError: if there is no averaging optimizer, or one of another model, `model` has not been built
        or cannot be cloned, `target` has other variables, or `which` is out of range.
      RuntimeError: in a `tf.function`.
    """
    for argument in [model] if target is None else [model, target]:
        kerases.of_model(argument)
    if not tf.executing_eagerly():
        raise RuntimeError(
            "`averaged_model` cannot be called in a graph. Call it between calls of the `tf.function`, "
            "in a callback for example."
        )
    found = find_averaging_optimizer(optimizer or model)
    if found is None:
        raise ValueError(
            "Expected an averaging optimizer, such as `tf_averaging.ExponentialMovingAverage(...)`, as "
            "`optimizer` or as what `model` is compiled with. Received: "
            f"{optimizer or getattr(model, 'optimizer', None)!r}"
        )
    if not model.built:
        raise ValueError(
            "The model has not been built, so it has no weights yet. Expected a model that has an input "
            "shape or was called on data."
        )
    if target is model:
        raise ValueError("Expected a `target` other than `model`, which holds the weights that train.")
    result = _clone(model) if target is None else target
    twins = _matching(result, model)
    found._unclaimed.check()
    if found.has_shadow_copy:  # Until then the averages are the weights.
        check_averages(found, model)
    for twin, variable in zip(twins, variables_of(model)):
        average = _average(found, variable, which)
        if average is None:
            _copy(twin, variable)
        else:
            core_variables.assign_everywhere(kerases.tf_variable(twin), average)
    if target is None:
        _finalize_adapted(result)
    return result


def _average(optimizer: AveragedOptimizerWrapper, variable, which: int):
    """The average of `variable`, None if it has none."""
    try:
        return optimizer.get_average(variable, which)
    except KeyError:
        return None


def _clone(model):
    try:
        with model.distribute_strategy.scope():
            clone = kerases.of(model).models.clone_model(_uncompiled(model))
            if not clone.built:
                clone.build_from_config(model.get_build_config())
        _copy_adapted(model, clone)
        return clone
    except Exception as error:
        raise ValueError(
            "The model cannot be cloned. Expected a functional or sequential model, one whose class has "
            "`get_config` and knows its input shape, or as `target` a second model that the same code "
            f"has created and built. Received: {model!r}; cloning it failed with: {error!r}"
        ) from error


def _uncompiled(model):
    """The model, or for Keras 3 a second object with all that it has, which says that it is not compiled.

    It would compile the clone of a compiled one, with a second optimizer and all its state. tf_keras does
    not, and has no such attribute. The model itself is left alone: it may be in training on another
    thread.
    """
    if not getattr(model, "compiled", False):
        return model
    view = object.__new__(type(model))
    vars(view).update(vars(model), compiled=False)
    return view


def _copy_adapted(model, clone) -> None:
    """Gives the clone what `adapt` computed and the layer keeps in other things than variables."""
    for layer, twin in zip(model._flatten_layers(), clone._flatten_layers()):
        if hasattr(layer, "load_assets"):
            # What Keras 3 saves as the layer's own need not be among its variables.
            store: Dict[str, Any] = {}
            layer.save_own_variables(store)
            twin.load_own_variables(store)
            with tempfile.TemporaryDirectory() as path:
                layer.save_assets(path)
                twin.load_assets(path)


def _finalize_adapted(clone) -> None:
    """Has layers compute what they derive from their variables; others have it from the config."""
    for layer in clone._flatten_layers():
        if hasattr(layer, "finalize_state") and layer.variables:
            layer.finalize_state()


def variables_of(model) -> List[Any]:
    """The model's variables, layer by layer.

    `model.variables` of tf_keras has trainable ones first within each layer that is made of others, so
    its order is another one where a part is frozen.
    """
    place: Dict[int, int] = {}
    for layer in model._flatten_layers():
        parts = layer._flatten_layers(recursive=False, include_self=False)
        not_its_own = {id(variable) for part in parts for variable in part.variables}
        for variable in layer.variables:
            if id(variable) not in not_its_own:
                place.setdefault(id(variable), len(place))
    variables = [v for v in model.variables if isinstance(kerases.tf_variable(v), tf.Variable)]
    return sorted(variables, key=lambda variable: place.get(id(variable), len(place)))


def _matching(target, model) -> List[Any]:
    """The variables of `target`, which must be like those of `model`."""
    found, expected = ([_shape_and_dtype(v) for v in variables_of(m)] for m in (target, model))
    if found != expected:
        difference = next((pair for pair in zip(expected, found) if pair[0] != pair[1]), None)
        raise ValueError(
            f"Expected a `target` with variables like the model's {len(expected)}. Received one that has "
            f"{len(found)}; first difference in shape and dtype, the model's first: {difference}"
        )
    return variables_of(target)


def _components(variable) -> List[core_variables.Component]:
    return core_variables.all_components(kerases.tf_variable(variable))


def _shape_and_dtype(variable) -> Tuple[tf.TensorShape, tf.DType]:
    component = _components(variable)[0]
    return component.shape, component.dtype


def _copy(target, source) -> None:
    """Sets `target` to the value of `source`; buffers are shared until one is written."""
    targets, sources = _components(target), _components(source)
    if len(targets) == len(sources):
        core_variables.copy(list(zip(targets, sources)))
    else:  # One of the models lives under a strategy and the other does not.
        value = tf.convert_to_tensor(kerases.tf_variable(source).read_value())
        core_variables.assign_everywhere(kerases.tf_variable(target), value)
