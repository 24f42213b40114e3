"""Verified tables of embeddings from a dataset and a pretrained foundation model.

import fmembed
result = fmembed.embed(fmembed.RunSpec.from_yaml("config.yaml"))
table = fmembed.read("out/bbc")
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

# `python -m fmembed.cli` puts the current folder first on the path: data lies there, and a numpy.py
# among it would be run. While -m looks for the module it stands in for its name.
if (
    sys.argv[:1] == ["-m"]
    and not sys.flags.safe_path
    and any(a.removeprefix("-m").partition(".")[0] == "fmembed" for a in sys.orig_argv)
):
    del sys.path[0]
# An empty entry means the current folder: `PYTHONPATH=$PYTHONPATH:/x`, where it was unset.
if os.environ.get("PYTHONPATH") and "" in os.environ["PYTHONPATH"].split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, os.environ["PYTHONPATH"].split(os.pathsep))
    )
    sys.path[1:] = [p for p in sys.path[1:] if p not in ("", os.getcwd())]

from typing import TYPE_CHECKING, Any

from fmembed.compute_spec import BudgetSpec, ComputeSpec, PoolSpec
from fmembed.errors import (
    BudgetSpentError,
    ChangedError,
    ConflictError,
    DamagedError,
    FmembedError,
    GateRefusedError,
    Interrupted,
    LockedError,
    ModelError,
    NoFilesError,
    RejectedError,
    SourceError,
    SpecError,
    StorageError,
    TableError,
    UserError,
    WaitedError,
)
from fmembed.spec import (
    GateSpec,
    HubDataset,
    ModelSpec,
    OutputSpec,
    RefreshSpec,
    RunSpec,
    SourceSpec,
)

# In a notebook without ipywidgets both say so when they are imported; bars and tables are ours.
warnings.filterwarnings("ignore", message="IProgress not found")  # of tqdm
logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)

if TYPE_CHECKING:
    from fmembed.api import Result, embed, plan, refresh
    from fmembed.deletion import delete, undelete
    from fmembed.embeddings import Embeddings
    from fmembed.embeddings import Embeddings as open  # noqa: A004, F401, N813
    from fmembed.encoding import encode
    from fmembed.exchange.exporting import export
    from fmembed.exchange.importing import import_vectors
    from fmembed.forecast import Forecast
    from fmembed.pipeline import compare, probe
    from fmembed.promotion import promote, rollback, status
    from fmembed.result import RunResult
    from fmembed.table.reading import read
    from fmembed.table.store import Store
    from fmembed.table.verify import verify
    from fmembed.table.versions import diff_versions as diff
    from fmembed.table.versions import list_files as files
    from fmembed.table.versions import list_versions as versions
    from fmembed.table.versions import vacuum

__version__ = "0.1.0"

# Without `open`, which `import *` would put in the place of Python's own.
__all__ = [
    "BudgetSpec",
    "BudgetSpentError",
    "ChangedError",
    "ComputeSpec",
    "ConflictError",
    "DamagedError",
    "Embeddings",
    "FmembedError",
    "Forecast",
    "GateRefusedError",
    "GateSpec",
    "HubDataset",
    "Interrupted",
    "LockedError",
    "ModelError",
    "ModelSpec",
    "NoFilesError",
    "OutputSpec",
    "PoolSpec",
    "RefreshSpec",
    "RejectedError",
    "Result",
    "RunResult",
    "RunSpec",
    "SourceError",
    "SourceSpec",
    "SpecError",
    "StorageError",
    "Store",
    "TableError",
    "UserError",
    "WaitedError",
    "__version__",
    "compare",
    "delete",
    "diff",
    "embed",
    "encode",
    "export",
    "files",
    "import_vectors",
    "plan",
    "probe",
    "promote",
    "read",
    "refresh",
    "rollback",
    "status",
    "undelete",
    "vacuum",
    "verify",
    "versions",
]


# What they are called here, and there.
_OF_VERSIONS = {
    "diff": "diff_versions",
    "files": "list_files",
    "vacuum": "vacuum",
    "versions": "list_versions",
}


def __getattr__(name: str) -> Any:
    # Lazy, because ray.data alone costs 1.4 s and a spec needs none of it.
    if name == "RunResult":
        from fmembed.result import RunResult

        return RunResult
    if name == "Forecast":
        from fmembed.forecast import Forecast

        return Forecast
    if name == "encode":
        from fmembed.encoding import encode

        return encode
    if name in ("Embeddings", "open"):
        from fmembed.embeddings import Embeddings

        return Embeddings
    if name in ("Result", "embed", "plan", "refresh"):
        from fmembed import api

        return getattr(api, name)
    if name == "import_vectors":
        from fmembed.exchange.importing import import_vectors

        return import_vectors
    if name == "export":
        from fmembed.exchange.exporting import export

        return export
    if name in ("delete", "undelete"):
        from fmembed import deletion

        return getattr(deletion, name)
    if name in ("promote", "rollback", "status"):
        from fmembed import promotion

        return getattr(promotion, name)
    if name == "Store":
        from fmembed.table.store import Store

        return Store
    if name in ("compare", "probe"):
        from fmembed import pipeline

        return getattr(pipeline, name)
    if name == "read":
        from fmembed.table.reading import read

        return read
    if name == "verify":
        from fmembed.table.verify import verify

        return verify
    if name in _OF_VERSIONS:
        from fmembed.table import versions as of_versions

        return getattr(of_versions, _OF_VERSIONS[name])
    raise AttributeError(f"module 'fmembed' has no attribute {name!r}")
