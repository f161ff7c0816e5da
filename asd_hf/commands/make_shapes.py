from __future__ import annotations

import argparse
from pathlib import Path

from ..data import make_shapes


def main(argv: list[str]) -> None:
    """Writes the generated data set as a COCO folder."""
    parser = argparse.ArgumentParser(prog="asd-hf make-shapes", description=main.__doc__)
    parser.add_argument("root", metavar="output", type=Path, help="new folder")
    parser.add_argument("--num-train", type=int, default=2000, metavar="N", help="training images (default: 2000)")
    parser.add_argument("--num-val", type=int, default=400, metavar="N", help="evaluation images (default: 400)")
    parser.add_argument(
        "--image-size", type=int, default=128, metavar="N", help="side of an image in pixels (default: 128)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--max-objects", type=int, default=4, metavar="N", help="of an image (default: 4)")
    parser.add_argument(
        "--contrast", type=int, default=110, metavar="N", help="least one of an object and its ground (default: 110)"
    )
    args = parser.parse_args(argv)
    make_shapes(**vars(args))
