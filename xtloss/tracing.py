"""Plain Python that runs while torch.compile traces."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

T = TypeVar('T')


def constant(function: Callable[[Any], T]) -> Callable[[Any], T]:
    """Have torch.compile run `function` of one object, a module say, as it is, and compile what it returns in.

    A decorator; the same under torch.export, and nothing happens where nothing is traced. ::

        @constant
        def is_plain(net):          # any Python: reflection, caches, an experiment
            return not net._forward_hooks

    It runs once for each compilation, and another object compiles anew. What it reads inside the object is guarded
    by nothing but what else is traced. It returns None, a bool, a number or a string, or a tuple of them.

    torch.compile takes no module for an argument of a function that is assumed constant (before torch 2.12), but a
    number, and knows what `id` is: so it is the module's address that goes in.
    """

    @torch.compiler.assume_constant_result
    def of_object_at(address: int) -> T:
        return function(ctypes.cast(address, ctypes.py_object).value)  # whoever is traced holds the object

    @wraps(function)
    def call(thing: Any) -> T:
        return of_object_at(id(thing)) if torch.compiler.is_compiling() else function(thing)

    return call
