"""Write `recipes/tiny/digits.zip`: handwritten digits as PNG images in folders of their classes.

python recipes/tiny/digits.py --output recipes/tiny/digits.zip     (needs scikit-learn, which ships the images)

The 1,797 images of 8 x 8 pixels are the test part of the UCI data set "Optical Recognition of Handwritten Digits"
(E. Alpaydin, C. Kaynak, 1998, CC BY 4.0). In their order, the first 1,197 train, the next 300 are the validation split
and the last 300 the test split.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

SPLITS = {"train": 1197, "validation": 300, "test": 300}
TIME = (2026, 1, 1, 0, 0, 0)  # of each file, so that the archive has the same bytes whenever it is made


def main(argv: Sequence[str] | None = None) -> None:
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the archive to write")
    output: Path = parser.parse_args(argv).output

    digits = load_digits()  # grey values 0 to 16
    assert len(digits.images) == sum(SPLITS.values())
    number = 0
    with zipfile.ZipFile(output, "w", zipfile.ZIP_STORED) as archive:
        for split, count in SPLITS.items():
            for _ in range(count):
                grey = (digits.images[number] * 255 / 16).round().astype("uint8")
                file = io.BytesIO()
                Image.fromarray(grey).save(file, "PNG", optimize=True)
                name = f"{split}/{digits.target[number]}/{number:04d}.png"
                archive.writestr(zipfile.ZipInfo(name, TIME), file.getvalue())
                number += 1


if __name__ == "__main__":
    main()
