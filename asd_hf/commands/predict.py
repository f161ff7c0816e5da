from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import numpy as np
from torchvision.transforms.v2.functional import to_pil_image

from ..classes import find_classes, short_list
from ..data import Fault
from ..data.threads import ahead, default_threads
from ..detectors.base import DetectorAdapter
from ..errors import UserError
from ..evaluation import TOP_K, Predictor
from ..loading import load_teacher, prompt_teacher
from ..predict import (
    IMAGES,
    MOVING,
    PREDICTIONS,
    Detections,
    Frame,
    ImageFile,
    choose_device,
    detect,
    draw_boxes,
    find_files,
    open_results,
    preprocessing,
    read_frames,
    save_picture,
    take_image_ids,
)
from ..progress import show_logs, tqdm
from ..registry import nearest
from ..stopping import advise
from .evaluate import class_pair

PICTURES = "pictures"


def main(argv: list[str]) -> int:
    """Draws what a detector finds in images and videos, and writes it as COCO results; exits with 1 if some of them
    could not be read."""
    parser = argparse.ArgumentParser(prog="asd-hf predict", description=main.__doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="images, folders of them, and videos")
    parser.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="a checkpoint with its processor")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/predict"),
        metavar="DIR",
        help=f"of {PREDICTIONS}, {IMAGES} and {PICTURES}/ (default: outputs/predict)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        metavar="T",
        help="least score of a box in pictures and in the table (default: 0.5); predictions.json has the best "
        f"{TOP_K} of each image, whatever their scores",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: the first accelerator)")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="read each N-th frame of videos (default: 1)"
    )
    parser.add_argument("--no-pictures", action="store_true", help="write the results alone")
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="a COCO file: the images that it lists, under its image ids and categories, read as asd-hf evaluate does",
    )
    classes.add_argument(
        "--classes",
        metavar="A,B",
        help="find these alone (default: all that the model knows); one of open vocabulary must be told",
    )
    parser.add_argument(
        "--class-map",
        action="append",
        default=[],
        type=class_pair,
        metavar="DATA=MODEL",
        help="what the model calls a class of --annotations, where the names differ; may be given several times",
    )
    args = parser.parse_intermixed_args(argv)
    for name, value in (("--batch-size", args.batch_size), ("--every", args.every)):
        if value < 1:
            raise UserError(f"{name} is {value}: at least 1 is needed")
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold is {args.threshold:g}: scores are between 0 and 1")
    if args.class_map and args.annotations is None:
        raise UserError("--class-map is for the classes of --annotations")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("predict runs as one process: start it without a launcher")
    show_logs(rank=0)
    advice = f"{PREDICTIONS} and {IMAGES} of {args.output} are as they were, {PICTURES} may be incomplete"
    with advise(lambda: advice):
        return predict(args)


def predict(args: argparse.Namespace) -> int:
    """Predicts as `args` says; returns the exit code."""
    device = choose_device(args.device)
    files = find_files(args.images, args.output)
    adapter = load_teacher(args.model, "--model")
    if args.annotations is not None:
        files, category_ids, class_names = _listed(files, args.annotations)
        prompt_teacher(adapter, class_names, dict(args.class_map))
    else:
        category_ids, class_names = _own_classes(adapter, args)
    predictor = Predictor(adapter, class_names, dict(args.class_map), device)
    adapter.model.to(device)
    if predictor.lacking:
        print(f"the model does not know {short_list(predictor.lacking)}", file=sys.stderr)

    threads = default_threads()
    prepare, faults, frames, start = preprocessing(adapter.processor), 0, 0, perf_counter()
    objects, images, best = Counter(), Counter(), 0.0  # by class index; the best score
    moving = any(file.path.suffix.lower() in MOVING for file in files)
    try:
        with (
            ThreadPoolExecutor(threads) as pool,
            open_results(args.output, category_ids, predictor.class_names) as results,
            tqdm(desc="predict", unit=" images", total=None if moving else len(files)) as bar,
        ):

            def readable() -> Iterator[Frame]:
                nonlocal faults
                for frame in read_frames(files, prepare, pool, 2 * threads, args.every):
                    if isinstance(frame, Fault):
                        faults += 1
                        tqdm.write(frame.why, file=sys.stderr)
                    else:
                        yield frame

            def draw(found: Detections) -> Detections:
                image, rows = to_pil_image(found.frame.pixels), _above(found, args.threshold)
                picture = draw_boxes(image, rows, predictor.class_names)
                save_picture(picture, args.output / PICTURES / found.frame.name)
                return found

            found = detect(predictor, readable(), args.batch_size)
            for one in found if args.no_pictures else ahead(pool, draw, found, 2 * threads):
                results.add(one)
                labels = _above(one, args.threshold)[:, 5].astype(int).tolist()
                objects.update(labels)
                images.update(set(labels))
                best = max(best, one.rows[:, 4].max(initial=0))
                frames += 1
                bar.update()
    except OSError as error:
        raise UserError(f"{args.output} cannot be written: {error.strerror or error}") from error
    seconds = perf_counter() - start
    rows = [(predictor.class_names[i], f"{count:,}", f"{images[i]:,}") for i, count in objects.most_common()]
    if rows:
        print(_table([("class", "objects", "images"), *rows]))
    else:
        print(f"no box scores {args.threshold:g} or more, the best scores {best:.2f}: see --threshold")
    written = f"{PREDICTIONS} and {IMAGES}" if args.no_pictures else f"{PREDICTIONS}, {IMAGES} and {PICTURES}"
    print(f"{frames:,} images, {frames / seconds:.1f} a second; {written} are in {args.output}")
    if faults:
        print(f"{faults:,} files could not be read to their end, see above", file=sys.stderr)
    return int(faults > 0)


def _listed(files: list[ImageFile], annotations: Path) -> tuple[list[ImageFile], list[int], list[str]]:
    """As `take_image_ids`; how many are left out on either side is said."""
    files, category_ids, class_names, (unlisted, missing) = take_image_ids(files, annotations)
    if unlisted:
        print(f"{unlisted} of the images are not in {annotations} and are left out", file=sys.stderr)
    if missing:
        print(f"{missing} of the images in {annotations} were not given", file=sys.stderr)
    return files, category_ids, class_names


def _own_classes(adapter: DetectorAdapter, args: argparse.Namespace) -> tuple[list[int], list[str] | None]:
    """The model's ids of the classes to find, and their names; None for all that it knows."""
    wanted = None if args.classes is None else [name.strip() for name in args.classes.split(",")]
    if adapter.open_vocabulary and wanted is None:
        raise UserError(f"{args.model} finds what it is told to: say it with --classes or --annotations")
    prompt_teacher(adapter, wanted)
    known = adapter.spec.class_names
    if wanted is None:
        return list(range(len(known))), None
    ids = find_classes(wanted, known)
    for name, place in zip(wanted, ids, strict=True):
        if place is None:
            raise UserError(f"--classes: {args.model} does not know {name!r}: {nearest(name, known)}")
    return ids, wanted


def _above(found: Detections, threshold: float) -> np.ndarray:
    return found.rows[found.rows[:, 4] >= threshold]


def _table(rows: list[tuple[str, ...]]) -> str:
    """The first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
