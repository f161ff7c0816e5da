from __future__ import annotations

import argparse
from pathlib import Path

from ..demo import build_app, launch
from ..errors import UserError
from ..progress import show_logs
from ..stopping import advise


def main(argv: list[str]) -> None:
    """Shows in a browser what a model finds in an image, and its teacher beside it."""
    parser = argparse.ArgumentParser(prog="asd-hf demo", description=main.__doc__)
    parser.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="a checkpoint with its processor")
    parser.add_argument("--teacher", metavar="DIR_OR_HUB_ID", help="another one, to be shown beside it")
    parser.add_argument("--examples", type=Path, metavar="DIR", help="a folder of images to choose from")
    parser.add_argument("--port", type=int, metavar="N", help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also under a public address, through Gradio's servers")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: the first accelerator)")
    args = parser.parse_args(argv)
    if args.port is not None and not 0 < args.port < 1 << 16:
        raise UserError(f"--port is {args.port}: ports are from 1 to 65535")
    show_logs(rank=0)
    with advise(lambda: "the page is no longer served"):
        launch(build_app(args.model, args.teacher, args.examples, args.device), args.port, args.share)
