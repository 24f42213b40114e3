"""A tokenizer that was kept gives what transformers' own gives, without importing transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as rust
import transformers as hf
from conftest import SENTENCES
from tiny import save_siglip, save_tiny

from fmembed.checkpoint.opening import Checkpoint, open_checkpoint
from fmembed.errors import ModelError
from fmembed.prepare import tokenizer as module
from fmembed.prepare.tokenizer import load_tokenizer
from fmembed.spec import ModelSpec

TEXTS = [
    *SENTENCES,
    "",
    " ",
    "Zu Zürich: 12 Äpfel, [MASK] und ￦ 東京都 🙂🙂 e\u0301",
    "</s> <s> [SEP] x",
    *(c * n + " NEW" for c in "=-.aho!0" for n in range(2, 60)),
]
CONFIG = hf.BertConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=64,
)  # fmt: skip


def word_piece(minilm: Path, **more: Any) -> Any:
    return hf.AutoTokenizer.from_pretrained(minilm, **more)


def byte_level(_: Path) -> Any:
    own = rust.ByteLevelBPETokenizer()
    own.train_from_iterator(SENTENCES, vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=own._tokenizer, **names)


def unigram(_: Path) -> Any:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), ("\u2581", -2.0)]
    letters = sorted({c for text in SENTENCES for c in text if c != " "})
    return hf.XLNetTokenizer(
        vocab=[*pieces, ("<cls>", 0.0), ("<sep>", 0.0), *((c, -3.0) for c in letters)]
    )


def close_unigrams(_: Path) -> Any:
    """Of several ways to cut a run of one character some score the same, but for a bit."""
    rng = np.random.default_rng(3)
    vocab = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    for c in "=-.aho!0123456789xw":
        vocab += [(c * n, float(np.float32(-8 - 6 * rng.random()))) for n in (1, 2, 3, 4, 8)]
    own = hf.XLMRobertaTokenizer(vocab=vocab)
    own.add_tokens(["NEW"])
    return own


TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "word pieces": word_piece,
    "cut on the left": lambda minilm: word_piece(minilm, truncation_side="left"),
    "special tokens as words": lambda minilm: word_piece(minilm, split_special_tokens=True),
    "bytes": byte_level,
    "unigrams, and segments": unigram,
    "unigrams of close scores": close_unigrams,
}


@pytest.fixture(params=TOKENIZERS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, minilm: Path) -> Checkpoint:
    save_tiny(tmp_path, hf.BertModel, CONFIG)
    TOKENIZERS[request.param](minilm).save_pretrained(tmp_path)
    return open_checkpoint(ModelSpec(id=str(tmp_path), dtype="float32"), False)


def test_what_is_kept_is_what_transformers_has(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = hf.AutoTokenizer.from_pretrained(checkpoint.folder())
    made = load_tokenizer.__wrapped__(checkpoint)
    # Not from the files again.
    monkeypatch.setattr(module, "_load", None)
    kept = load_tokenizer.__wrapped__(checkpoint)
    limit = checkpoint.max_tokens
    for found in (made, kept):
        assert found.truncation_side == own.truncation_side
        for (values, is_cut), text in zip(found.encode(TEXTS), TEXTS, strict=True):
            expected = own(text, truncation=True, max_length=limit)
            ids = values[0] if isinstance(values, tuple) else values
            assert ids == expected["input_ids"]
            if isinstance(values, tuple):
                assert values[1] == expected["token_type_ids"]
            else:
                assert not any(expected.get("token_type_ids", ()))
            whole = own(text)["input_ids"]
            assert is_cut == (len(whole) > limit)
            assert found.count(text) == len(whole)
            plain = own(text, add_special_tokens=False, return_offsets_mapping=True)
            assert found.spans(text) == plain["offset_mapping"]
        # That it was asked for a whole text changes nothing.
        assert max(len(v if isinstance(v, list) else v[0]) for v, _ in found.encode(TEXTS)) == limit


def test_files_that_change_before_they_are_loaded_are_refused(
    tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leave nothing for later runs: the digest is that of the files before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    save_tiny(folder, hf.BertModel, CONFIG)
    word_piece(minilm).save_pretrained(folder)
    checkpoint = open_checkpoint(ModelSpec(id=str(folder)), False)
    path = folder / "tokenizer.json"
    before = path.read_text()
    path.write_text(before.replace('"hello"', '"olleh"'))
    with pytest.raises(ModelError, match=r"model\.id: the files of .* have changed since this run"):
        load_tokenizer.__wrapped__(checkpoint)
    path.write_text(before)
    load_tokenizer.__wrapped__(checkpoint)
    kept = load_tokenizer.__wrapped__(checkpoint)
    own = hf.AutoTokenizer.from_pretrained(folder)
    assert [ids for ids, _ in kept.encode(["hello"])] == [own("hello").input_ids]
    # And what is kept is of these files, whatever has become of them.
    path.write_text(before.replace('"hello"', '"olleh"'))
    assert load_tokenizer.__wrapped__(checkpoint).encode(["hello"]) == kept.encode(["hello"])


class Shouting(hf.BertTokenizer):
    """A checkpoint's own: it runs in Rust, after some Python."""

    def _encode_plus(self, text: Any, *given: Any, **options: Any) -> Any:
        some = [text] if isinstance(text, str) else text
        some = [t.replace("!", " exclaimed") for t in some]
        return super()._encode_plus(some[0] if isinstance(text, str) else some, *given, **options)


