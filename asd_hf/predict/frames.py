"""Images, folders of them and videos as one stream of frames."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import count, groupby, islice
from pathlib import Path, PurePath
from typing import Any

import torch
from PIL import Image, ImageSequence
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from ..data import Fault
from ..data.coco import read_images
from ..data.folder import SUFFIXES, list_files
from ..data.threads import ahead
from ..data.transforms import decode, orientation, upright
from ..errors import UserError

VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")
MOVING = (*VIDEOS, ".gif")  # more than one frame; one of the next may have more
PERHAPS_ANIMATED = (".webp", ".png")


@dataclass(frozen=True)
class ImageFile:
    """A file to look at. One with an `image_id` is of an annotation file, which says its size if it is not None."""

    path: Path
    name: str  # relative to the common folder of all, with slashes
    image_id: int | None = None
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Frame:
    """One picture. Its `name` is a relative path, no other's; that of a video's frame lies below the video's."""

    image_id: int
    name: str
    pixels: Tensor  # uint8 (3, height, width)
    view: Tensor  # uint8 (3, h, w), as the model is to see it
    video: str | None = None
    number: int | None = None  # in the video, from 0


def find_files(inputs: Sequence[Path], output: Path) -> list[ImageFile]:
    """Images and videos that were named, and those of folders and their subfolders in natural order, each once.

    Folders are read as `data.folder.list_files` reads them; what lies in `output` is left out.

    Raises:
        UserError: an input does not exist, is of no known kind or lies in `output`; nothing was found; or there are
            videos and PyAV is not installed.
    """
    suffixes, inside = (*SUFFIXES, *MOVING), output.resolve()
    found: dict[str, Path] = {}  # by absolute path
    folders = []
    for given in inputs:
        absolute = os.path.abspath(given)
        if given.resolve().is_relative_to(inside):
            raise UserError(f"{given} lies in --output {output}: name another folder for the output")
        if given.is_dir():
            try:
                names = [name for name, *_ in list_files(given, suffixes)]
            except OSError as error:
                raise UserError(f"the images of {given} cannot be listed: {error}") from error
            own = given.resolve()
            for name in sorted(names, key=natural_key):
                if not (own / name).is_relative_to(inside):
                    found.setdefault(os.path.join(absolute, name), given / name)
            folders.append(absolute)
        elif not given.exists():
            raise UserError(f"{given} does not exist")
        elif given.suffix.lower() not in suffixes:
            raise UserError(f"{given} is no image or video by its name: known are {', '.join(suffixes)}")
        else:
            found.setdefault(absolute, given)
            folders.append(os.path.dirname(absolute))
    if not found:
        where, kinds = ", ".join(map(str, inputs)), ", ".join(suffixes)
        raise UserError(f"there are no images in {where}: looked for {kinds}, in subfolders too")
    root = os.path.commonpath(folders)
    files = [ImageFile(path, PurePath(os.path.relpath(absolute, root)).as_posix()) for absolute, path in found.items()]
    if find_spec("av") is None:
        for file in files:
            if file.path.suffix.lower() in VIDEOS:
                raise UserError(f"{file.path} is a video: reading videos needs PyAV: pip install 'asd-hf[video]'")
    return files


def natural_key(name: str) -> tuple:
    """Sorts relative paths as people do: `b/2.jpg` before `b/10.jpg`, and a folder's files together."""
    parts = [re.split("([0-9]+)", part) for part in name.split("/")]
    return [[(t.casefold(), 0) if i % 2 == 0 else ("", int(t)) for i, t in enumerate(part)] for part in parts], name


def take_image_ids(
    files: Sequence[ImageFile], annotations: Path
) -> tuple[list[ImageFile], list[int], list[str], tuple[int, int]]:
    """Those of `files` that an annotation file lists, in its order and with its ids: found by the end of their paths.

    Returns:
        the files; ids and names of the categories; how many of `files` are not listed, and how many listed images
        are not among `files`.

    Raises:
        UserError: the annotation file is wrong, lists a name twice or none of `files`; or two of them are one image.
    """
    rows, category_ids, class_names = read_images(annotations)
    places: dict[str, int] = {}
    for place, row in enumerate(rows):
        if places.setdefault(row["file_name"], place) != place:
            raise UserError(f"{annotations}: two images have the file_name {row['file_name']!r}")
    taken: dict[int, ImageFile] = {}
    for file in files:
        parts = PurePath(os.path.abspath(file.path)).parts
        tails = ("/".join(parts[start:]) for start in range(1, len(parts)))
        place = next((places[tail] for tail in tails if tail in places), None)
        if place is None:
            continue
        if place in taken:
            raise UserError(
                f"{taken[place].path} and {file.path} are both {rows[place]['file_name']} of {annotations}"
            )
        taken[place] = replace(file, **{key: rows[place][key] for key in ("image_id", "height", "width")})
    if not taken:
        raise UserError(
            f"{annotations} lists none of the {len(files)} images, {files[0].path} the first: it names them as "
            f"{rows[0]['file_name']!r}"
        )
    counts = len(files) - len(taken), len(rows) - len(taken)
    return [taken[place] for place in sorted(taken)], category_ids, class_names, counts


