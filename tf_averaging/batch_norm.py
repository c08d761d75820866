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
"""Recomputes the statistics of BatchNormalization for the weights that are in the model."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Set, Tuple, Union

import tensorflow as tf
from absl import logging

from tf_averaging import faces
from tf_averaging import kerases
from tf_averaging.core import variables as core_variables


def update_batch_norm(
    model, data, steps: Optional[int] = None, verbose: Union[str, int] = "auto"
) -> None:
    """Sets the statistics of BatchNormalization layers to those of `data`, for the weights in the model.

    Averaged weights give their layers other inputs than the weights did whose statistics training has
    tracked; without this SWA does badly in models with BatchNormalization (arXiv:1803.05407). In one
    pass over the data each layer's mean and variance (that of the population, 1/N) are computed over all
    elements it gets, masked ones excepted; batches of different sizes count by their size.

    >>> model = tf.keras.Sequential([tf.keras.Input([1]), tf.keras.layers.BatchNormalization()])
    >>> x = tf.constant([[1.0], [2.0], [6.0]])
    >>> tfav.update_batch_norm(model, x, verbose=0)
    >>> layer = model.layers[0]
    >>> print(layer.moving_mean.numpy(), layer.moving_variance.numpy().round(4))
    [3.] [4.6667]

    The model runs in training mode, dropout included: each layer sees inputs as it sees them in training,
    where layers before it normalize by the batch, and its statistics are what its moving averages
    estimate. (Batches should therefore be as large as in training. Without dropout the statistics would
    be of inputs that training never showed the layers after it.) Layers that training leaves alone,
    frozen or called with `training=False`, keep their statistics. Whatever else the pass changes in the
    model is put back, also after an exception: the state of other layers and metrics, and weights that a
    layer assigns. Random generators alone may move on.

    While the averages are in the model, through `swap_weights`, `swapped_weights` or the callback, the
    new statistics are the averages': the raw weights' own come back with the raw weights, and the new
    ones with the next swap. This needs the model to be compiled with the averaging optimizer. A
    `tf.train.Checkpoint` keeps both; a `.keras` or `.h5` file those that are in the model when it is
    written, so save while swapped, or recompute them after loading.

    Args:
      model: a built model of Keras 3 or tf_keras.
      data: inputs as `fit` takes them: a tensor or array, or a list, tuple or dict of them for models
        with several inputs; or a `tf.data.Dataset`, `Sequence`, `PyDataset` or generator of batches, of
        which targets and sample weights are ignored. Arrays are cut into batches of 32, or into
        `steps` batches. Under a strategy batches are split over the replicas as in `fit`.
      steps: number of batches to take; needed if there is no end of them.
      verbose: `"auto"`, 0, 1 or 2, for the Keras progress bar.

    Raises:
      TypeError: if `model` is not a Keras model.
      ValueError: if the model has not been built, or there is no data.
    """
    classes = _batch_norm_classes(model)
    parts: List[Any] = list(model._flatten_layers())
    layers: List[Any] = [part for part in parts if isinstance(part, classes)]
    if not layers:
        return
    if not all(layer.built for layer in layers):
        raise ValueError(
            "The model has not been built, so its BatchNormalization layers have no statistics yet. "
            "Expected a model that has an input shape or was called on data."
        )
    if data is None:
        raise ValueError("Expected data to compute the statistics of. Received: data=None")
    with model.distribute_strategy.scope():
        sums = [_Sums(layer) for layer in layers]
    with _unchanged(model), contextlib.ExitStack() as recording:
        for part in parts:
            recording.enter_context(_traced_anew(part))
        for layer_sums in sums:
            recording.enter_context(layer_sums.recording())
        _run(model, data, steps, verbose)
    with model.distribute_strategy.scope():
        moments = [layer_sums.moments() for layer_sums in sums]
    unseen = [layer.name for layer, seen in zip(layers, moments) if seen is None and layer.trainable]
    if unseen:
        logging.warning(
            "BatchNormalization layers that were not called in training mode keep their statistics: %s",
            unseen,
        )
    new = [
        statistic
        for layer, seen in zip(layers, moments)
        if seen is not None
        for statistic in _statistics(layer, seen)
    ]
    optimizer = faces.find_averaging_optimizer(model)
    if optimizer is not None and optimizer.weights_swapped:
        # The statistics go with the averages when these are swapped out; nothing is folded into them.
        statistics = optimizer._tf_variables([variable for variable, _ in new])
        optimizer._averages.add(core_variables.averageable(statistics), "exchanged")
        optimizer._averages.exchanged_at = int(optimizer.num_averaged)
    for variable, value in new:
        _assign(variable, value)


class _Moments(NamedTuple):
    """Mean and variance over a data set: float64 tensors shaped like the layer's statistics."""

    mean: tf.Tensor
    variance: tf.Tensor


