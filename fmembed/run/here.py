"""Ray's calls for tasks, carried out in this process: for work that is not worth starting Ray.

What is started is done when somebody asks for what it gives. Given to another one it is done for
that alone, so that of many large results one is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class _Call:
    """A call that is made once for those who ask for parts of what it gives."""

    def __init__(self, function: Callable[..., Any], given: tuple[Any, ...]) -> None:
        self._function, self._given = function, given
        self._found: list[Any] = []

    def __call__(self) -> Any:
        return self._function(*(g.once() if isinstance(g, _Ref) else g for g in self._given))

    def kept(self) -> Any:
        if not self._found:
            self._found.append(self())
        return self._found[0]


class _Ref:
    """What a call gives, or one of the parts of it."""

    def __init__(self, call: _Call, part: int | None) -> None:
        self._call, self._part = call, part

    def once(self) -> Any:
        """What it stands for, kept only if it is a part: the others are asked for too."""
        return self._call() if self._part is None else self.get()

    def get(self) -> Any:
        """What it stands for."""
        found = self._call.kept()
        return found if self._part is None else found[self._part]


class _Task:
    def __init__(self, function: Callable[..., Any], num_returns: int) -> None:
        self._function, self._num_returns = function, num_returns

    def remote(self, *given: Any) -> Any:
        call = _Call(self._function, given)
        n = self._num_returns
        return _Ref(call, None) if n == 1 else [_Ref(call, i) for i in range(n)]


def remote(num_returns: int = 1, **_: Any) -> Callable[[Callable[..., Any]], _Task]:
    """As `ray.remote` with options."""
    return lambda function: _Task(function, num_returns)


def get(refs: Any) -> Any:
    """As `ray.get`."""
    return [ref.get() for ref in refs] if isinstance(refs, list) else refs.get()


def put(value: Any) -> Any:
    """As `ray.put`: what is here already."""
    return value


def wait(refs: Sequence[Any], **_: Any) -> tuple[list[Any], list[Any]]:
    """As `ray.wait`: nothing goes on by itself."""
    return list(refs), []
