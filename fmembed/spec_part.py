"""What all parts of a config have in common."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from fmembed.redaction import looks_like_key, without_secrets

# A name that the environment need not hold yet: words of letters, a small number after each.
_VARIABLE = re.compile(r"_?[A-Z]{1,20}\d{0,2}(?:_(?:[A-Z]{1,20}\d{0,2}|\d{1,2}))*")
_SECRET_NAME = re.compile(
    r"(?i)(?:^|[_-])(?:key|token|secret|passw(?:or)?d|credentials?|auth)(?:$|[_-])"
)


class Part(BaseModel):
    """A mapping in a config. It takes no unknown key, and shows no secret."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _check_texts(cls, value: Any) -> Any:
        for name, text in value.items() if isinstance(value, dict) else ():
            if isinstance(text, str) and "\0" in text:
                raise ValueError(f"{str(name)[:80]!a} holds a NUL character")
        return value

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        # Ray and others log what they are given; a URL may hold secrets.
        return ((name, without_secrets(value)) for name, value in super().__repr_args__())


def is_variable(name: str) -> bool:
    """Whether a text names an environment variable and is no key: it is set, or reads like one."""
    # A key may have the form of a name; but a name is set, or reads like one.
    is_set = name in os.environ and name.isidentifier()
    return is_set or (_VARIABLE.fullmatch(name) is not None and not looks_like_key(name))


def names_secret(name: str) -> bool:
    """Whether a field or a variable of this name is there to hold a secret."""
    return _SECRET_NAME.search(name) is not None