class _Sums:
    """What a layer got, summed over elements: how many, their values and their squares.

    Sums can be added up over batches, replicas and workers in any order, and give the law of total
    variance. Every replica adds to its own; reading adds those up. All is float64, and values are taken
    relative to the mean that training has tracked: beside a large mean a small variance would be lost.
    """

    def __init__(self, layer):
        self.layer = layer
        # A layer whose `call` is told nothing follows the model in tf_keras, but not in Keras 3.
        self._by_default = kerases.of(layer).__name__ == "tf_keras"
        moving_mean = kerases.tf_variable(layer.moving_mean)
        self._shape = moving_mean.shape
        tracked = tf.cast(tf.convert_to_tensor(moving_mean), tf.float64)
        # All workers must take the same. With Keras 3 each reads what it has tracked itself.
        tracked = tf.convert_to_tensor(_aggregated(tracked, tf.VariableAggregation.MEAN))
        self._origin = tf.where(tf.math.is_finite(tracked), tracked, tf.zeros_like(tracked))
        self._count = _sum_variable([])
        self._values = _sum_variable(self._shape)
        self._squares = _sum_variable(self._shape)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """A context in which the layer adds what it is called on in training mode."""
        call = self.layer.call
        signature = inspect.signature(call)

        def recording_call(inputs, *args, **kwargs):
            arguments = signature.bind(inputs, *args, **kwargs).arguments
            if self.layer.trainable:
                self._add(inputs, arguments.get("mask"), arguments.get("training"))
            return call(inputs, *args, **kwargs)

        with _called_as(self.layer, recording_call):
            yield

    @tf.autograph.experimental.do_not_convert
    def _add(self, inputs: tf.Tensor, mask: Optional[tf.Tensor], training) -> None:
        inputs = tf.cast(inputs, tf.float64)
        rank = inputs.shape.rank
        kept = _kept_axes(self.layer, rank)
        is_kept = [axis in kept for axis in range(rank)]
        axes = [axis for axis in range(rank) if axis not in kept]
        values = inputs - tf.reshape(self._origin, tf.where(is_kept, tf.shape(inputs), 1))
        elements = tf.cast(tf.size(inputs), tf.float64)
        squares = values**2
        if mask is not None:
            weights = tf.cast(tf.expand_dims(mask, -1), tf.float64)
            elements = tf.reduce_sum(tf.broadcast_to(weights, tf.shape(inputs)))
            values, squares = values * weights, squares * weights
        # `training` may be a tensor.
        counts = tf.cast(self._by_default if training is None else training, tf.float64)
        with tf.control_dependencies([values]):  # A step that finds no more data must not count.
            self._count.assign_add(counts * elements / self._shape.num_elements())
        self._values.assign_add(counts * tf.reshape(tf.reduce_sum(values, axes), self._shape))
        self._squares.assign_add(counts * tf.reshape(tf.reduce_sum(squares, axes), self._shape))

    def moments(self) -> Optional[_Moments]:
        """The moments of all that was added; None if nothing was."""
        count, values, squares = map(tf.convert_to_tensor, (self._count, self._values, self._squares))
        if count == 0:
            return None
        mean = values / count
        variance = tf.maximum(squares / count - mean**2, 0)
        return _Moments(self._origin + mean, variance)


