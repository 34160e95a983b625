"""Write robustcompress/data/digits.safetensors: scikit-learn's handwritten digits as bytes.

Run in the repository root, with scikit-learn installed: `python benchmarks/make_digits.py`. A test compares
the file with scikit-learn's own arrays.

Source: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak (1998), UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49, licensed CC BY 4.0. The 1,797 images of its test part, 8x8
pixels with grey levels 0 to 16.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

PATH = Path(__file__).parents[1] / "robustcompress" / "data" / "digits.safetensors"
METADATA = {
    "title": "Optical Recognition of Handwritten Digits (test part, as distributed by scikit-learn)",
    "authors": "E. Alpaydin, C. Kaynak",
    "source": "https://doi.org/10.24432/C50P49",
    "license": "CC BY 4.0",
    "changes": "stored as uint8",
}


def main() -> None:
    digits = load_digits()
    tensors = {"images": digits.images.astype(np.uint8), "labels": digits.target.astype(np.uint8)}
    save_file(tensors, PATH, metadata=METADATA)
    print(f"{PATH}: {PATH.stat().st_size} bytes, {len(tensors['labels'])} images")


if __name__ == "__main__":
    main()
