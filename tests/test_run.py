"""What the driver need not import."""

from __future__ import annotations

import subprocess
import sys


def test_the_driver_imports_neither_torch_nor_scikit_learn() -> None:
    program = (
        "import sys; import fmembed.run, fmembed.evaluation; "
        "print(sorted({'torch', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