def _run(model, data, steps: Optional[int], verbose: Union[str, int]) -> None:
    """Calls `model` in training mode on each batch, with all that `predict` knows of data."""
    keras = kerases.of(model)
    # Where its `call` takes no such argument Keras 3 trains a model without it, in inference mode.
    mode = {"training": True} if getattr(model, "_call_has_training_arg", True) else {}
    has_data = False

    def predict_step(data):
        nonlocal has_data
        has_data = True
        inputs, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        model(inputs, **mode)
        return tf.zeros([1])

    with model.distribute_strategy.scope():
        runner = keras.Model()
    runner.predict_step = predict_step
    runner.compile(run_eagerly=model.run_eagerly, jit_compile=False)
    try:
        runner.predict(data, steps=steps, verbose=verbose)
    except (StopIteration, UnboundLocalError):  # As the Kerases fail for want of a first batch.
        if has_data:
            raise
        received = f"Received none, or an iterator that has ended: {data!r}"
        raise ValueError(f"Expected data. {received}") from None


def _batch_norm_classes(model) -> Tuple[type, ...]:
    layers = kerases.of_model(model).layers
    if not hasattr(layers, "experimental"):
        return (layers.BatchNormalization,)
    # tf_keras has a deprecated class beside it.
    return (layers.BatchNormalization, layers.experimental.SyncBatchNormalization)


def _kept_axes(layer, rank: int) -> Set[int]:
    """The axes of the inputs along which the statistics lie."""
    # Virtual batches, of tf_keras, count one dimension more.
    shift = getattr(layer, "virtual_batch_size", None) is not None
    # Keras 3 has one axis, which may count from the end.
    return {(axis - shift) % rank for axis in tf.nest.flatten(layer.axis)}


@contextlib.contextmanager
def _called_as(layer, call: Callable) -> Iterator[None]:
    """A context in which `layer` calls `call` instead of its own method."""
    before = vars(layer).get("call")
    # An attribute of the instance comes before the method of its class; Keras's own setter would
    # track it.
    vars(layer)["call"] = call
    try:
        yield
    finally:
        del vars(layer)["call"]
        if before is not None:
            vars(layer)["call"] = before


def _traced_anew(layer) -> contextlib.AbstractContextManager:
    """A context in which a `tf.function` that is a layer's `call` is the Python function in it.

    What it has traced before would record nothing, and what it traces now would go on recording.
    """
    call = layer.call
    if isinstance(call, tf.types.experimental.PolymorphicFunction):
        return _called_as(layer, call.python_function)
    return contextlib.nullcontext()


def _sum_variable(shape) -> tf.Variable:
    return _aggregated(tf.zeros(shape, tf.float64), tf.VariableAggregation.SUM)


def _aggregated(value: tf.Tensor, aggregation: tf.VariableAggregation) -> tf.Variable:
    """A variable of which each replica has its own, and whose reader gets the sum or mean of all."""
    return tf.Variable(
        value,
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=aggregation,
    )


@contextlib.contextmanager
def _unchanged(model) -> Iterator[None]:
    """A context after which the state that a forward pass can change is what it was before."""
    state = list(model.variables)
    state += [variable for metric in model.metrics for variable in metric.variables]
    components = [
        component
        for variable in map(kerases.tf_variable, state)
        if isinstance(variable, tf.Variable)
        for component in core_variables.all_components(variable)
    ]
    before = [core_variables.read(component) for component in components]
    try:
        yield
    finally:
        for component, value in zip(components, before):
            core_variables.assign(component, value)


def _statistics(layer, moments: _Moments) -> List[Tuple[Any, tf.Tensor]]:
    """The layer's statistics, each with its new value."""
    new = [(layer.moving_mean, moments.mean), (layer.moving_variance, moments.variance)]
    if getattr(layer, "renorm", False):
        new.append((layer.moving_stddev, tf.sqrt(moments.variance + layer.epsilon)))
    return new


def _assign(variable, value: tf.Tensor) -> None:
    """Sets a statistic, on all replicas that have one of their own, in all its shards."""
    variable = kerases.tf_variable(variable)
    if isinstance(variable, tf.__internal__.distribute.ShardedVariable):
        variable.assign(tf.cast(value, variable.dtype))
        return
    for component in core_variables.all_components(variable):
        core_variables.assign(component, tf.cast(value, component.dtype))
