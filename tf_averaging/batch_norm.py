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
import gc
import inspect
import warnings
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple, Union

import tensorflow as tf
from absl import logging

from tf_averaging import kerases
from tf_averaging import side_by_side
from tf_averaging.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from tf_averaging.averaging_optimizer import averaging_optimizer
from tf_averaging.averaging_optimizer import check_averages
from tf_averaging.averaging_optimizer import find_averaging_optimizer
from tf_averaging.core import variables as core_variables
from tf_averaging.core.averages import Averages
from tf_averaging.core.status import averages_of
from tf_averaging.core.status import checked_count


def update_batch_norm(
    model: Any,
    data: Any,
    steps: Optional[int] = None,
    verbose: Union[str, int] = "auto",
    optimizer: Optional[AveragedOptimizerWrapper] = None,
    forward: Optional[Callable[[Any, Any], Any]] = None,
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
    layer assigns. Random generators of TensorFlow alone may move on. The guide, docs/swa.md, has notes on
    SpectralNormalization, recurrent layers and `renorm`.

    While the averages are in the model, through `swap_weights`, `swapped_weights` or the callback, the
    new statistics are the averages': the raw weights' own come back with the raw weights, and the new
    ones with the next swap. Otherwise they are those of the raw weights, and if there are averages a
    warning says so. A `tf.train.Checkpoint` keeps both; a `.keras` or `.h5` file those that are in the
    model when it is written, so save while swapped, or recompute them after loading.

    A model that is not compiled with its averaging optimizer, and is called in its own way, such as the
    generator of a GAN:

    >>> optimizer = tfav.ExponentialMovingAverage(tf.keras.optimizers.Adam())
    >>> optimizer.shadow_copy(model)
    >>> with optimizer.swapped_weights():
    ...     tfav.update_batch_norm(
    ...         model,
    ...         tf.data.Dataset.from_tensors({"real": x}),
    ...         verbose=0,
    ...         optimizer=optimizer,
    ...         forward=lambda model, batch: model(batch["real"] + 1.0, training=True),
    ...     )
    ...     print(layer.moving_mean.numpy())
    [4.]

    Args:
      model: a built model of Keras 3 or tf_keras.
      data: inputs as `fit` takes them: a tensor or array, or a list, tuple or dict of them for models
        with several inputs; or a `tf.data.Dataset`, `Sequence`, `PyDataset` or generator of batches, of
        which targets and sample weights are ignored. Arrays are cut into batches of 32, or into
        `steps` batches. Under a strategy batches are split over the replicas as in `fit`.
      steps: number of batches to take; needed if there is no end of them.
      verbose: `"auto"`, 0, 1 or 2, for the Keras progress bar.
      optimizer: the averaging optimizer, or one around it; None for the one that `model` is compiled
        with.
      forward: called as `forward(model, batch)` on each batch, on each replica; it must call the model in
        training mode. `batch` is what the model's `train_step` would be given, targets included. None
        for `model(inputs, training=True)`. Other models that it calls are not put back.

    Raises:
      TypeError: if `model` is not a Keras model, `steps` not an int, or `forward` not callable.
      ValueError: if the model has not been built, there is no data, or no end of them and no `steps`,
        `steps` is not positive, the model cannot be called on its inputs and there is no `forward`,
        `optimizer` averages nothing or another model, or the averages of an optimizer that is neither
        given nor compiled are in the model.
    """
    classes = _batch_norm_classes(model)
    if forward is not None and not callable(forward):
        raise TypeError(
            f"Expected `forward` to be a function of the model and a batch. Received: {forward!r}"
        )
    given = None if optimizer is None else averaging_optimizer(optimizer)
    parts: List[Any] = list(model._flatten_layers())
    layers: List[Any] = [part for part in parts if isinstance(part, classes)]
    if not layers:
        return
    if not all(layer.built for layer in layers):
        raise ValueError(
            "The model has not been built, so its BatchNormalization layers have no statistics yet. "
            "Expected a model that has an input shape or was called on data."
        )
    if data is None or (isinstance(data, (list, tuple, dict)) and not data):
        raise ValueError(f"Expected data to compute the statistics of. Received: data={data!r}")
    if steps is not None:
        checked_count("steps", steps, minimum=1)
    elif is_endless(data):
        raise ValueError(f"Expected `steps` with data that never end. Received: data={data!r}")
    averages = _averages(model, given)
    with model.distribute_strategy.scope():
        sums = [_Sums(layer) for layer in layers]
    with _unchanged(model), contextlib.ExitStack() as recording:
        for part in parts:
            recording.enter_context(_prepared(part))
        for layer_sums in sums:
            recording.enter_context(layer_sums.recording())
        _run(model, data, steps, verbose, forward or _called_on_inputs)
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
    as_left = averages is not None and averages.left is not None and not averages.were_loaded()
    if averages is not None and new:
        _note_whose(averages, [variable for variable, _ in new])
    for variable, value in new:
        core_variables.assign_everywhere(variable, value)
    if averages is not None and as_left:
        averages.leave()  # The next `fit` must not take the statistics for something that was loaded.


def is_endless(data: Any) -> bool:
    """Whether data are a `tf.data.Dataset` that says that it never ends."""
    return isinstance(data, tf.data.Dataset) and bool(data.cardinality() == tf.data.INFINITE_CARDINALITY)


def _averages(model, optimizer: Optional[AveragedOptimizerWrapper]) -> Optional[Averages]:
    """The averages of the model's weights; None if there are none."""
    known = optimizer or find_averaging_optimizer(model)
    if known is not None:
        if optimizer is not None and optimizer.has_shadow_copy:
            check_averages(optimizer, model)
        return (side_by_side.in_model(known) or known)._averages
    variables = list(map(kerases.tf_variable, model.variables))
    if any(averages.is_swapped() for averages in averages_of(variables)):
        gc.collect()  # Those that nobody can reach will not be swapped back.
    found = list(averages_of(variables))
    if any(averages.is_swapped() for averages in found):
        raise ValueError(
            "The averages of an optimizer are in the model, which is not compiled with it, so the "
            "statistics of its raw weights would be lost. Expected that optimizer as `optimizer`."
        )
    return found[0] if found else None


def _note_whose(averages: Averages, statistics: List[tf.Variable]) -> None:
    """Has the statistics go with the averages if these are in the model; warns if they are not."""
    statistics = core_variables.averageable(statistics)
    if averages.is_swapped():
        # They are swapped out with the averages; nothing is folded into them.
        averages.add(statistics, "exchanged")
        averages.exchanged_at = int(averages.num_averaged())
    elif averages.num_averaged() > 0:
        have_own = any(statistic in averages.slots for statistic in statistics)
        warnings.warn(
            "The raw weights are in the model (`weights_swapped` is False), so `update_batch_norm` "
            "changes their statistics. The averages "
            + ("keep their own. " if have_own else "have none of their own and use these too. ")
            + "For theirs, call it while they are in the model: `with optimizer.swapped_weights():`.",
            stacklevel=3,
        )


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

        # Layers around this one ask which arguments it takes.
        recording_call.__signature__ = signature  # type: ignore[attr-defined]
        with _having(self.layer, {"call": recording_call}):
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


def _run(model, data, steps: Optional[int], verbose: Union[str, int], forward: Callable) -> None:
    """Calls `forward` on each batch, with all that `predict` knows of data."""
    has_data = False
    # What a `tf.function` has traced before would record nothing.
    forward = getattr(forward, "python_function", forward)

    def predict_step(data):
        nonlocal has_data
        has_data = True
        forward(model, data)
        return tf.zeros([1])

    with model.distribute_strategy.scope():
        runner = kerases.of(model).Model()
    runner.predict_step = predict_step
    runner.compile(run_eagerly=model.run_eagerly, jit_compile=False)
    try:
        runner.predict(data, steps=steps, verbose=verbose)
    except NotImplementedError as error:
        if forward is not _called_on_inputs:
            raise
        raise ValueError(
            "The model cannot be called on its inputs. Expected `forward`, a function that calls it on a "
            "batch. `SwapAverageWeights` takes none: without `batch_norm_data` call `update_batch_norm` "
            "yourself, while the averages are in the model."
        ) from error
    except (StopIteration, UnboundLocalError):  # As the Kerases fail for want of a first batch.
        if has_data:
            raise
        received = f"Received none, or an iterator that has ended: {data!r}"
        raise ValueError(f"Expected data. {received}") from None


def _called_on_inputs(model, batch) -> None:
    """Calls `model` in training mode, as the Kerases do."""
    inputs, _, _ = kerases.of(model).utils.unpack_x_y_sample_weight(batch)
    # Where its `call` takes no such argument Keras 3 trains a model without it, in inference mode.
    mode = {"training": True} if getattr(model, "_call_has_training_arg", True) else {}
    model(inputs, **mode)


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
def _having(layer, attributes: Dict[str, Any]) -> Iterator[None]:
    """A context in which `layer` has these attributes, in place of its own and its class's."""
    own = vars(layer)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)  # Keras's own setter would track them.
    try:
        yield
    finally:
        for name in attributes:
            del own[name]
        own.update(before)


