"""What of a URL, or of a text that quotes some, can be shown and kept: no secret.

Users give URLs with passwords and signatures in them, and other libraries' errors quote these
whole, in part, encoded. A source uses them; nothing keeps them.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

# Bounded, because it is tried at every letter of what a message quotes.
_SCHEME = r"[A-Za-z][A-Za-z0-9+._-]{0,40}"
_URL = re.compile(rf"(?:{_SCHEME}::){{0,8}}{_SCHEME}://")
_CHAIN = re.compile(rf"(?:{_SCHEME}::)+\S*$")
_LINK = re.compile(rf"::(?=(?:{_SCHEME}::){{0,8}}{_SCHEME}://)")
# What may stand between `://` and the first slash once user and password are gone.
# (and what ends a sentence or a quotation).
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]*\]|[^:/\[\]@]*)(?::\d*)?[.,;:!'\")\]}>]*(?=/|$)")
_THIS_MACHINE = re.compile(r"(?:localhost|\[[0-9A-Fa-f:.]*\]|\d+(?:\.\d+){3}):\d*\W*")
# Where no host, and so no user, stands before the path.
_PATHS = ("s3", "s3a", "gs", "gcs", "az", "hf", "file", "local", "memory", "zip", "tar")
_CONTAINER = re.compile(r"abfss?://[a-z0-9-]+@[a-z0-9.-]+(?=/|$)")
# Where a query begins, encoded ones too, or parameters of a path.
_QUERY = re.compile(r"[?#]|;[\w.-]+=|%3[Ff](?=.*?(?:=|%3[Dd]))", re.DOTALL)
_ENCODED_URL = re.compile(r"%3A%2F%2F", re.IGNORECASE)
_NAMED_SECRET = re.compile(
    r"(?i)((?:signature|sig|token|passw(?:or)?d|secret|credential|(?:api|access)_?key(?:_?id)?)=)\S+"
)
_AUTHORIZATION = re.compile(r"(?i)(authorization\W{1,6}(?:basic|bearer)\s+)\S+")
_KEY = re.compile(
    r"(?i)(?:sk|pk|rk|hf|r8|gsk|gh[a-z]|github_pat|glpat|xox[a-z]|whsec|nvapi|pplx)[_-]\w"
    r"|(?:AKIA|ASIA|AIza|ya29|eyJ)\w"
    r"|(?=\S*[A-Za-z])(?=\S*\d)[\w+/=~-]{20,}$"
)


def is_url(text: str) -> bool:
    """Whether a text is a URL or a chain of them, and nothing else."""
    return _URL.match(text) is not None or _CHAIN.match(text) is not None


def looks_like_key(text: str) -> bool:
    """Whether a word has the form of an API key, by its prefix or by its length and mixture."""
    return _KEY.match(text) is not None


def redact(uri: str) -> str:
    """A URL, chained ones too, without user, password, query and fragment; a path as it is.

    What an unquoted password looks like is anybody's guess (`/`, `@`, `?`, `::`, blanks): where a
    URL can be read in two ways, only what is no secret in either is left, at worst the scheme.
    """
    if "://" not in uri:
        # `simplecache::user:password@host/path`, where the scheme was forgotten.
        chain = re.match(rf"(?:{_SCHEME}::)+(?=.*[@?#])", uri, re.DOTALL)
        return f"{chain[0]}..." if chain else uri
    return "::".join(shown for shown, _ in _cut_chain(uri))


def split_chain(uri: str) -> list[str]:
    """The links of fsspec's chained URLs (`zip://a.csv::https://host/x.zip`), outermost first."""
    query = _QUERY.search(uri)
    end = query.start() if query else len(uri)
    links = _LINK.split(uri[:end])
    return [*links[:-1], links[-1] + uri[end:]]


def _cut_chain(uri: str) -> Iterator[tuple[str, list[str]]]:
    """What can be shown of each link, and what was cut from it."""
    *outer, last = split_chain(uri)
    for i, link in enumerate(outer):
        shown, cut = _cut(link, has_next=True)
        if shown.endswith("..."):  # what follows may be the rest of a password
            yield shown, [*cut, *outer[i + 1 :], last]
            return
        yield shown, cut
    yield _cut(last, has_next=False)


def _cut(link: str, has_next: bool) -> tuple[str, list[str]]:
    scheme, separator, rest = link.partition("://")
    if not separator and has_next and re.fullmatch(_SCHEME, link):
        return link, []
    if not separator or not re.fullmatch(_SCHEME, scheme):
        return "...", [link]
    hidden = f"{scheme}://...", [rest]
    cut = []
    query = _QUERY.search(rest)
    at = rest.rfind("@")
    if at >= 0 and _names_user(link, scheme, rest, at):
        if "[" in rest[:at] or _QUERY.search(rest, 0, at):
            return hidden
        cut, rest = [rest[:at]], rest[at + 1 :]
        query = _QUERY.search(rest)
    if query:
        cut, rest = [*cut, rest[query.start() :]], rest[: query.start()]
    if encoded := _ENCODED_URL.search(rest):
        start = rest.rfind("/", 0, encoded.start()) + 1
        cut, rest = [*cut, rest[start:]], rest[:start] + "..."
    host = rest.partition("/")[0]
    # A port that is no number, or one of an archive's member, is a password without its end.
    is_host = _HOST.match(rest) and "%40" not in host and not (has_next and ":" in host)
    return (f"{scheme}://{rest}", cut) if is_host or _CONTAINER.match(link) else hidden


