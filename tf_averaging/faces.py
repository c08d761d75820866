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
"""From a scheme and the optimizer to wrap to an optimizer of that optimizer's Keras.

A scheme, such as `SWA`, inherits from no Keras. Put around an optimizer it becomes an object of a
subclass that inherits from the face of that optimizer's Keras too, and so from its `Optimizer`. One
subclass is made for each scheme and Keras. It goes by the scheme's name, so that files name the scheme.

What the faces have in common is at the end.
"""

from __future__ import annotations

import functools
import inspect
import reprlib
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from tf_averaging import kerases
from tf_averaging import side_by_side

# What a wrapper's constructor passes on. One home for each: the inner optimizer.
CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")
SETTINGS = CLIPPING + ("learning_rate", "decay")
# What older releases lack, an optimizer's `_iterations` for example, is needed.
OLDEST_KERAS_3 = (3, 8)
# The schemes of this package.
_SCHEMES: List[type] = []


def class_around(scheme: type, optimizer: Any) -> type:
    """The class of this scheme's averaging optimizer around `optimizer` (instance, name or config)."""
    return scheme if hasattr(scheme, "keras_name") else _class(scheme, _keras_name(optimizer))


def overrides(scheme: type, method: str) -> bool:
    """Whether a scheme has a method of its own, and not that of the base class of all schemes."""
    defining = [cls for cls in scheme.__mro__ if method in vars(cls)]
    return not defining or defining[0].__name__ != "AveragedOptimizerWrapper"


@functools.cache
def _class(scheme: type, keras_name: str) -> type:
    if not overrides(scheme, "averaging_weight") and not overrides(scheme, "average_op"):
        raise TypeError(
            f"{scheme.__name__} does not say how to average. Expected a class that overrides "
            "`averaging_weight` (or `average_op`), such as `tf_averaging.SWA` or "
            f"`tf_averaging.ExponentialMovingAverage`. Received: {scheme}"
        )
    face = _face(keras_name)
    attributes = {name: getattr(scheme, name) for name in ("__module__", "__qualname__", "__doc__")}
    attributes.update(_methods_for_lists(scheme))
    cls = type(scheme)(scheme.__name__, (scheme, face), attributes)
    _register_as(scheme, cls, face.keras)
    return cls


