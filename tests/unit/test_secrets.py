"""No part of a URL that may be a secret is shown or kept, whatever characters it is made of."""

from __future__ import annotations

import base64
import itertools
import json
import re
import subprocess
import sys
import time
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmembed.cli import run
from fmembed.errors import FmembedError, SpecError
from fmembed.redaction import conceal, redact, scrub
from fmembed.spec import RunSpec, SourceSpec

GOOD: dict[str, Any] = {"source": {"uri": "a"}, "model": {"id": "b"}, "output": {"uri": "c"}}
_COUNT = itertools.count(1000)


def secrets(between: str, first: str = "") -> st.SearchStrategy[str]:
    """Marks that no other text contains, with the characters given between, before and after."""
    piece = st.text(st.sampled_from(between), max_size=3) if between else st.just("")
    mark = st.builds(lambda: f"K{next(_COUNT)}q")
    parts = st.lists(st.tuples(piece, mark), min_size=1, max_size=3)
    return st.builds(
        lambda head, found, tail: head + "".join(p + m for p, m in found) + tail,
        st.just(first), parts, piece,
    )  # fmt: skip


ANY = "/#@?:&=%+;,. '\"`\\[](){}<>|~^!$*\n\té漢"
UNBLANK = "".join(c for c in ANY if not c.isspace())
SCHEMES = st.sampled_from(
    ["https", "HTTP", "ftp", "s3", "gs", "az", "webdav+https", "my.proto", "sftp", "abfss", "hf"]
)
CHAINS = st.sampled_from(
    ["", "simplecache::", "filecache::", "zip://a.csv::", "tar://b/*.x::blockcache::", "X.Y+z::"]
)
HOSTS = st.sampled_from(
    ["host.org", "bucket", "127.0.0.1:8000", "[::1]:80", "h.co:443", "localhost"]
)
PATHS = st.sampled_from(["", "/", "/data/x.jsonl", "/a%20b/%2Fc.csv", "/*.parquet"])


@st.composite
def urls(draw: st.DrawFn, password: str, query: str) -> tuple[str, str]:
    """A URL with secrets, and all of its secrets."""
    user, word = draw(secrets("._-")), draw(secrets(password))
    login = draw(st.sampled_from([f"{user}:{word}@", f":{word}@", f"{user}@", ""]))
    pairs = [
        f"{k}={draw(secrets(query))}" for k in draw(st.lists(st.sampled_from("asX"), max_size=3))
    ]
    tail = "?" + "&".join(pairs) if pairs else ""
    fragment = draw(st.sampled_from(["", "#" + draw(secrets(query))]))
    start = f"{draw(CHAINS)}{draw(SCHEMES)}://"
    return f"{start}{login}{draw(HOSTS)}{draw(PATHS)}{tail}{fragment}", login + tail + fragment


def survivors(secret: str, text: str) -> list[str]:
    return [mark for mark in re.findall(r"K\d+q", secret) if mark in text]


@given(urls(ANY, ANY))
@settings(max_examples=100, deadline=None)
def test_of_a_url_no_secret_survives(made: tuple[str, str]) -> None:
    url, secret = made
    assert survivors(secret, redact(url)) == []
    spec = SourceSpec(uri=url, root=url)
    assert survivors(secret, repr(spec) + str(spec) + spec.stored_name) == []
    stored = RunSpec.parse({**GOOD, "source": {"uri": url, "root": url}}).stored()
    assert survivors(secret, json.dumps(stored)) == []
    assert redact(redact(url)) == redact(url)


@given(
    urls(ANY, UNBLANK),
    st.sampled_from(["", "cannot read ", "('", 'url="', "[", "<", "source.uri=", "3"]),
    st.sampled_from(["", " now", "')", '", x', "]", ": 403 for me@x.org", ">."]),
)
@settings(max_examples=100, deadline=None)
def test_of_a_text_that_quotes_a_url_no_secret_survives(
    made: tuple[str, str], before: str, after: str
) -> None:
    url, secret = made
    assert survivors(secret, scrub(before + url + after)) == []
    assert survivors(secret, str(FmembedError(before + url + after))) == []


FORMS = (
    str,
    repr,
    quote,
    json.dumps,
    lambda url: quote(url, safe=""),
    lambda url: quote(url, safe="/?:@&="),
    lambda url: re.sub("%..", lambda code: code[0].lower(), quote(url, safe="")),
    lambda url: url.partition("?")[2],
)


