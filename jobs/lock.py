"""Write the locks anew from constraints.txt: `python jobs/lock.py`; needs uv.

`demo.lock` holds what the demo needs and the build backend, `test.lock` what the tests need beside:
each package at its version of constraints.txt, with the SHA-256 of every file that the index has of
it, for all platforms.
"""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Its builds differ by machine: for CPUs, and for each CUDA.
NOT_LOCKED = {"torch"}


def resolve(requirements: str, *options: str) -> str:
    command = ["uv", "pip", "compile", *options, "-", "--python-version=3.11", "--universal",
               "--no-header", "--no-annotate", "--quiet"]  # fmt: skip
    done = subprocess.run(  # noqa: S603 - our own command
        command, input=requirements, text=True, check=True, stdout=subprocess.PIPE, cwd=ROOT
    )
    return done.stdout


def write(name: str, head: str, pins: dict[str, str], names: set[str]) -> None:
    lines = "\n".join(pins[name] for name in sorted(names - NOT_LOCKED))
    locked = resolve(lines, "--no-deps", "--generate-hashes")
    (ROOT / name).write_text(f"# Made with: python jobs/lock.py\n{head}{locked}")


def main() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {r.split("==")[0].lower().replace("_", "-"): r for r in pinned if "==" in r}
    options = ("pyproject.toml", "--extra=demo", "--constraint=constraints.txt")
    demo = {line.split("==")[0] for line in resolve("hatchling", *options).splitlines()}
    # What is not pinned belongs to other platforms, or to torch.
    write("demo.lock", "", pins, pins.keys() & demo)
    write("test.lock", "-r demo.lock\n", pins, pins.keys() - demo)


if __name__ == "__main__":
    main()
