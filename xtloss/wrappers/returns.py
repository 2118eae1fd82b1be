"""What calls of the wrappers return, for type checkers alone: to torch whatever a module returns is Any.

The last overload of each is for flags, or dicts of arguments, of which no more than the type is known.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeAlias, overload

from torch import Tensor

from xtloss.weighting.weights import LossBreakdown

No: TypeAlias = Literal[False]
Yes: TypeAlias = Literal[True]
LogitsAndCache: TypeAlias = tuple[Tensor, Any]  # logits, cache


class ReturnsLoss(Protocol):
    """``loss`` or ``(loss, breakdown)``."""

    @overload
    def __call__(self, x: Tensor, *args: Any, return_breakdown: No = False, **kwargs: Any) -> Tensor: ...
    @overload
    def __call__(self, x: Tensor, *args: Any, return_breakdown: Yes, **kwargs: Any) -> tuple[Tensor, LossBreakdown]: ...
    @overload
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class ReturnsOutputs(Protocol):
    """``loss``, ``(loss, breakdown)``, ``(loss, (logits, cache))`` or ``(loss, (logits, cache), breakdown)``."""

    @overload
    def __call__(
        self, x: Tensor, return_outputs: No = False, *args: Any, return_breakdown: No = False, **kwargs: Any
    ) -> Tensor: ...
    @overload
    def __call__(
        self, x: Tensor, return_outputs: No = False, *args: Any, return_breakdown: Yes, **kwargs: Any
    ) -> tuple[Tensor, LossBreakdown]: ...
    @overload
    def __call__(
        self, x: Tensor, return_outputs: Yes, *args: Any, return_breakdown: No = False, **kwargs: Any
    ) -> tuple[Tensor, LogitsAndCache]: ...
    @overload
    def __call__(
        self, x: Tensor, return_outputs: Yes, *args: Any, return_breakdown: Yes, **kwargs: Any
    ) -> tuple[Tensor, LogitsAndCache, LossBreakdown]: ...
    @overload
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