def read_frames(
    files: Iterable[ImageFile], prepare: Callable[[Tensor], Tensor], pool: Executor, lookahead: int, every: int = 1
) -> Iterator[Frame | Fault]:
    """All frames in order, decoded by the threads of `pool`; in place of a file that cannot be read its fault.

    Files without an image id get running ones from 1, and photographs among them are turned as their EXIF data say.
    Those with one are read as COCO's boxes need them: as they are stored, and the first frame alone.

    Args:
        prepare: from a frame's pixels to what the model is to see.
        lookahead: how many images are in memory at most; one of a video.
        every: read each such frame of videos and animations, from the first.
    """
    ids = count(1)
    for moving, group in groupby(files, key=_is_moving):
        if moving:
            for file in group:
                yield from _read_moving(file, prepare, ids, every)
        else:
            numbered = (file if file.image_id is not None else (file, next(ids)) for file in group)
            yield from ahead(pool, partial(_read_still, prepare=prepare), numbered, lookahead)


def _is_moving(file: ImageFile) -> bool:
    suffix = file.path.suffix.lower()
    if file.image_id is not None or suffix not in (*MOVING, *PERHAPS_ANIMATED):
        return False
    if suffix not in PERHAPS_ANIMATED:
        return True
    try:
        with Image.open(file.path) as image:
            return getattr(image, "is_animated", False)
    except Exception:  # reading it will say what is wrong
        return False


def _read_still(file: ImageFile | tuple[ImageFile, int], prepare: Callable[[Tensor], Tensor]) -> Frame | Fault:
    """Of a file with an image id, or of one without and the id that it gets."""
    stored = isinstance(file, ImageFile)
    file, image_id = (file, file.image_id) if stored else file
    image = {"path": str(file.path), "bytes": None}
    row: dict[str, Any] = {"image": image, "image_id": image_id, "height": file.height, "width": file.width}
    try:
        pixels = decode(row)
        pixels = pixels if stored else upright(pixels, orientation(image))
    except UserError as error:
        return Fault(getattr(error, "kind", "broken image"), image_id, str(file.path), str(error))
    return Frame(image_id, file.name, pixels, prepare(pixels))


def _read_moving(
    file: ImageFile, prepare: Callable[[Tensor], Tensor], ids: Iterator[int], every: int
) -> Iterator[Frame | Fault]:
    frames = (_read_video if file.path.suffix.lower() in VIDEOS else _read_animation)(file.path, every)
    for number in count(0, every):
        try:
            pixels = next(frames, None)
            if pixels is None and number == 0:
                raise ValueError("it has no frames")
        except Exception as error:  # decoders of broken data raise whatever comes
            reason = getattr(error, "strerror", None) or error
            where = f"frame {number} of " if number else ""
            why = f"{where}{file.path} cannot be decoded, nor what follows: {reason}"
            yield Fault("broken image", None, str(file.path), why)
            return
        if pixels is None:
            return
        yield Frame(next(ids), f"{file.name}/{number:06d}.jpg", pixels, prepare(pixels), file.name, number)


def _read_animation(path: Path, every: int) -> Iterator[Tensor]:
    with Image.open(path) as file:
        for image in islice(ImageSequence.Iterator(file), 0, None, every):
            yield pil_to_tensor(image.convert("RGB"))


def _read_video(path: Path, every: int) -> Iterator[Tensor]:
    import av  # an extra, see `find_files`

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no pictures")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in islice(container.decode(stream), 0, None, every):
            pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
            yield pixels.rot90(frame.rotation // 90, (1, 2)) if frame.rotation else pixels