@pytest.mark.slow
@given(
    urls(ANY, ANY),
    st.sampled_from(FORMS),
)
@settings(max_examples=100, deadline=None)
def test_known_secrets_are_found_however_they_are_quoted(made: tuple[str, str], form: Any) -> None:
    url, secret = made
    shown = conceal(f"{form(url)} was not found", url)
    assert survivors(secret, shown) == []


@given(
    CHAINS,
    SCHEMES,
    HOSTS,
    PATHS,
    st.sampled_from(["", "cannot read ", "('", 'url="']),
    st.sampled_from(["", " now", "')", '", x']),
)
@settings(max_examples=100, deadline=None)
def test_what_holds_no_secret_comes_through_as_it_is(
    chain: str, scheme: str, host: str, path: str, before: str, after: str
) -> None:
    url = f"{chain}{scheme}://{host}{path}"
    assert redact(url) == url
    text = before + url + after
    assert scrub(text) == text
    assert conceal(text, url) == text


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b/c.parquet",
        "https://cdn.host.net/npm/data@2/cars.json",
        "hf://datasets/org/name@main/x.csv",
        "abfss://container@account.dfs.core.windows.net/folder",
        "https://host: 403, message='Forbidden'",
        "cannot connect to http://127.0.0.1:8080: refused",
        "model.endpoint: http://127.0.0.1:9/v1 did not answer in 1 tries",
        "/data/a?b#c@d::e/x.jsonl",
        "file:///data/a@b",
        "mail me@x.org, or see it at 10:30",
        "C:\\folder and a ratio 3://",
        "a::b and std::vector",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert scrub(text) == text
    if "://" in text and " " not in text:
        assert redact(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "Max retries exceeded with url: /x.csv?sig=Zq81canary (Caused by",
        "no file at /here/https:/me:Zq81canary@host/x",
        "redirected to https%3A%2F%2Fme%3AZq81canary%40host%2Fx",
        "headers: {'Authorization': 'Basic Zq81canary'}",
        "user:Zq81canary@host/x is no file",
        "got X-Amz-Signature=Zq81canary",
    ],
)
def test_pieces_of_urls_are_cut_too(text: str) -> None:
    assert "Zq81canary" not in scrub(text)
    assert scrub(text).split()[0] == text.split()[0] or text.startswith("user:")


def test_a_login_is_found_in_base64() -> None:
    header = base64.b64encode(b"me:Zq81 canary").decode()
    assert header not in conceal(f"sent {header} to", "https://me:Zq81%20canary@host/x")


def test_long_texts_take_no_long_time() -> None:
    started = time.monotonic()
    for text in ("a" * 200_000, "a::" * 70_000, "@:" * 100_000, "a://" * 3_000, "'a://b?" * 3_000):
        scrub(text + " https://me:pw@host/x")
    assert time.monotonic() - started < 5


def message(change: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as e:
        RunSpec.parse({**GOOD, **change})
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    "uri",
    [
        "https://me:Zq81canary@host/out",
        "s3://AKIA:Zq81/canary@bucket/out",
        "s3://Zq81canary@bucket/out",
        "gs://bucket/out?sig=Zq81canary",
        "az://container/out#Zq81canary",
        "simplecache::s3://me:Zq81canary@bucket/out",
        "file://me:Zq81canary@host/out",
    ],
)
def test_an_output_holds_no_secret(uri: str) -> None:
    said = message({"output": {"uri": uri}})
    assert said.startswith("output.uri: takes a URL without user, password, query and fragment")
    assert "canary" not in said
    assert "Zq81" not in said


@pytest.mark.parametrize(
    "uri",
    ["out", "/data/a?b#c@d%2F", "file:///data/a?b#c", "s3://bucket/a@b", "gs://bucket/x",
     "abfss://container@account.dfs.core.windows.net/x"],
)  # fmt: skip
def test_other_outputs_are_taken(uri: str) -> None:
    assert RunSpec.parse({**GOOD, "output": {"uri": uri}}).output.uri == uri


@pytest.mark.parametrize(
    "key",
    ["sk-abcdef0123456789", "hf_abcdEFGH1234", "sk_live_abc", "AKIAIOSFODNN7EXAMPLE", "hunter2",
     "A9F8B7C6D5E4A9F8B7C6D5E4", "correct horse", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "correct_horse",
     "https://me:pw@host", "1KEY", ""],
)  # fmt: skip
def test_a_key_in_place_of_its_name_is_refused_and_not_shown(key: str) -> None:
    endpoint = {"base_url": "http://host/v1", "api_key_env": key}
    said = message({"model": {"id": "m", "endpoint": endpoint}})
    assert said.startswith("model.endpoint.api_key_env: takes the name of an environment variable")
    assert not key or key not in said


