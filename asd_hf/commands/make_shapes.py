from __future__ import annotations

import argparse
from pathlib import Path

from ..data import make_shapes


def main(argv: list[str]) -> None:
    """Writes the generated data set as a COCO folder."""
    parser = argparse.ArgumentParser(prog="asd-hf make-shapes", description=main.__doc__)
    parser.add_argument("output", type=Path, help="new folder")
    parser.add_argument("--num-train", type=int, default=2000, metavar="N", help="training images (default: 2000)")
    parser.add_argument("--num-val", type=int, default=400, metavar="N", help="evaluation images (default: 400)")
    parser.add_argument(
        "--image-size", type=int, default=128, metavar="N", help="side of an image in pixels (default: 128)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args(argv)
    make_shapes(args.output, args.num_train, args.num_val, args.image_size, args.seed)
