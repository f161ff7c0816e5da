from __future__ import annotations

import argparse
from pathlib import Path

from ..config import parse_overrides
from ..data import DataConfig, open_source, shard_dataset
from ..errors import UserError
from ..stopping import advise


def main(argv: list[str]) -> None:
    """Turns a data set into balanced Parquet shards in the Hub's layout; started again, it goes on."""
    parser = argparse.ArgumentParser(prog="asd-hf shard", description=main.__doc__)
    parser.add_argument("--data", required=True, metavar="SOURCE", help="as data.source of a configuration")
    parser.add_argument("--split", required=True, metavar="NAME", help="split to read, and its name in the shards")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the shards")
    parser.add_argument(
        "--num-shards", type=int, metavar="N", help="default: by rows; best a multiple of ranks x loader workers"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="data.key=value", help="of the data section: data.box_format=xywh or =xyxy"
    )
    args = parser.parse_args(argv)
    for item in args.overrides:  # nothing else concerns the rows as they are stored
        if not item.startswith("data.box_format="):
            raise UserError(f"{item!r}: only data.box_format=xywh or data.box_format=xyxy applies to shards")
    config = parse_overrides(DataConfig, {}, "data", args.overrides)
    source = open_source(args.data, args.split, config)
    with advise(lambda: "started again, the command goes on with the shard that it was at"):
        manifest = shard_dataset(source, args.split, args.output, args.num_shards)
    rows = sum(shard["rows"] for shard in manifest["shards"])
    print(f"{rows} images in {len(manifest['shards'])} shards: train on them with data.source={args.output}")