def _names_user(link: str, scheme: str, rest: str, at: int) -> bool:
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if _CONTAINER.match(link) and at < len(authority):
        return False
    if at < len(authority) or ":" in rest[:at]:
        return True
    # https://cdn.host/package@2/x is a path; https://to/ken@host and s3://to?ken@bucket are none.
    if scheme.lower() in _PATHS:
        return re.search("[?#]", rest[:at]) is not None
    return "." not in authority or rest[len(authority)] != "/"


def scrub(text: str) -> str:
    """Text with every URL in it redacted, and with what looks like a piece of one cut.

    Libraries quote URLs whole or in part (`/path?sig=...`). A password with blanks ends at the last
    `@` of the text; a query ends at a blank, which those who quote URLs encode, else at its quote.
    """
    cleaned, i = [], 0
    while url := _URL.search(text, i):
        end = _url_end(text, url)
        cleaned += [re.sub(r"\S+", _scrub_word, text[i : url.start()])]
        shown = redact(text[url.start() : end])
        if text[end - 1] in ".,;:" and shown[-1] not in ".,;:/":
            shown += text[end - 1]  # the sentence's
        cleaned += [shown]
        i = end
    cleaned += [re.sub(r"\S+", _scrub_word, text[i:])]
    return _AUTHORIZATION.sub(r"\1...", "".join(cleaned))


def _url_end(text: str, url: re.Match[str]) -> int:
    def word_end(start: int) -> int:
        blank = re.compile(r"\s").search(text, start)
        return blank.start() if blank else len(text)

    end = word_end(url.end())
    at = text.rfind("@", end)
    if at >= 0:
        for link in text[url.start() : end].split("://")[1:]:
            authority = re.split(r"[/?#]", link, maxsplit=1)[0]
            is_open = ":" in authority and not _THIS_MACHINE.fullmatch(authority)
            # A user with a blank in its name: a host would have a dot.
            is_cut = authority == link and "." not in authority
            if is_open or (is_cut and ":" in text[end:at]):
                end = word_end(at)
                break
    if _QUERY.search(text, url.end(), end):
        *_, more = [None, *re.finditer(r"&[\w.~-]+=\S*", text[end:])]
        if more is not None:
            end += more.end()
        mark = text[url.start() - 1 : url.start()]
        if mark in ("'", '"'):
            end = max(end, text.rfind(mark))
    return end


def _scrub_word(word: re.Match[str]) -> str:
    text = word[0]
    if _ENCODED_URL.search(text):
        return "..."
    head, at, tail = text.rpartition("@")
    if at and ":" in head:
        text = "..." if "?" in head else f"...@{tail}"
    before, mark, after = text.partition("?")
    if mark and "=" in after:
        text = f"{before}?..."
    return _NAMED_SECRET.sub(r"\1...", text)


def conceal(text: str, *uris: str) -> str:
    """`scrub`, and every piece of these URLs' secrets cut out, whatever encoding they come in."""
    for uri in uris:
        # Nothing is cut of a path, or of a URL without secrets: its names are ordinary words.
        if redact(uri) != uri and (secrets := _secrets_in(uri)) is not None:
            text = secrets.sub("...", text)
    return scrub(text)


@lru_cache
def _secrets_in(uri: str) -> re.Pattern[str] | None:
    """A pattern for what `redact` cuts from a URL: each part, plain, %-encoded, escaped, base64."""
    parts: set[str] = set()
    for cut in itertools.chain.from_iterable(cut for _, cut in _cut_chain(uri)):
        user, colon, password = cut.partition(":")
        parts |= {cut, password, *re.split("[?&;#]", cut), *re.split("[/?&;#=:@]", cut)}
        if colon:
            login = f"{unquote(user)}:{unquote(password)}".encode()
            parts.add(base64.b64encode(login).decode())
    # A piece of three characters is in every other word.
    found = sorted({unquote(p) for p in parts if len(unquote(p)) > 3}, key=len, reverse=True)
    return re.compile("|".join(map(_in_any_encoding, found))) if found else None


def _in_any_encoding(secret: str) -> str:
    def forms(character: str) -> str:
        encoded = quote(character, safe="", errors="replace")
        if encoded == character:
            encoded = f"%{ord(character):02X}"
        escaped = {json.dumps(character)[1:-1], repr(character)[1:-1], "\\" + character}
        known = {character, encoded, encoded.lower(), *escaped, "+" if character == " " else ""}
        return "(?:" + "|".join(map(re.escape, sorted(known - {""}, key=len, reverse=True))) + ")"

    return "".join(map(forms, secret))


def without_secrets(value: Any) -> Any:
    """A value as plain data, with the URLs in it redacted."""
    if isinstance(value, str):
        if is_url(value):
            return redact(value)
        return scrub(value) if "://" in value else value
    if isinstance(value, dict):
        return {key: without_secrets(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(without_secrets, value))
    return value
