from __future__ import annotations

import argparse
from pathlib import Path
from pickle import UnpicklingError

import torch

from ..errors import UserError
from ..models import AdaMixerForObjectDetection, AdaMixerImageProcessor
from ..models.adamixer.convert_adamixer import config_of, convert_state_dict


def main(argv: list[str]) -> None:
    """Turns a checkpoint of the original AdaMixer, which is written for mmdetection, into one of this model."""
    parser = argparse.ArgumentParser(prog="asd-hf convert-adamixer", description=main.__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="FILE", help="the original, with a ResNet")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the model and processor")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="names of the classes, one a line; default: what the file has"
    )
    args = parser.parse_args(argv)
    checkpoint = _load(args.checkpoint)
    weights = checkpoint.get("state_dict", checkpoint)
    if not weights or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise UserError(f"--checkpoint: {args.checkpoint} holds no state_dict")
    try:
        state, report = convert_state_dict(weights)
        config = config_of(state)
    except UserError as error:
        raise UserError(f"--checkpoint: {args.checkpoint}: {error}") from error
    names = checkpoint.get("meta", {}).get("CLASSES")
    if args.classes is not None:
        names = args.classes.read_text().splitlines()
    if names is None or len(names) != config.num_labels:
        found = "no names of classes" if names is None else f"{len(names)} names of classes"
        raise UserError(f"{found} for a model of {config.num_labels}: give them with --classes FILE")
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    model = AdaMixerForObjectDetection(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise UserError(
            f"--checkpoint: {args.checkpoint}: {len(missing)} weights are missing, {len(unexpected)} have no place: "
            f"{(missing + unexpected)[0]} the first"
        )
    model.save_pretrained(args.output)
    AdaMixerImageProcessor().save_pretrained(args.output)
    left = [name for name, new in report.items() if not new]
    print(f"{len(report) - len(left)} tensors became {len(state)}, {len(left)} were left out")
    print("\n".join(f"  left out: {name}" for name in left) + "\n" * bool(left), end="")
    print(f"{args.output}: {sum(p.numel() for p in model.parameters()):,} parameters, {config.num_labels} classes")


def _load(file: Path) -> dict:
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        raise UserError(f"--checkpoint: {file} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"--checkpoint: {file} holds no state_dict")
    return checkpoint