def _methods_for_lists(scheme: Any) -> Dict[str, Any]:
    """What lets an argument of a scheme's constructor be a list; see `side_by_side`."""
    argument = scheme.one_average_for_each
    if argument is None:
        return {}
    signature = inspect.signature(scheme.__init__)

    @functools.wraps(scheme.__init__)
    def __init__(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments: Dict[str, Any] = {}
        for name, value in list(bound.arguments.items())[1:]:
            is_rest = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            arguments.update(value if is_rest else {name: value})
        if isinstance(arguments.get(argument), (list, tuple)):
            side_by_side.construct(self, scheme, arguments, (*SETTINGS, "lr"))
        else:
            scheme.__init__(self, *args, **kwargs)

    def get_config(self):
        config = scheme.get_config(self)
        return side_by_side.merged(self, config) if self._others.optimizers else config

    return {"__init__": __init__, "get_config": get_config}


@functools.cache
def _face(keras_name: str) -> Any:
    if keras_name == "tf_keras":
        from tf_averaging.keras2 import optimizer as keras2  # noqa: PLC0415

        return keras2.Keras2Face
    if keras_name != "keras":
        raise ValueError(f"Expected a config of 'keras' or 'tf_keras'. Received: {keras_name!r}")
    from tf_averaging.keras3 import optimizer as keras3  # noqa: PLC0415

    face = keras3.Keras3Face
    backend = face.keras.backend.backend()
    if backend != "tensorflow":
        raise RuntimeError(
            "Weights of Keras 3 are averaged on its TensorFlow backend only. Expected the environment "
            f"variable KERAS_BACKEND=tensorflow when Keras is imported. Received: {backend!r}"
        )
    release = tuple(map(int, face.keras.__version__.split(".")[:2]))
    if release < OLDEST_KERAS_3:
        raise RuntimeError(
            f"Expected Keras {'.'.join(map(str, OLDEST_KERAS_3))} or later. Received: "
            f"{face.keras.__version__}. `pip install --upgrade keras` gets one that fits TensorFlow."
        )
    if face.keras not in kerases.available():  # TF_USE_LEGACY_KERAS=1: not imported before.
        for scheme in _SCHEMES:
            _register_with(face.keras, scheme)
    return face


def _register_as(scheme: type, cls: type, keras: Any) -> None:
    """Registers `cls` under the scheme's name with a Keras, if the scheme is registered with any."""
    names = [k.saving.get_registered_name(scheme) for k in (keras, *kerases.available())]
    package, separator, name = max(names, key=lambda name: ">" in name).rpartition(">")
    if separator:
        # Both go by one name, which means the scheme: tf_keras would refuse a second class.
        registered = keras.saving.get_custom_objects()
        registered.pop(f"{package}>{name}", None)
        keras.saving.register_keras_serializable(package, name)(cls)
        registered[f"{package}>{name}"] = scheme


def register(scheme: type) -> type:
    """Class decorator: registers a scheme of this package with every Keras, so that it can load it."""
    _SCHEMES.append(scheme)
    for keras in kerases.available():
        _register_with(keras, scheme)
    return scheme


def _register_with(keras: Any, scheme: type) -> None:
    if keras.__name__ == "tf_keras":
        # In an `.h5` file a LossScaleOptimizer names what is inside it by the bare name.
        # `convert_to_legacy_optimizer` (TF-Agents) looks for the name in lower case.
        for name in (scheme.__name__, scheme.__name__.lower()):
            keras.saving.get_custom_objects().setdefault(name, scheme)
    keras.saving.register_keras_serializable("tf_averaging")(scheme)


def rebuild(scheme: Any, config: Dict[str, Any]):
    """Creates a copied or unpickled optimizer. As Keras does with models, from its config."""
    return scheme.from_config(config)


# The Keras of the inner optimizer, and the optimizer that a config means.


def _keras_name(optimizer: Any) -> str:
    """The Keras that an optimizer is of; where that does not tell, what `tf.keras` is."""
    if isinstance(optimizer, dict):
        name = _recorded_keras(optimizer.get("config"))
        if name is None and optimizer.get("module") == "keras.optimizers.legacy":
            name = "tf_keras"
    else:
        example = optimizer if inspect.isclass(optimizer) else type(optimizer)
        packages = [cls.__module__.partition(".")[0] for cls in example.__mro__]
        name = next((name for name in kerases.NAMES if name in packages), None)
    return name or kerases.available()[0].__name__


def _recorded_keras(config: Any) -> Optional[str]:
    """What Keras an optimizer's config names: those of tf_keras say which generation they are of."""
    if not isinstance(config, dict):
        return None
    return config.get("keras", "tf_keras" if "is_legacy_optimizer" in config else None)


def from_config(cls: Any, config: Dict[str, Any], custom_objects: Optional[Dict[str, Any]]) -> Any:
    """The averaging optimizer that a config describes, which is left as it is.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if one is wrong in another way, or nested so deeply that no message can show it.
    """
    arguments = {name: v for name, v in config.items() if name not in ("keras", "is_legacy_optimizer")}
    try:
        if "optimizer" in arguments:
            keras_name = _recorded_keras(config)
            arguments["optimizer"] = deserialize(arguments["optimizer"], custom_objects, keras_name)
        return cls(**arguments)
    except RecursionError as error:
        raise ValueError(f"The config is nested too deeply: {reprlib.repr(config)}") from error


def deserialize(
    config: Any, custom_objects: Optional[Dict[str, Any]] = None, keras_name: Optional[str] = None
):
    """The optimizer that a config dict describes; the dict is left as it is."""
    if not isinstance(config, dict):
        return config
    if not isinstance(config.get("class_name"), str) or not isinstance(config.get("config"), dict):
        raise ValueError(
            "Expected the config dict of an optimizer, with a name under 'class_name' and a dict under "
            f"'config'. Received: {config!r}"
        )
    face = _face(keras_name or _keras_name(config))
    if "module" in config:
        read = face.keras.saving.deserialize_keras_object
        custom_objects = {**_classes_by_name(face, config), **(custom_objects or {})}
    else:
        read = face.deserialize_without_module
    return read_config(read, config, custom_objects)


def _classes_by_name(face: Any, config: Dict[str, Any]) -> Dict[str, Any]:
    """The classes that a config and those in it mean, by the names that tf_keras knows in `.h5` files."""
    own = getattr(face.modules.get(str(config["module"])), str(config.get("class_name")), None)
    found = {} if own is None else {config["class_name"]: own}
    registered = face.keras.saving.get_registered_object
    for one in (config, *config["config"].values()):
        if isinstance(one, dict) and (known := registered(one.get("registered_name"))):
            found[one.get("class_name")] = known
    return found


def read_config(read, config: Dict[str, Any], custom_objects: Optional[Dict[str, Any]]) -> Any:
    """`read(config, custom_objects=custom_objects)`, which leaves `config` as it is.

    Raises:
      TypeError: as Keras does.
      ValueError: as Keras does, or if it fails in any other way: what is in a config may be anything.
    """
    try:
        return read(_copy_containers(config), custom_objects=custom_objects)
    except (TypeError, ValueError):
        raise
    except Exception as error:
        # It may be nested too deeply to be shown.
        raise ValueError(f"Expected a Keras object's config. Received: {reprlib.repr(config)}") from error


def _copy_containers(config: Any) -> Any:
    """A copy whose dicts and lists may be edited; what is in them is shared."""
    if isinstance(config, dict):
        return {key: _copy_containers(value) for key, value in config.items()}
    if isinstance(config, list):
        return [_copy_containers(value) for value in config]
    return config


def inner_optimizer(cls: Any, identifier: Any, settings: Dict[str, Any]):
    """Returns the optimizer meant by `identifier`, configured by `settings`.

    Args:
      cls: the averaging optimizer's class, which has a face.
      identifier: an optimizer, the name of one, or its config dict (which is left as it is).
      settings: any of `SETTINGS` and `lr`; None says nothing. What the optimizer leaves unset is set: all
        of it for a name, what a config dict does not mention, and for an instance a clipping value of
        None.

    Raises:
      TypeError: if `identifier` is not an optimizer that can be wrapped, or a setting is unknown.
      ValueError: if a setting contradicts the optimizer's own, or the optimizer keeps its own average.
    """
    settings = {key: value for key, value in _checked(settings).items() if value is not None}
    for name, value in settings.items():
        kerases.check_schedule(cls.keras, name, value)
    optimizer, mentioned = identifier, set(SETTINGS)
    if isinstance(identifier, str):
        optimizer, mentioned = cls.keras.optimizers.get(identifier), set()
    elif isinstance(identifier, dict):
        optimizer = deserialize(identifier)
        config = identifier.get("config", {})
        mentioned = {"learning_rate" if key == "lr" else key for key in config}
    _check_inner(cls, optimizer)
    if any(getattr(part, "use_ema", False) for part in parts(optimizer)):
        raise ValueError(
            "The inner optimizer has `use_ema=True`, so it would keep an average of its own and put it "
            "into the model at the end of `fit`. Expected an optimizer with `use_ema=False`: the "
            f"wrapper keeps the average. Received: {optimizer}"
        )
    own = {name: getattr(optimizer, name, None) for name in CLIPPING}
    own["decay"] = getattr(optimizer, "_initial_decay", None)
    own["learning_rate"] = learning_rate_or_schedule(optimizer)
    own = {name: value for name, value in own.items() if name in mentioned}
    return _configured(optimizer, own, settings, cls.clipping_to_choose_from)


def parts(optimizer: Any) -> list:
    """The optimizer, and those between which a `MultiOptimizer` of Keras 3 divides the variables."""
    return [optimizer, *getattr(optimizer, "optimizers", ())]


def _check_inner(cls: Any, optimizer: object) -> None:
    """Refuses what is no optimizer of the Keras, and a LossScaleOptimizer."""
    expected = (
        "Expected a `keras.optimizers.Optimizer` (Keras 3), a `tf_keras.optimizers.Optimizer` or a "
        "`tf_keras.optimizers.legacy.Optimizer`, the name of one, or its config dict."
    )
    received = f"Received: {optimizer!r} of type {type(optimizer)}"
    if isinstance(optimizer, cls.keras.mixed_precision.LossScaleOptimizer):
        raise TypeError(
            "A LossScaleOptimizer goes around the averaging optimizer, not inside it: steps that it "
            "skips must not be averaged. Wrap the optimizer first, then pass the result to "
            "`LossScaleOptimizer`; `Model.compile` does so by itself under the `mixed_float16` policy. "
            f"{received}"
        )
    if inspect.isclass(optimizer):
        raise TypeError(f"Received a class, not an optimizer: call it first. {expected} {received}")
    if not isinstance(optimizer, cls.inner_types):
        raise TypeError(f"{expected} {received}")


def _checked(settings: Dict[str, Any]) -> Dict[str, Any]:
    """Settings for the inner optimizer, `lr` under its other name."""
    settings = dict(settings)
    unknown = set(settings) - set(SETTINGS) - {"lr"}
    if unknown:
        raise TypeError(
            f"Unknown keyword arguments: {sorted(unknown)}. Beside this class's own, expected one of "
            f"{SETTINGS + ('lr',)}, which configure the inner optimizer."
        )
    lr = settings.pop("lr", None)
    if lr is not None and settings.setdefault("learning_rate", lr) != lr:
        raise ValueError(
            "`lr` and `learning_rate` are two names of one argument. Received: "
            f"lr={lr!r}, learning_rate={settings['learning_rate']!r}"
        )
    return settings


def _configured(optimizer: Any, own: Dict[str, Any], settings: Dict[str, Any], one_of: Tuple[str, ...]):
    """Sets what `own` leaves unset, and checks the rest. It can have `one_of` some kinds of clipping."""
    _check_has_settings(optimizer, settings)
    if "decay" in settings and not hasattr(optimizer, "_initial_decay"):
        raise ValueError(
            "`decay` exists in legacy optimizers only. Expected a "
            "`tf_keras.optimizers.legacy.Optimizer` inside, or a learning-rate schedule. Received: "
            f"decay={settings['decay']!r} and the inner optimizer {optimizer!r}"
        )
    for name, value in settings.items():
        if name in CLIPPING and (not isinstance(value, (int, float, np.number)) or not value >= 0):
            raise ValueError(f"Expected `{name}` to be a number >= 0. Received: {name}={value!r}")
        if own.get(name) is not None and not _same(own[name], value):
            raise ValueError(
                f"`{name}` contradicts the inner optimizer's own. Expected {_shown(own[name])}, or no "
                f"`{name}` here; to change it, change it where the inner optimizer is created. "
                f"Received: {name}={_shown(value)}"
            )
    unset = {name: value for name, value in settings.items() if own.get(name) is None}
    set_ = [name for name in one_of if settings.get(name, getattr(optimizer, name)) is not None]
    if len(set_) > 1:
        raise ValueError(f"Expected at most one of {one_of} to be set. Received values of {set_}")
    if unset.keys() - set(CLIPPING):
        # A new optimizer: a schedule cannot take the place of a learning rate once it is a variable.
        return type(optimizer).from_config({**optimizer.get_config(), **unset})
    for name, value in unset.items():
        setattr(optimizer, name, value)
    return optimizer


def _check_has_settings(optimizer: Any, settings: Dict[str, Any]) -> None:
    if hasattr(optimizer, "optimizers") and not settings.keys().isdisjoint(SETTINGS):
        expected = "Expected them where its parts are created."
        raise ValueError(
            f"A `MultiOptimizer` has no settings of its own. {expected} Received: {settings}"
        )


def _same(own: Any, value: Any) -> bool:
    if hasattr(own, "get_config") and hasattr(value, "get_config"):  # Two schedules.
        return own is value or (type(own) is type(value) and own.get_config() == value.get_config())
    if any(hasattr(thing, "get_config") or callable(thing) for thing in (own, value)):
        return own is value
    return bool(np.float32(own) == np.float32(value))  # Keras keeps learning rates in float32.


def _shown(value: Any) -> str:
    return repr(value.numpy() if hasattr(value, "numpy") else value)


# What the faces have in common.


def get_of_inner(optimizer: Any, name: str) -> Any:
    """What an averaging optimizer does not have itself: a setting of the inner optimizer."""
    if name == "inner_optimizer":
        raise AttributeError("Expected a call of `super().__init__(optimizer, ...)` before.")
    if name.startswith("_"):
        raise AttributeError(f"{type(optimizer).__name__!r} object has no attribute {name!r}")
    return getattr(optimizer.inner_optimizer, name)


def refuse_to_set(optimizer: Any, name: str) -> None:
    raise AttributeError(
        f"`{name}` cannot be set: it is state, or an argument that the constructor was given. To change "
        f"an argument create another {type(optimizer).__name__}, around the same optimizer."
    )


def is_setting(optimizer: Any, name: str) -> bool:
    """Whether it is an attribute of the inner optimizer. One inside the same scheme has its own."""
    inner = optimizer.inner_optimizer
    while type(inner) is type(optimizer):
        inner = inner.inner_optimizer
    return hasattr(inner, name)


def set_on_inner(optimizer: Any, name: str, value: Any) -> None:
    """Sets a setting of the inner optimizer."""
    if name == "use_ema" and value:
        raise ValueError(
            "The inner optimizer would keep an average of its own, and put it into the model at the end "
            f"of `fit`. Expected `use_ema=False`: the wrapper keeps the average. Received: {value!r}"
        )
    kerases.check_schedule(optimizer.keras, name, value)
    _check_has_settings(optimizer.inner_optimizer, {name: value})
    setattr(optimizer.inner_optimizer, name, value)


def of_inner(name: str, doc: str) -> property:
    """A property of an averaging optimizer that is the inner optimizer's; setting it sets that."""

    def get(self):
        return getattr(self.inner_optimizer, name)

    def set_(self, value) -> None:
        set_on_inner(self, name, value)

    return property(get, set_, doc=doc)


def update_step(self, *args: Any, **kwargs: Any) -> None:
    """A NotImplementedError: wrappers that call it pass over the averages, and belong inside."""
    raise NotImplementedError(
        "An optimizer around this one calls `update_step`, which would pass over the averages. Put "
        f"the averaging optimizer outside: `{type(self).__name__}(YourWrapper(...))`."
    )


def learning_rate_or_schedule(optimizer: Any):
    """What an optimizer was given as its learning rate: a schedule, a variable, a number or nothing."""
    is_legacy = hasattr(optimizer, "_initial_decay")  # Those of tf_keras have the public name only.
    return getattr(optimizer, "learning_rate" if is_legacy else "_learning_rate", None)
