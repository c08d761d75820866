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
"""The API reference is complete and up to date."""

import inspect
import pathlib
import re

import pytest

import tf_averaging as tfav
from tools import build_docs


def symbols(module, path="tf_averaging"):
    """(name, object) of everything that a module and those in it declare public."""
    for name in module.__all__:
        member = getattr(module, name)
        if inspect.ismodule(member):
            yield from symbols(member, f"{path}.{name}")
        else:
            yield f"{path}.{name}", member


def methods(cls):
    """(name, function) of the public methods that a class has from this package."""
    for name in dir(cls):
        static = inspect.getattr_static(cls, name)
        function = getattr(static, "__func__", static)
        if (name.startswith("_") and name != "__call__") or not inspect.isfunction(function):
            continue
        if function.__module__.startswith("tf_averaging"):
            yield name, function


SYMBOLS = dict(symbols(tfav))
ALL_METHODS = {
    f"{name}.{method}": function
    for name, symbol in SYMBOLS.items()
    if isinstance(symbol, type)
    for method, function in methods(symbol)
}
# But for those whose arguments the class or Keras documents.
METHODS = {
    name: function
    for name, function in ALL_METHODS.items()
    if not name.rpartition(".")[2].startswith(("on_", "__call__"))
}
PROPERTIES = {
    f"{name}.{attribute}": member
    for name, symbol in SYMBOLS.items()
    if isinstance(symbol, type)
    for attribute, member in inspect.getmembers(symbol, lambda member: isinstance(member, property))
    if member.fget.__module__.startswith("tf_averaging") and not attribute.startswith("_")
}


def undocumented(function, docstring):
    """The parameters that the section on arguments does not name."""
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    return [name for name in names if not re.search(rf"^ +(\*\*)?{name}: ", docstring, re.MULTILINE)]


def returns_something(function):
    return inspect.signature(function).return_annotation not in (None, "None")


def pages(directory):
    return {
        str(page.relative_to(directory)): page.read_text(encoding="utf-8")
        for page in directory.rglob("*")
        if page.is_file()
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("built") / "api"
    build_docs.build(directory)
    return pages(directory)


def test_committed_pages_are_up_to_date(built):
    committed = pages(build_docs.PAGES)
    assert sorted(committed) == sorted(built), "Run `make docs` and commit what it writes."
    stale = [page for page in built if committed[page] != built[page]]
    assert not stale, "Run `make docs` and commit what it writes."


def test_every_symbol_has_a_page(built):
    assert {name.replace(".", "/") + ".md" for name in SYMBOLS} <= set(built)


def test_pages_say_nothing_of_machine_and_day(built):
    for page, text in built.items():
        assert str(pathlib.Path.home()) not in text, page
        assert str(build_docs.PAGES.parent.parent) not in text, page
        assert not re.search(r"20\d\d-\d\d-\d\d", text), page


@pytest.mark.parametrize("name", SYMBOLS)
def test_symbol_is_documented(name):
    symbol = SYMBOLS[name]
    docstring = inspect.getdoc(symbol)
    function = symbol.__init__ if isinstance(symbol, type) else symbol
    assert not undocumented(function, docstring)
    assert "\nRaises:\n" in docstring
    assert "\n>>> " in docstring, "Expected an example, which pytest runs."
    if not isinstance(symbol, type) and returns_something(symbol):
        assert "\nReturns:\n" in docstring


@pytest.mark.parametrize("name", METHODS)
def test_method_is_documented(name):
    function = METHODS[name]
    docstring = inspect.getdoc(function)
    assert docstring
    parameters = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    elsewhere = "; see `" in docstring
    if parameters and not elsewhere:
        assert not undocumented(function, docstring)
        if returns_something(function):
            assert "\nReturns:\n" in docstring


@pytest.mark.parametrize("name", PROPERTIES)
def test_property_is_documented(name):
    assert PROPERTIES[name].__doc__


def unannotated(function):
    """The parameters without a type, and "return" if that has none."""
    signature = inspect.signature(function)
    missing = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.annotation is parameter.empty and name not in ("self", "cls")
    ]
    if function.__name__ != "__init__" and signature.return_annotation is signature.empty:
        missing.append("return")
    return missing


def test_signatures_are_annotated():
    functions = {
        **{name: s.__init__ if isinstance(s, type) else s for name, s in SYMBOLS.items()},
        **ALL_METHODS,
        **{name: member.fget for name, member in PROPERTIES.items()},
    }
    missing = {name: unannotated(function) for name, function in functions.items()}
    assert {name: names for name, names in missing.items() if names} == {}
