"""YAML that may come from anywhere, read in bounded time and memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from fmembed.errors import SpecError
from fmembed.redaction import redact as redact
from fmembed.redaction import scrub as scrub

# A config's bytes, the values that it unfolds to, and the digits of a number in it, at most.
MAX_CONFIG_BYTES, _MAX_NODES, _MAX_DIGITS = 2**20, 100_000, 100
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
# What PyYAML quotes of a document, for want of the name that it takes it for.
_YAML_NAME = re.compile(r"((?:alias|anchor|tag|handle) )['\"].*['\"]", re.DOTALL)


def read_yaml(text: str, what: str) -> Any:
    """Read YAML that may come from anywhere, in bounded time and memory.

    A few lines whose aliases name each other unfold to billions of values, and a number of a
    million digits takes minutes: what was parsed is counted before anything is made of it.

    Args:
        text: A document.
        what: What it is, for the message.

    Raises:
        SpecError: It is no YAML, or unfolds to more than a config holds.
    """
    with _told(text, what):
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_nodes(node, {})
        return loader.construct_document(node)


def read_documents(text: str, what: str) -> list[Any]:
    """The same of a file with several documents, as Kubernetes' are.

    Raises:
        SpecError: As `read_yaml`.
    """
    documents = []
    with _told(text, what):
        loader = _Loader(text)
        while loader.check_node():
            node = loader.get_node()
            assert node is not None
            _count_nodes(node, {})
            documents.append(loader.construct_document(node))
    return documents


@contextmanager
def _told(text: str, what: str) -> Iterator[None]:
    """Say in one line why a text is no YAML."""
    if len(text) > MAX_CONFIG_BYTES:
        raise SpecError(f"{what}: takes at most {MAX_CONFIG_BYTES:,} bytes")
    try:
        yield
    except _Unfolded as e:
        raise SpecError(f"{what}: {e}") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = _YAML_NAME.sub(r"\1'...'", getattr(e, "problem", None) or "cannot be parsed")
        raise SpecError(f"{what}{where}: not valid YAML: {problem[:200]}") from None
    except RecursionError:
        raise SpecError(f"{what}: not valid YAML: it is nested too deeply") from None
    except ValueError:  # which quotes it
        raise SpecError(f"{what}: not valid YAML: a date or a number that is none") from None


class _Unfolded(Exception):  # noqa: N818 - what is too much of it is the message
    pass


class _Loader(yaml.SafeLoader):
    """Stops at too many values: a megabyte of commas takes ten seconds."""

    num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.num_nodes += 1
        if self.num_nodes > _MAX_NODES:
            raise _Unfolded(f"holds more than {_MAX_NODES:,} values")
        return super().compose_node(parent, index)


def _count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes when every alias is unfolded; each is visited once, and `known` holds its count."""
    if id(node) in known:
        if not known[id(node)]:
            raise _Unfolded("an alias stands inside of what it names")
        return known[id(node)]
    known[id(node)] = 0
    inner: Any = node.value
    if isinstance(node, yaml.ScalarNode):
        if node.tag in _NUMBERS and len(inner) > _MAX_DIGITS:
            raise _Unfolded(f"a number of {len(inner):,} characters")
        inner = []
    elif isinstance(node, yaml.MappingNode):
        inner = [part for pair in inner for part in pair]
    count = 1 + sum(_count_nodes(part, known) for part in inner)
    if count > _MAX_NODES:
        raise _Unfolded(f"unfolds to more than {_MAX_NODES:,} values")
    known[id(node)] = count
    return count