def test_names_of_variables_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("my_key1abc", "x")
    for name in ("OPENAI_API_KEY", "VLLM_TOKEN2", "_KEY", "TEAM_2_KEY", "my_key1abc"):
        endpoint = {"base_url": "http://host/v1", "api_key_env": name}
        spec = RunSpec.parse({**GOOD, "model": {"id": "m", "endpoint": endpoint}})
        assert spec.model.endpoint is not None
        assert spec.model.endpoint.api_key_env == name


@pytest.mark.parametrize(
    "change",
    [
        {"source": {"uri": "a", "api_key": "Zq81canary"}},
        {"source": {"uri": "a", "storage_options": {"secret": "Zq81canary"}}},
        {"source": "https://me:Zq81canary@host/x"},
        {"source": ["https://me:Zq81canary@host/x"]},
        {"source": {"uri": {"password": "Zq81canary"}}},
        {"source": {"uri": "a", "format": "https://me:Zq81 canary@host/x?sig=Zq81 canary"}},
        {"source": {"uri": "a", "format": "sk-Zq81canary"}},
        {"source": {"uri": "a", "hf": {"streaming": "me:Zq81canary@host"}}},
        {"source": {"uri": "a", "sk-Zq81canary": None}},
        {"https://me:Zq81canary@host/x?sig=Zq81canary": 1},
        {"model": {"id": "m", "endpoint": {"base_url": "https://me:Zq81canary@host/v1"}}},
        {"model": {"id": "m", "endpoint": {"base_url": "https://host/v1?key=Zq81canary"}}},
        {"zeroshot": {"templates": "https://me:Zq81canary@host/x"}},
        {"compute": {"actors": ["Zq81canary"]}},
    ],
)
def test_messages_about_wrong_fields_show_no_secret(change: dict[str, Any]) -> None:
    assert "Zq81" not in message(change)
    assert "canary" not in message(change)


def test_a_flag_on_a_wrong_config_shows_no_secret(tmp_path: Any) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("source: 'https://me:Zq81 canary@host/x?sig=Zq81canary'\n")
    with pytest.raises(SpecError, match=r"^source: takes a mapping of fields") as e:
        RunSpec.from_yaml(str(path), {"source.format": "csv"})
    assert "canary" not in str(e.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ("embed", "c.yaml", "https://me:Zq81canary@host/x?sig=Xk92canary"),
        ("https://me:Zq81canary@host/x?sig=Xk92canary",),
        ("embed", "--nothing=https://me:Zq81canary@host/x"),
        ("embed", "--set", "source.uri=*Zq81canary"),
        ("embed", "--set", "source.uri=!Zq81canary x"),
        ("embed", "--set", "source.uri={https://me:Zq81canary@host/x"),
        ("embed", "--set", "https://me:Zq81canary@host/x?sig=Xk92canary"),
        ("embed", "https://me:Zq81canary@host/x?sig=Xk92canary"),
        ("rejected", "t", "--samples", "https://me:Zq81canary@host/x"),
    ],
)
def test_a_wrong_command_line_shows_no_secret(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(list(arguments)) == 2
    said = capsys.readouterr()
    for piece in ("Zq81", "Xk92", "canary"):
        assert piece not in said.out + said.err


def test_a_traceback_shows_no_secret() -> None:
    code = (
        "import sys; from fmembed import cli\n"
        "def fail(*_): raise KeyError('https://me:Zq82canary@host/x?sig=Zq82canary')\n"
        "cli.run = fail; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1
    assert "KeyError: 'https://host/x" in done.stderr
    assert "canary" not in done.stderr


def test_a_broken_config_shows_no_secret(tmp_path: Any) -> None:
    path = tmp_path / "c.yaml"
    for text in ("a: *Zq81canary", "a: !Zq81canary b", "a: &Zq81canary 1\nb: &Zq81canary 2\nc: *x"):
        path.write_text(text)
        with pytest.raises(SpecError, match="not valid YAML") as e:
            RunSpec.from_yaml(str(path))
        assert "canary" not in str(e.value)
