"""The formats of a source: a new one is a file beside this and a line here."""

from __future__ import annotations

from fmembed.sources.formats.base import Format
from fmembed.sources.formats.csv import CSV
from fmembed.sources.formats.folder import AUDIO_FOLDER, IMAGE_FOLDER, TEXT_FOLDER
from fmembed.sources.formats.hf import HF
from fmembed.sources.formats.json_array import JSON
from fmembed.sources.formats.jsonl import JSONL
from fmembed.sources.formats.numpy_file import NUMPY
from fmembed.sources.formats.parquet import PARQUET
from fmembed.sources.formats.text_lines import LINES
from fmembed.sources.formats.webdataset import WEBDATASET

# In this order: where a folder holds as many files of one as of another, the earlier one is meant.
_FORMATS: tuple[Format, ...] = (
    PARQUET,
    JSONL,
    CSV,
    TEXT_FOLDER,
    IMAGE_FOLDER,
    AUDIO_FOLDER,
    WEBDATASET,
    LINES,
    JSON,
    NUMPY,
    HF,
)
FORMATS = {format_.name: format_ for format_ in _FORMATS}