def markup(_: Path) -> Any:
    own = rust.ByteLevelBPETokenizer()
    own.train_from_iterator(SENTENCES, vocab_size=400,
                            special_tokens=["<s>", "</s>", "<pad>", "<unk>", "<mask>"])  # fmt: skip
    model = json.loads(own._tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return hf.MarkupLMTokenizer(vocab=model["vocab"], merges=merges, tags_dict={"a": 0, "b": 1})


@pytest.mark.parametrize("make", [Shouting.from_pretrained, markup])
def test_what_a_tokenizer_does_in_python_is_done(
    make: Callable[[Path], Any], tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, hf.BertModel, CONFIG)
    word_piece(minilm).save_pretrained(tmp_path)
    own = make(minilm)
    assert own.is_fast
    monkeypatch.setattr(module, "_load", lambda _: own)
    monkeypatch.setattr(module.cache, "recall", lambda *_: None)
    checkpoint = open_checkpoint(ModelSpec(id=str(tmp_path)), False)
    found = load_tokenizer.__wrapped__(checkpoint)
    for (ids, is_cut), text in zip(found.encode(TEXTS), TEXTS, strict=True):
        whole = own(text)["input_ids"]
        assert ids == own(text, truncation=True, max_length=checkpoint.max_tokens)["input_ids"]
        assert is_cut == (len(whole) > checkpoint.max_tokens)


def test_what_does_not_come_back_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, hf.BertModel, CONFIG)
    close_unigrams(tmp_path).save_pretrained(tmp_path)
    load, kept = module._load, []

    def load_with_infinity(checkpoint: Checkpoint) -> Any:
        own = load(checkpoint)
        pieces = [("<unk>", 0.0), ("\u2581", -2.0), ("a", -3.0), ("b", float("-inf"))]
        own.backend_tokenizer.model = rust.models.Unigram(pieces, 0, False)
        return own

    monkeypatch.setattr(module, "_load", load_with_infinity)
    monkeypatch.setattr(module.cache, "recall", lambda *_: None)
    monkeypatch.setattr(module.cache, "remember", lambda *given: kept.append(given))
    checkpoint = open_checkpoint(ModelSpec(id=str(tmp_path)), False)
    found = load_tokenizer.__wrapped__(checkpoint)
    assert not kept
    assert [ids for ids, _ in found.encode(["a a"])] == [
        load_with_infinity(checkpoint)("a a").input_ids
    ]


def test_one_that_pads(tmp_path: Path, minilm: Path) -> None:
    folder = save_siglip(tmp_path, minilm)
    checkpoint = open_checkpoint(ModelSpec(id=str(folder), modality="text"), False, "text")
    own = hf.AutoTokenizer.from_pretrained(folder)
    for _ in range(2):
        found = load_tokenizer.__wrapped__(checkpoint)
        for (ids, _), text in zip(found.encode(TEXTS), TEXTS, strict=True):
            expected = own(text, truncation=True, max_length=16, padding="max_length")
            assert ids == expected["input_ids"]
            assert found.count(text) == len(own(text)["input_ids"])


def test_a_changed_checkpoint_is_another_one(tmp_path: Path, minilm: Path) -> None:
    save_tiny(tmp_path, hf.BertModel, CONFIG)
    found = []
    for side in ("right", "left", "right"):
        word_piece(minilm, truncation_side=side).save_pretrained(tmp_path)
        checkpoint = open_checkpoint(ModelSpec(id=str(tmp_path)), False)
        found.append(load_tokenizer.__wrapped__(checkpoint).encode(TEXTS[4:5]))
    assert found[0] == found[2] != found[1]


def test_what_runs_in_python_is_not_kept(
    tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, hf.BertModel, CONFIG)
    for name in ("tokenizer_config.json", "vocab.txt", "tokenizer.json"):
        shutil.copy(minilm / name, tmp_path / name)
    checkpoint = open_checkpoint(ModelSpec(id=str(tmp_path)), False)
    expected = load_tokenizer.__wrapped__(checkpoint)
    load, kept = module._load, []

    class Python:
        """As a tokenizer that has no Rust part."""

        is_fast = False

        def __init__(self, own: Any) -> None:
            self._own = own

        def __getattr__(self, name: str) -> Any:
            return getattr(self._own, name)

        def __call__(self, *given: Any, **options: Any) -> Any:
            return self._own(*given, **options)

    monkeypatch.setattr(module, "_load", lambda c: Python(load(c)))
    monkeypatch.setattr(module.cache, "recall", lambda *_: None)
    monkeypatch.setattr(module.cache, "remember", lambda *given: kept.append(given))
    found = load_tokenizer.__wrapped__(checkpoint)
    assert not kept
    assert found.encode(TEXTS) == expected.encode(TEXTS)
    assert found.encode([]) == []
    assert [found.count(t) for t in TEXTS] == [expected.count(t) for t in TEXTS]


def test_the_next_process_imports_no_transformers(minilm: Path) -> None:
    code = """if True:
        import sys
        from fmembed.checkpoint.opening import open_checkpoint
        from fmembed.prepare.text import tokenize
        from fmembed.spec import ModelSpec, PreprocessSpec
        checkpoint = open_checkpoint(ModelSpec(id=sys.argv[1], dtype="float32"), False)
        (row,) = tokenize(checkpoint, PreprocessSpec(), ["a b"])
        print(row.pieces[0].tolist(), *sorted({"torch", "transformers"} & sys.modules.keys()))
    """
    said = [
        subprocess.run(
            [sys.executable, "-c", code, str(minilm)], capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    ]
    assert said[1] == "[101, 1037, 1038, 102]"
    assert said[0].removesuffix(" torch transformers") == said[1]
