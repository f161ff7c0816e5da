from __future__ import annotations

import argparse
from pathlib import Path

from ..data import open_source, shard_dataset


def main(argv: list[str]) -> None:
    """Turns a data set into balanced Parquet shards in the Hub's layout; started again, it goes on."""
    parser = argparse.ArgumentParser(prog="asd-hf shard", description=main.__doc__)
    parser.add_argument("--data", required=True, metavar="SOURCE", help="as data.source of a configuration")
    parser.add_argument("--split", required=True, metavar="NAME", help="split to read, and its name in the shards")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the shards")
    parser.add_argument(
        "--num-shards", type=int, metavar="N", help="default: by rows; best a multiple of ranks x loader workers"
    )
    args = parser.parse_args(argv)
    shard_dataset(open_source(args.data, args.split), args.split, args.output, args.num_shards)
