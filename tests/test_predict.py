"""What a detector finds in images and videos: the results beside pycocotools, the files, the pictures."""

from __future__ import annotations

import io
import json
import logging
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from asd_hf.commands import run
from asd_hf.data import Fault, make_shapes
from asd_hf.errors import UserError
from asd_hf.evaluation import STATS
from asd_hf.predict import COLOURS, draw_boxes, find_files, open_results, read_frames, save_picture
from asd_hf.predict.pictures import CROWDED, _font, place_labels
from tests.families import FAMILIES, OPEN_VOCABULARY
from tests.tiny_data import IDS, NAMES, jpeg, tiny_rows, write_coco, write_images

NOISE = np.random.default_rng(0).integers(0, 256, (8, 24, 32, 3), dtype=np.uint8)  # frames


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("ASD_HF_CACHE", str(tmp_path / "cache"))
    package = logging.getLogger("asd_hf")
    monkeypatch.setattr(package, "handlers", package.handlers[:])
    monkeypatch.setattr(package, "level", package.level)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A folder with a tiny Deformable DETR of cat, dog and owl."""
    return save(tmp_path_factory.mktemp("detector"), "deformable_detr", classes=("dog", "owl", "yak", "cat"))


def save(folder: Path, family: str, classes=tuple(NAMES)) -> Path:
    model, processor = FAMILIES[family](classes=classes, num_queries=9)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def predict(*arguments) -> int:
    return run("predict", [*map(str, arguments)])


def read(folder: Path) -> tuple[list[dict], dict]:
    return tuple(json.loads((folder / name).read_text()) for name in ("predictions.json", "images.json"))


def frames(root: Path, files: list[Path], **options) -> list:
    with ThreadPoolExecutor(2) as pool:
        return list(read_frames(find_files(files, root / "out"), lambda pixels: pixels[:, :4, :4], pool, 4, **options))


def by_image(rows: list[dict]) -> dict[int, list[dict]]:
    found: dict[int, list[dict]] = {}
    for row in rows:
        found.setdefault(row["image_id"], []).append(row)
    return found


# -- as `asd-hf evaluate` ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["deformable_detr", "detr", "yolos", "rt_detr", "grounding_dino"])
def test_predictions_are_those_that_evaluate_scores(family, tmp_path):
    known = NAMES if family in OPEN_VOCABULARY else ["owl", "yak", *NAMES[:2]]
    model = save(tmp_path / "model", family, classes=tuple(known))
    rows = tiny_rows(7)
    write_coco(tmp_path / "coco", "val", rows[::-1])  # the file has another order than the folder
    common = ["--model", str(model), "--batch-size", "3", "--class-map", "dog=dog"]
    scored = tmp_path / "scored.json"
    arguments = ["--data", str(tmp_path / "coco"), "--output", str(tmp_path / "m.json"), "--predictions", str(scored)]
    assert run("evaluate", [*common, *arguments]) == 0
    annotations = tmp_path / "coco/annotations/instances_val.json"
    assert predict(tmp_path / "coco/val", "--annotations", annotations, "--output", tmp_path / "out", *common) == 0
    found, images = read(tmp_path / "out")
    assert by_image(found) == by_image(json.loads(scored.read_text()))
    assert [image["id"] for image in images["images"]] == [row["image_id"] for row in rows[::-1]]
    assert images["categories"] == [{"id": i, "name": name} for i, name in zip(IDS, NAMES, strict=True)]


def test_ap_by_pycocotools_is_that_of_evaluate(tmp_path):
    make_shapes(tmp_path / "shapes", num_train=1, num_val=12, progress=False)
    arguments = ["--model", "shapes", "--data", str(tmp_path / "shapes"), "--output", str(tmp_path / "metrics.json")]
    assert run("evaluate", arguments) == 0
    annotations = tmp_path / "shapes/annotations/instances_val.json"
    out = tmp_path / "out"
    options = ["--model", "shapes", "--annotations", annotations, "--output", out]
    assert predict(tmp_path / "shapes/val", *options) == 0
    truth = COCO(str(annotations))
    judge = COCOeval(truth, truth.loadRes(str(out / "predictions.json")), "bbox")
    judge.evaluate(), judge.accumulate(), judge.summarize()
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert dict(zip(STATS, judge.stats, strict=True)) == {name: numbers[name] for name in STATS}
    assert judge.stats[0] > 0.3
    assert len(list((out / "pictures").iterdir())) == 12


def test_ids_without_annotations_and_what_the_table_counts(detector, tmp_path, capsys):
    write_images(tmp_path / "photos", tiny_rows(5))
    out = tmp_path / "out"
    assert predict(tmp_path / "photos", "--model", detector, "--output", out, "--threshold", 0.6) == 0
    found, images = read(out)
    assert [image["id"] for image in images["images"]] == [1, 2, 3, 4, 5]
    assert images["images"][0]["file_name"] == "000100.jpg" and len(list((out / "pictures").iterdir())) == 5
    assert images["categories"] == [{"id": i, "name": n} for i, n in enumerate(("dog", "owl", "yak", "cat"))]
    results = COCO(str(out / "images.json")).loadRes(str(out / "predictions.json"))
    assert len(results.anns) == len(found) == 5 * 36  # 9 queries, 4 classes
    counts = [row for row in found if row["score"] >= 0.6]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = {line[0]: line[1:] for line in lines if line and line[0] in ("dog", "owl", "yak", "cat")}
    assert counts and table == {
        name: [
            str(sum(row["category_id"] == i for row in counts)),
            str(len({row["image_id"] for row in counts if row["category_id"] == i})),
        ]
        for i, name in enumerate(("dog", "owl", "yak", "cat"))
        if any(row["category_id"] == i for row in counts)
    }


def test_a_threshold_that_no_box_reaches_is_said(detector, tmp_path, capsys):
    write_images(tmp_path / "photos", tiny_rows(2))
    out = tmp_path / "out"
    assert predict(tmp_path / "photos", "--model", detector, "--output", out, "--threshold", 1) == 0
    best = max(row["score"] for row in read(out)[0])
    assert f"no box scores 1 or more, the best scores {best:.2f}: see --threshold" in capsys.readouterr().out


def test_chosen_classes_keep_the_models_ids(detector, tmp_path):
    write_images(tmp_path / "photos", tiny_rows(3))
    for out, options in (("all", []), ("two", ["--classes", "Cat, dog"])):
        options = ["--model", detector, "--no-pictures", "--output", tmp_path / out, *options]
        assert predict(tmp_path / "photos", *options) == 0
    everything, two = (by_image(read(tmp_path / name)[0]) for name in ("all", "two"))
    assert two == {image: [row for row in rows if row["category_id"] in (0, 3)] for image, rows in everything.items()}
    assert not (tmp_path / "two/pictures").exists()


# -- files ---------------------------------------------------------------------------------------------------------


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(40, 30))


def test_files_come_in_natural_order_and_each_has_a_name_of_its_own(tmp_path):
    touch(tmp_path, "a/10.jpg", "a/9.JPG", "a/b2/x1.png", "a/b10/x1.png", "a/notes.txt", "b/9.jpg", "b/.hidden.jpg")
    touch(tmp_path, "c/X.jpg", "c/x.jpg/1.png")
    a, b = tmp_path / "a", tmp_path / "b"

    def names(*inputs: Path) -> list[str]:
        return [file.name for file in find_files(inputs, tmp_path / "out")]

    assert names(a) == ["9.JPG", "10.jpg", "b2/x1.png", "b10/x1.png"]
    assert names(a / "10.jpg") == ["10.jpg"]
    assert names(tmp_path / "c") == ["X.jpg", "x.jpg/1.png"]
    assert names(b, a / "9.JPG", a / "b2", b / "9.jpg") == ["b/9.jpg", "a/9.JPG", "a/b2/x1.png"]  # each once
    assert names(a / ".." / "b" / "9.jpg", b) == ["9.jpg"]
    assert names(a / "b2" / ".." / ".." / "b") == ["9.jpg"]
    touch(tmp_path, "out/pictures/9.jpg")
    assert names(tmp_path)[-1] == "c/x.jpg/1.png"  # not what an earlier run wrote
    (tmp_path / "link.jpg").symlink_to(b / "9.jpg")
    assert "link.jpg" in names(tmp_path)
    with pytest.raises(UserError, match="out lies in --output"):
        names(tmp_path / "out")


def test_images_of_an_annotation_file_are_found_by_the_end_of_their_paths(detector, tmp_path, capsys):
    rows = tiny_rows(4)
    write_coco(tmp_path / "coco", "val", rows)
    annotations = tmp_path / "coco/annotations/instances_val.json"
    touch(tmp_path, "coco/val/more.jpg")
    (tmp_path / f"coco/val/{rows[0]['image_id']:06d}.jpg").unlink()
    options = ["--model", detector, "--output", tmp_path / "out", "--annotations", annotations, "--no-pictures"]
    assert predict(tmp_path / "coco", *options) == 0
    _, images = read(tmp_path / "out")
    assert [image["id"] for image in images["images"]] == [row["image_id"] for row in rows[1:]]
    said = capsys.readouterr().err
    assert "1 of the images are not in" in said and "1 of the images in" in said
    write_images(tmp_path / "twice", rows[1:2])
    assert predict(tmp_path / "coco", tmp_path / "twice", *options) == 2
    assert "are both 000103.jpg" in capsys.readouterr().err


def test_broken_files_are_named_and_counted_and_the_others_predicted(detector, tmp_path, capsys):
    folder = write_images(tmp_path / "photos", tiny_rows(3))
    (folder / "a.jpg").write_bytes(jpeg(60, 50)[:300])
    (folder / "b.png").write_text("no image")
    Image.fromarray(np.full((9, 9), 70000, np.int32)).save(folder / "c.png")
    (folder / "d.gif").write_bytes(b"GIF89a")
    assert predict(folder, "--model", detector, "--output", tmp_path / "out") == 1
    said = capsys.readouterr()
    for name in ("a.jpg", "b.png", "c.png", "d.gif"):
        assert sum(str(folder / name) in line for line in said.err.splitlines()) == 1
    assert "4 files could not be read" in said.err and "3 images" in said.out
    _, images = read(tmp_path / "out")
    assert [image["id"] for image in images["images"]] == [1, 2, 3]


def test_turned_photographs_are_turned_unless_boxes_are_of_the_stored_pixels(detector, tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(NOISE[0]).resize((64, 48)).save(tmp_path / f"{orientation}.jpg", exif=exif)
    found = frames(tmp_path, [tmp_path])
    assert len(found) == 8
    for frame in found:
        upright = ImageOps.exif_transpose(Image.open(tmp_path / frame.name))
        assert np.array_equal(frame.pixels.permute(1, 2, 0), upright.convert("RGB"))
    images = [{"id": 7, "file_name": "6.jpg", "width": 64, "height": 48}]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "categories": [{"id": 1, "name": "cat"}]}))
    options = ["--model", detector, "--output", tmp_path / "out", "--annotations", tmp_path / "a.json"]
    assert predict(tmp_path / "6.jpg", *options) == 0
    assert read(tmp_path / "out")[1]["images"] == [
        {"id": 7, "file_name": "6.jpg", "width": 64, "height": 48},
    ]


def write_video(file: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV reads videos")
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for pixels in NOISE:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def test_frames_of_a_video(detector, tmp_path):
    write_video(tmp_path / "clip.mp4")
    import av

    with av.open(str(tmp_path / "clip.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    found = frames(tmp_path, [tmp_path / "clip.mp4"], every=3)
    assert [(frame.image_id, frame.number, frame.video) for frame in found] == [
        (i + 1, 3 * i, "clip.mp4") for i in range(3)
    ]
    assert all(np.array_equal(frame.pixels.permute(1, 2, 0), decoded[frame.number]) for frame in found)
    touch(tmp_path, "a.jpg", "z.jpg")
    out = tmp_path / "out"
    assert predict(tmp_path, "--model", detector, "--output", out, "--every", 4) == 0
    names = ["a.jpg", "clip.mp4/000000.jpg", "clip.mp4/000004.jpg", "z.jpg"]
    assert [image["file_name"] for image in read(out)[1]["images"]] == names
    assert sorted(p.relative_to(out / "pictures").as_posix() for p in out.rglob("*.jpg")) == names


def test_a_video_held_sideways_is_turned(tmp_path):
    write_video(tmp_path / "clip.mp4")
    data = (tmp_path / "clip.mp4").read_bytes()
    straight = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # shown turned clockwise
    at = data.rindex(straight)  # the track's, behind the whole film's
    (tmp_path / "turned.mp4").write_bytes(data[:at] + turned + data[at + len(turned) :])
    plain, turned = (frames(tmp_path, [tmp_path / name])[0].pixels for name in ("clip.mp4", "turned.mp4"))
    assert torch.equal(turned, plain.rot90(-1, (1, 2)))


def test_what_breaks_off_gives_what_is_whole(tmp_path):
    (tmp_path / "no.avi").write_text("no video at all")
    pytest.importorskip("av", reason="PyAV reads videos")
    (found,) = frames(tmp_path, [tmp_path / "no.avi"])
    assert isinstance(found, Fault) and str(tmp_path / "no.avi") in found.why
    first, *others = [Image.fromarray(pixels) for pixels in NOISE]
    first.save(tmp_path / "clip.gif", save_all=True, append_images=others)
    data = (tmp_path / "clip.gif").read_bytes()
    (tmp_path / "clip.gif").write_bytes(data[: len(data) // 2])
    *whole, fault = frames(tmp_path, [tmp_path / "clip.gif"])
    assert len(whole) >= 3 and not any(isinstance(frame, Fault) for frame in whole)
    assert isinstance(fault, Fault) and f"frame {len(whole)} of " in fault.why


def test_videos_need_an_extra(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"clip.mp4 is a video: .* pip install 'asd-hf\[video\]'"):
        find_files([tmp_path], tmp_path / "out")


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_frames_of_an_animation(suffix, tmp_path):
    file = tmp_path / f"clip{suffix}"
    first, *others = [Image.fromarray(pixels) for pixels in NOISE]
    first.save(file, save_all=True, append_images=others, **({"lossless": True} if suffix == ".webp" else {}))
    found = frames(tmp_path, [file], every=3)
    assert [frame.name for frame in found] == [f"clip{suffix}/{i:06d}.jpg" for i in (0, 3, 6)]
    with Image.open(file) as image:
        for frame in found:
            image.seek(frame.number)
            assert np.array_equal(frame.pixels.permute(1, 2, 0), image.convert("RGB"))
    first.save(file)
    (frame,) = frames(tmp_path, [file])
    assert frame.name == ("clip.gif/000000.jpg" if suffix == ".gif" else file.name)


def test_no_more_images_are_in_memory_than_are_asked_for(tmp_path):
    write_images(tmp_path / "photos", tiny_rows(30))
    prepared = []
    with ThreadPoolExecutor(2) as pool:
        files = find_files([tmp_path / "photos"], tmp_path / "out")
        stream = read_frames(files, lambda pixels: prepared.append(1) or pixels, pool, 4)
        for _ in range(10):
            next(stream)
    assert len(prepared) <= 14


def test_results_are_whole_or_not_there(tmp_path):
    (tmp_path / "predictions.json").write_text("of an earlier run")
    with pytest.raises(RuntimeError), open_results(tmp_path, [1], ["cat"]):
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.json"]
    assert (tmp_path / "predictions.json").read_text() == "of an earlier run"
    with open_results(tmp_path, [1], ["cat"]):
        pass
    assert read(tmp_path) == ([], {"images": [], "categories": [{"id": 1, "name": "cat"}]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "50"], "--threshold is 50: scores are between 0 and 1"),
        (["--every", "0"], "--every is 0: at least 1 is needed"),
        (["--batch-size", "0"], "--batch-size is 0: at least 1 is needed"),
        (["--device", "quantum"], "--device quantum: PyTorch sees no such device here, only cpu"),
        (["--device", "meta"], "--device meta: PyTorch sees no such device here, only cpu"),
        (["--classes", "catt"], "does not know 'catt': did you mean 'cat'?"),
        (["--class-map", "a=b"], "--class-map is for the classes of --annotations"),
        (["--annotations", "nowhere.json"], "nowhere.json cannot be read"),
        (["nowhere.jpg"], "nowhere.jpg does not exist"),
        (["setup.cfg"], "setup.cfg is no image or video by its name"),
    ],
)
def test_mistakes_are_one_line(options, message, detector, tmp_path, capsys):
    touch(tmp_path, "photos/a.jpg")
    assert predict(tmp_path / "photos", "--model", detector, "--output", tmp_path / "out", *options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_an_open_vocabulary_must_be_told(tmp_path, capsys):
    touch(tmp_path, "photos/a.jpg")
    model = save(tmp_path / "model", "grounding_dino")
    options = ["--model", model, "--output", tmp_path / "out"]
    assert predict(tmp_path / "photos", *options) == 2
    assert "say it with --classes or --annotations" in capsys.readouterr().err
    assert predict(tmp_path / "photos", *options, "--classes", "owl,cat") == 0
    assert read(tmp_path / "out")[1]["categories"] == [{"id": 0, "name": "owl"}, {"id": 1, "name": "cat"}]


# -- pictures ------------------------------------------------------------------------------------------------------


def test_boxes_stand_where_they_were_found_on_light_and_dark():
    row = np.array([[100.0, 120.0, 200.0, 80.0, 0.9, 0]])
    for ground in ("black", "white", "#777777"):
        picture = draw_boxes(Image.new("RGB", (640, 480), ground), row, ["cat"])
        assert picture.size == (640, 480)
        for place in ((100, 160), (300, 120), (100, 200), (300, 200)):
            assert picture.getpixel(place) == Image.new("RGB", (1, 1), COLOURS[0]).getpixel((0, 0))
        assert picture.getpixel((200, 160)) == Image.new("RGB", (1, 1), ground).getpixel((0, 0))
        beside = {picture.getpixel((x, 180)) for x in range(97, 104)}
        assert len(beside) >= 2 and (17, 17, 17) in beside  # a dark line beside a light one


def test_small_images_are_enlarged_with_their_boxes():
    picture = draw_boxes(Image.new("RGB", (64, 48)), np.array([[10.0, 10.0, 30.0, 20.0, 0.9, 1]]), ["cat", "dog"])
    assert picture.size == (448, 336)
    assert picture.getpixel((280, 140)) == Image.new("RGB", (1, 1), COLOURS[1]).getpixel((0, 0))


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 700), (20, 20)])
def test_anything_can_be_drawn(size):
    rows = np.array([[-50, -50, 9999, 9999, 1, 0], [5000, 5000, 10, 10, 0.5, 1], [0, 0, 0, 0, 0.1, 0]], np.float64)
    draw_boxes(Image.new("L", size), rows, ["a name that is longer than any picture is wide " * 9, "Ωмега"])
    draw_boxes(Image.new("RGB", size), rows[:0], [])


def test_labels_stay_inside_and_apart():
    generator, font, size = np.random.default_rng(0), _font(14), (400, 300)
    corners = generator.uniform(0, 0.8, (60, 2)) * size
    boxes = np.concatenate([corners, corners + generator.uniform(5, 90, (60, 2))], 1).astype(int)
    texts, places = place_labels([("traffic light", 0.5)] * 60, [tuple(box) for box in boxes], size, font)
    assert texts[0] == "traffic light 0.50" and "traffic light" in texts and "" in texts
    ground = ImageDraw.Draw(Image.new("RGB", size))
    covered = np.zeros(size[::-1], int)
    for text, (left, top, right, bottom) in zip(texts, places, strict=True):
        if text:
            assert min(left, top) >= 0 and right < size[0] and bottom < size[1]
            assert ground.textlength(text, font) <= right - left
            part = covered[top:bottom, left:right]
            assert (part > 0).mean() <= CROWDED
            part += 1
    assert isinstance(font, ImageFont.FreeTypeFont)


@pytest.mark.parametrize("suffix", [".jpg", ".PNG", ".webp", ".bmp"])
def test_pictures_keep_the_format_of_their_names(suffix, tmp_path):
    save_picture(Image.new("RGB", (9, 9), "red"), tmp_path / f"deep/er{suffix}")
    (file,) = (tmp_path / "deep").iterdir()
    with Image.open(io.BytesIO(file.read_bytes())) as image:
        assert file.name == f"er{suffix}" and image.format == {".jpg": "JPEG"}.get(suffix, suffix[1:].upper())
