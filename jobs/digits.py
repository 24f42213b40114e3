"""Write scikit-learn's digits as pictures in class folders: `python jobs/digits.py data/digits`.

Beside them digits.parquet: path, digit and caption of each, for models that join two modalities.
"""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def main(folder: Path) -> None:
    digits = load_digits()
    rows = []
    for i, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = f"{digit}/{i:04d}.png"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        # 16 steps of grey; large enough that a patch of 14 pixels sees a part of a stroke.
        image = Image.fromarray((pixels * 255 / 16).astype("uint8"))
        image.resize((56, 56), Image.Resampling.BICUBIC).save(folder / path)
        caption = f"a handwritten digit {NAMES[digit]}"
        rows.append({"path": path, "digit": str(digit), "caption": caption})
    pq.write_table(pa.Table.from_pylist(rows), folder / "digits.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