def _prepared(layer) -> contextlib.AbstractContextManager:
    """A context in which a layer's calls can be recorded, and give what they should.

    A `tf.function` among its methods is the Python function in it: what it has traced before would record
    nothing, and what it traces now would go on recording.
    """
    attributes = {
        name: getattr(layer, name).python_function
        for namespace in map(vars, [*type(layer).__mro__, layer])
        for name, value in namespace.items()
        if isinstance(value, tf.types.experimental.PolymorphicFunction)
    }
    normalizing: Any = getattr(kerases.of(layer).layers, "SpectralNormalization", ())
    if isinstance(layer, normalizing):
        # In training it first divides its weights by their norm. Evaluation takes those in the model.
        call = layer.call
        attributes["call"] = lambda inputs, **_: call(inputs, training=False)
    if getattr(layer, "renorm", False):
        # It would correct its outputs towards what training has tracked, for other weights.
        attributes["renorm"] = False
    return _having(layer, attributes)


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
    components = [
        component
        for variable in map(kerases.tf_variable, _state(model))
        if isinstance(variable, tf.Variable)
        for component in core_variables.all_components(variable)
    ]
    before = [core_variables.read(component) for component in components]
    try:
        yield
    finally:
        for component, value in zip(components, before):
            core_variables.assign(component, value)


def _state(model) -> Iterator[Any]:
    yield from model.variables
    for metric in model.metrics:
        yield from metric.variables
    # Keras 3 leaves out what is TensorFlow's own.
    for layer in model._flatten_layers():
        for value in vars(layer).values():
            if isinstance(value, tf.Variable):
                yield value
            elif isinstance(value, tf.Module):
                yield from value.variables


def _statistics(layer, moments: _Moments) -> List[Tuple[tf.Variable, tf.Tensor]]:
    """The layer's statistics, each with its new value."""
    new = [(layer.moving_mean, moments.mean), (layer.moving_variance, moments.variance)]
    if getattr(layer, "renorm", False):
        new.append((layer.moving_stddev, tf.sqrt(moments.variance + layer.epsilon)))
    return [(kerases.tf_variable(variable), value) for variable, value in new]
