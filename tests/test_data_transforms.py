from __future__ import annotations

import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.io import decode_jpeg
from torchvision.transforms.v2 import functional as F
from transformers import DeformableDetrImageProcessor
from transformers.image_transforms import get_size_with_aspect_ratio

from asd_hf.data import DataConfig, RowTransform, collate, resize_spec, teacher_view
from asd_hf.data.transforms import decode, draw_geometry, draw_window, seeded
from asd_hf.errors import UserError
from tests.tiny_data import jpeg, tiny_rows

SMALL = {"train_sizes": [64, 72, 80], "eval_size": 72, "max_size": 120}


def row(image: bytes, boxes, categories=None, crowd=None, image_id=7, size=(None, None)) -> dict:
    count = len(boxes)
    return {
        "image": {"bytes": image, "path": "some.jpg"},
        "image_id": image_id,
        "width": size[0],
        "height": size[1],
        "objects": {
            "bbox": boxes,
            "category": categories or [0] * count,
            "area": [w * h for _, _, w, h in boxes],
            "iscrowd": crowd or [0] * count,
        },
    }


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, kind)
    return buffer.getvalue()


def from_tiny(stored: dict) -> dict:
    return row(
        stored["jpeg"],
        stored["bbox"],
        stored["category"],
        stored["iscrowd"],
        stored["image_id"],
        (stored["width"], stored["height"]),
    )


@pytest.mark.parametrize(
    "config",
    [
        DataConfig(eval_size=72, max_size=100),
        DataConfig(eval_size=33, max_size=1333),
        DataConfig(eval_size=250, max_size=300),
        DataConfig(resize="fixed", fixed_size=[64, 96]),
    ],
)
@pytest.mark.parametrize("shape", [(64, 48), (47, 91), (91, 47), (72, 72), (300, 31), (133, 72)])
def test_evaluation_sees_what_the_image_processor_makes(config, shape):
    width, height = shape
    stored = row(
        jpeg(width, height), [[3.5, 2.25, 20.0, 17.5], [width - 9.0, 4.0, 12.0, 8.0], [5, 5, 9, 9]], [2, 0, 1]
    )
    stored["objects"]["iscrowd"] = [0, 0, 1]
    sample = RowTransform(config, training=False)(stored)
    processor = DeformableDetrImageProcessor(size=resize_spec(config), do_pad=False)
    objects = stored["objects"]
    annotations = [
        {"bbox": b, "category_id": c, "area": a, "iscrowd": k}
        for b, c, a, k in zip(*(objects[key] for key in ("bbox", "category", "area", "iscrowd")), strict=True)
    ]
    with Image.open(io.BytesIO(stored["image"]["bytes"])) as image:
        plain = processor(image.convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="pt")
        full = processor(
            image.convert("RGB"), annotations={"image_id": 7, "annotations": annotations}, return_tensors="pt"
        )
    assert sample["pixel_values"].dtype == torch.uint8
    assert torch.equal(sample["pixel_values"].float(), plain["pixel_values"][0].float())
    theirs = full["labels"][0]
    assert torch.equal(sample["labels"]["class_labels"], theirs["class_labels"])
    torch.testing.assert_close(sample["labels"]["boxes"], theirs["boxes"], rtol=0, atol=1e-6)
    assert sample["labels"]["orig_size"].tolist() == theirs["orig_size"].tolist() == [height, width]


def test_training_resizes_as_the_image_processor_too():
    config = DataConfig(augmentation="none", **SMALL)
    stored = row(jpeg(91, 47), [[3.5, 2.25, 20.0, 17.5]])
    sizes = set()
    for epoch in range(30):
        transform = RowTransform(config, training=True)
        transform.set_epoch(epoch)
        pixels = transform(stored)["pixel_values"]
        with Image.open(io.BytesIO(stored["image"]["bytes"])) as image:
            candidates = [
                DeformableDetrImageProcessor(size={"shortest_edge": s, "longest_edge": 120}, do_pad=False)(
                    image, do_rescale=False, do_normalize=False, return_tensors="pt"
                )["pixel_values"][0]
                for s in config.train_sizes
            ]
        sizes.add(tuple(pixels.shape))
        assert any(torch.equal(pixels.float(), other.float()) for other in candidates if other.shape == pixels.shape)
    assert (
        len(sizes) == 1
    )  # the cap of 120 decides for all three sizes of this wide image: 64 -> 62, 72 -> 62, 80 -> 62


@pytest.mark.parametrize("augmentation", ["detr", "flip", "none"])
@pytest.mark.parametrize("resize", ["multiscale", "fixed"])
@pytest.mark.parametrize("teacher_size", [None, 150, [110, 140]])
def test_boxes_follow_the_pixels(augmentation, resize, teacher_size):
    """A coloured rectangle is found again in the pixels of each view, where the transformed box says it is."""
    config = DataConfig(
        augmentation=augmentation, resize=resize, fixed_size=[70, 90], teacher_size=teacher_size, **SMALL
    )
    transform = RowTransform(config, training=True, seed=3)
    rng, seen, cropped, flipped = np.random.default_rng(0), 0, 0, 0
    for epoch in range(60):
        width, height = int(rng.integers(80, 200)), int(rng.integers(80, 200))
        w, h = int(rng.integers(20, width // 2)), int(rng.integers(20, height // 2))
        x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[y : y + h, x : x + w, 1] = 255
        transform.set_epoch(epoch)
        sample = transform(row(encode(pixels), [[x, y, w, h]], image_id=epoch))
        assert ("teacher_pixel_values" in sample) == (teacher_size is not None)
        for view in ("pixel_values", "teacher_pixel_values") if teacher_size else ("pixel_values",):
            found = sample[view][1].numpy() > 127
            height_, width_ = found.shape
            ys, xs = np.nonzero(found)
            if not len(sample["labels"]["boxes"]):
                assert not len(xs)  # the window is of whole pixels: outside it nothing is left
                continue
            cx, cy, bw, bh = (
                sample["labels"]["boxes"][0].double() * torch.tensor([width_, height_, width_, height_])
            ).tolist()
            if min(bw, bh) < 3:
                continue
            seen += 1
            box = np.array([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2])
            np.testing.assert_allclose(
                box, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], atol=1.01, err_msg=f"{view}, {epoch}"
            )
            cropped += abs(bw * bh / (height_ * width_) - w * h / (height * width)) > 0.02
            flipped += abs((cx / width_) - (x + w / 2) / width) > 0.05
    views = 1 + (teacher_size is not None)
    assert seen > 40 * views
    assert (cropped > 8 * views) == (augmentation == "detr")
    assert (flipped > 8 * views) == (augmentation != "none")


def three_steps(config: DataConfig, image: torch.Tensor, boxes: tv_tensors.BoundingBoxes):
    """DETR's augmentation as published, each step on the pixels: flip; half of the time resize and crop; resize."""
    if torch.rand(1) < 0.5:
        image, boxes = F.horizontal_flip(image), F.horizontal_flip(boxes)

    def resize(size, max_size):
        height, width = get_size_with_aspect_ratio(image.shape[-2:], size, max_size)
        return F.resize(image, [height, width]), F.resize(boxes, [height, width])

    if torch.multinomial(torch.tensor([0.5, 0.5]), 1):
        image, boxes = resize([400, 500, 600][int(torch.randint(3, ()))], None)
        places = []
        for side in image.shape[-2:]:
            length = int(torch.randint(min(384, side), min(600, side) + 1, ()))
            places.append((int(torch.randint(side - length + 1, ())), length))
        (top, height), (left, width) = places
        image, boxes = F.crop(image, top, left, height, width), F.crop(boxes, top, left, height, width)
    return resize(config.train_sizes[int(torch.randint(len(config.train_sizes), ()))], config.max_size)


@pytest.mark.parametrize("shape", [(427, 640), (640, 480), (150, 200), (1200, 700)])
def test_the_augmentation_is_the_one_of_detr(shape):
    """In one resize the same draws show the same part of the image, to the nearest pixel of the original."""
    height, width = shape
    ramp = np.stack(np.broadcast_arrays(np.arange(width)[None] / width, np.arange(height)[:, None] / height, 0.5), 2)
    stored = row(encode((255 * ramp).astype(np.uint8)), [[width * 0.2, height * 0.3, width * 0.4, height * 0.5]])
    config, cropped = DataConfig(), 0
    transform = RowTransform(config, training=True, seed=5)
    x, y, w, h = stored["objects"]["bbox"][0]
    for epoch in range(24):
        transform.set_epoch(epoch)
        sample = transform(stored)
        image = F.pil_to_tensor(Image.open(io.BytesIO(stored["image"]["bytes"])))
        boxes = tv_tensors.BoundingBoxes([[x, y, x + w, y + h]], format="XYXY", canvas_size=shape, dtype=torch.float64)
        with seeded(5, epoch, 7):
            pixels, boxes = three_steps(config, image, boxes)
        ours = sample["pixel_values"]
        side = ours.shape[-2:]
        # the window is rounded to pixels of the original, and what is as wide as high may turn
        assert abs(ours.shape[-2] / ours.shape[-1] - pixels.shape[-2] / pixels.shape[-1]) < 0.03
        assert abs(min(side) - min(pixels.shape[-2:])) <= 0.01 * min(side)
        theirs = F.resize(pixels, list(side))
        assert (ours[:2].float() - theirs[:2].float()).abs().mean() < 255 / min(shape) + 0.5
        cx, cy, bw, bh = sample["labels"]["boxes"][0].tolist()
        scale = torch.tensor([pixels.shape[-1], pixels.shape[-2]]).repeat(2)
        box = torch.tensor([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2], dtype=torch.float64)
        torch.testing.assert_close(box, (boxes / scale)[0].as_subclass(torch.Tensor), rtol=0, atol=2.5 / min(shape))
        cropped += tuple(sample["pixel_values"].shape[-2:]) not in {
            get_size_with_aspect_ratio(shape, size, config.max_size) for size in config.train_sizes
        }
    assert 4 < cropped < 20


def windows(config: DataConfig, height: int, width: int, count: int = 300) -> torch.Tensor:
    torch.manual_seed(0)
    drawn = torch.tensor([draw_window(config, height, width) for _ in range(count)])
    assert (drawn[:, :2] >= 0).all() and (drawn[:, 2:] >= 1).all()
    assert (drawn[:, 0] + drawn[:, 2] <= height).all() and (drawn[:, 1] + drawn[:, 3] <= width).all()
    return drawn


def test_the_window_of_detr():
    # 384 to 600 of 600 pixels at most, 384 to 400 of 400 at least
    drawn = windows(DataConfig(), 600, 600)
    for length in (drawn[:, 2], drawn[:, 3]):
        assert 384 <= length.min() < 400 and length.max() == 600
    assert drawn[:, 0].max() > 150 and drawn[:, 0].min() == 0  # wherever it fits
    # a training size of 400 at most halves all numbers: the window stays the same part of the image
    assert torch.equal(windows(DataConfig(train_sizes=[200, 400]), 600, 600)[:, 2:] < 384, drawn[:, 2:] < 384)
    assert windows(DataConfig(train_sizes=[200, 400]), 1200, 1200)[:, 2:].min() >= 767
    assert windows(DataConfig(resize="fixed", fixed_size=[800, 900]), 600, 600).tolist() == drawn.tolist()
    for height, width in ((1, 1), (1, 700), (900, 2), (3, 5)):
        windows(DataConfig(), height, width, 50)
        windows(DataConfig(train_sizes=[1]), height, width, 50)


def test_training_draws_every_size():
    config = DataConfig(train_sizes=[10, 12, 14], augmentation="none")
    torch.manual_seed(0)
    assert {draw_geometry(config, 20, 30).size for _ in range(60)} == {(10, 15), (12, 18), (14, 21)}


@pytest.mark.parametrize("augmentation", ["detr", "flip", "none"])
@pytest.mark.parametrize("resize", ["multiscale", "fixed"])
def test_the_students_view_does_not_depend_on_the_teachers(augmentation, resize):
    samples = []
    for teacher_size in (None, 40, 200, [90, 120]):
        config = DataConfig(
            augmentation=augmentation, resize=resize, fixed_size=[50, 60], teacher_size=teacher_size, **SMALL
        )
        transform = RowTransform(config, training=True, seed=2)
        transform.set_epoch(1)
        samples.append([transform(from_tiny(stored)) for stored in tiny_rows(12)])
    for alone, *others in zip(*samples, strict=True):
        for other in others:
            assert torch.equal(alone["pixel_values"], other["pixel_values"])
            torch.testing.assert_close(alone["labels"], other["labels"], rtol=0, atol=0)
        assert others[2]["teacher_pixel_values"].shape == (3, 90, 120)
        sides = others[1]["teacher_pixel_values"].shape[1:]
        assert min(sides) == 200 or max(sides) in (332, 333)  # the cap: 120 * 200 / 72


def test_the_teachers_view_is_made_from_the_original_pixels():
    """Far more than the student's resolution: at its own size the image comes through unchanged, but for the flip."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    stored, original = row(encode(noise), []), torch.from_numpy(noise).permute(2, 0, 1)
    for teacher_size in (90, [90, 120]):
        config = DataConfig(train_sizes=[20], eval_size=20, augmentation="flip", teacher_size=teacher_size)
        transform, flips = RowTransform(config, training=True), []
        for epoch in range(12):
            transform.set_epoch(epoch)
            sample = transform(stored)
            assert sample["pixel_values"].shape == (3, 20, 26)
            flips.append(torch.equal(sample["teacher_pixel_values"], original.flip(2)))
            assert flips[-1] or torch.equal(sample["teacher_pixel_values"], original)
        assert {True, False} == set(flips)
    # and of a crop each pixel, where the window is as large as the view
    config = DataConfig(train_sizes=[800], teacher_size=[1, 1])
    with seeded(0, 3, 7):
        geometry = draw_geometry(config, 90, 120)
    top, left, height, width = geometry.window
    assert (height, width) != (90, 120)
    transform = RowTransform(replace(config, teacher_size=[height, width]), training=True)
    transform.set_epoch(3)
    whole = original.flip(2) if geometry.flip else original
    view = transform(stored)["teacher_pixel_values"]
    assert torch.equal(view, whole[:, top : top + height, left : left + width])


@pytest.mark.parametrize("resize", ["multiscale", "fixed"])
@pytest.mark.parametrize("teacher_size", [140, 33, [60, 70]])
def test_the_teacher_trains_on_what_it_is_evaluated_on(resize, teacher_size):
    config = DataConfig(augmentation="none", resize=resize, fixed_size=[50, 60], teacher_size=teacher_size, **SMALL)
    training, evaluation = RowTransform(config, True), RowTransform(teacher_view(config), False)
    for stored in map(from_tiny, tiny_rows(8)):
        seen, scored = training(stored), evaluation(stored)
        assert torch.equal(seen["teacher_pixel_values"], scored["pixel_values"])
        torch.testing.assert_close(seen["labels"]["boxes"], scored["labels"]["boxes"], rtol=0, atol=0)
        assert "teacher_pixel_values" not in scored
        assert "teacher_pixel_values" not in RowTransform(config, False)(stored)


@pytest.mark.parametrize(
    ("values", "spec"),
    [
        ({"teacher_size": None}, {"shortest_edge": 320, "longest_edge": 533}),
        ({"teacher_size": 800}, {"shortest_edge": 800, "longest_edge": 1332}),  # 533 * 800 / 320 = 1332.5
        ({"teacher_size": 160, "max_size": 640}, {"shortest_edge": 160, "longest_edge": 320}),
        (
            {"teacher_size": 800, "resize": "fixed", "fixed_size": [64, 64]},
            {"shortest_edge": 800, "longest_edge": 1332},
        ),
        ({"teacher_size": [480, 640]}, {"height": 480, "width": 640}),
        ({"teacher_size": None, "resize": "fixed", "fixed_size": [64, 64]}, {"height": 64, "width": 64}),
    ],
)
def test_the_view_with_which_the_teacher_is_evaluated(values, spec):
    config = DataConfig(**{"source": "x", "eval_split": "y", "eval_size": 320, "max_size": 533} | values)
    view = teacher_view(config)
    assert resize_spec(view) == spec and (view.source, view.eval_split) == ("x", "y")
    assert teacher_view(view) is view  # nothing of the teacher's is left to be done
    assert (view is config) == (config.teacher_size is None)


def test_the_longer_side_of_the_teachers_view_is_capped_in_proportion():
    config = DataConfig(augmentation="none", train_sizes=[30], eval_size=40, max_size=60, teacher_size=80)
    sample = RowTransform(config, training=True)(row(jpeg(300, 31), []))
    assert max(sample["pixel_values"].shape) == 60 and max(sample["teacher_pixel_values"].shape) == 120


def test_images_without_annotations():
    transform = RowTransform(DataConfig(teacher_size=90, **SMALL), training=True, label_map=[1, 0, 2])
    bare = row(jpeg(64, 48), [[1, 2, 30, 30]])
    labelled = transform(bare)
    sample = transform({**bare, "objects": None})
    assert torch.equal(sample["pixel_values"], labelled["pixel_values"])
    assert torch.equal(sample["teacher_pixel_values"], labelled["teacher_pixel_values"])
    labels = sample["labels"]
    assert labels["boxes"].shape == (0, 4) and labels["boxes"].dtype == torch.float32
    assert labels["class_labels"].shape == (0,) and labels["class_labels"].dtype == torch.int64
    for one, known in ((sample, False), (labelled, True), (transform(row(jpeg(64, 48), [])), True)):
        assert one["labels"]["labelled"] is known
    with pytest.raises(UserError, match=r"^image 7 \(some.jpg\) of split 'dev' has no annotations: it cannot be eval"):
        RowTransform(DataConfig(eval_split="dev"), training=False)({**bare, "objects": None})


def test_labels_and_ground_truth():
    boxes = [
        [2.0, 3.0, 10.0, 12.0],
        [5.0, 5.0, 0.0, 7.0],
        [1.0, 1.0, 30.0, 30.0],
        [60.0, 40.0, 10.0, 20.0],
        [90, 1, 5, 5],
    ]
    stored = row(jpeg(64, 48), boxes, [2, 1, 0, 1, 2], [0, 0, 1, 0, 0])
    sample = RowTransform(DataConfig(**SMALL), training=False)(stored)
    labels = sample["labels"]
    assert labels["class_labels"].tolist() == [2, 1]  # no area, crowd and outside left out; one clipped
    corner = labels["boxes"][1] * torch.tensor([64, 48, 64, 48])
    torch.testing.assert_close(corner, torch.tensor([62.0, 44.0, 4.0, 8.0]), rtol=0, atol=1e-4)
    truth = labels["ground_truth"]
    assert truth.dtype == torch.float64 and truth.shape == (5, 7)
    assert truth[:, :4].tolist() == boxes and truth[:, 5].tolist() == [0, 0, 1, 0, 0]
    assert truth[:, 4].tolist() == [120, 0, 900, 200, 25] and truth[:, 6].tolist() == [2, 1, 0, 1, 2]
    assert labels["image_id"].dtype == torch.int64 and labels["image_id"].shape == ()
    assert "ground_truth" not in RowTransform(DataConfig(**SMALL), training=True)(stored)["labels"]

    mapped = RowTransform(DataConfig(**SMALL), training=False, label_map=[10, 30, 20])(stored)["labels"]
    assert mapped["class_labels"].tolist() == [20, 30] and mapped["ground_truth"][:, 6].tolist() == [
        20,
        30,
        10,
        30,
        20,
    ]


def test_an_image_without_objects():
    sample = RowTransform(DataConfig(**SMALL), training=False)(row(jpeg(64, 48), []))
    assert sample["labels"]["boxes"].shape == (0, 4) and sample["labels"]["ground_truth"].shape == (0, 7)
    assert sample["labels"]["class_labels"].dtype == torch.int64


def test_random_choices_depend_on_seed_epoch_and_image_alone():
    stored = [from_tiny(r) for r in tiny_rows(6)]

    def pixels(order, seed=1, epoch=2, noise=0):
        transform = RowTransform(DataConfig(**SMALL), training=True, seed=seed)
        transform.set_epoch(epoch)
        torch.manual_seed(noise)
        return {i: transform(stored[i])["pixel_values"] for i in order}

    first, again = pixels(range(6)), pixels([4, 2, 0, 5, 3, 1], noise=9)
    assert all(torch.equal(first[i], again[i]) for i in first)
    for other in (pixels(range(6), epoch=3), pixels(range(6), seed=2)):
        assert not all(torch.equal(first[i], other[i]) for i in first)


def test_the_global_generator_is_left_as_it_was():
    torch.manual_seed(5)
    RowTransform(DataConfig(**SMALL), training=True)(row(jpeg(64, 48), []))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1"])
def test_every_kind_of_8_bit_image(mode):
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    data = encode(image, "TIFF" if mode == "CMYK" else "PNG")
    sample = RowTransform(DataConfig(resize="fixed", fixed_size=[20, 30]), training=False)(row(data, []))
    assert torch.equal(sample["pixel_values"], F.pil_to_tensor(image.convert("RGB")))


def test_a_jpeg_has_the_pixels_that_pil_gives_or_its_error():
    rng = np.random.default_rng(0)
    for kind in range(24):
        width, height = rng.integers(1, 120, 2).tolist()
        options = {"progressive": kind % 2 == 0, "quality": 5 + 4 * kind, "optimize": kind % 3 == 0}
        options |= [{"subsampling": kind % 3}, {"keep_rgb": True}, {"restart_marker_blocks": 3}][kind // 8]
        noise = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((width, height)).save(file, "JPEG", **options)
        whole = file.getvalue()
        assert decode_jpeg(torch.frombuffer(bytearray(whole), dtype=torch.uint8)).shape == (3, height, width)
        damaged = bytearray(whole)
        damaged[int(rng.integers(len(whole) // 2, len(whole)))] ^= 16
        for data in (whole, whole[: int(rng.integers(len(whole) // 3, len(whole)))], bytes(damaged)):
            try:
                expected = F.pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
            except OSError as error:
                with pytest.raises(UserError, match=re.escape(f"image 7 (some.jpg) cannot be decoded: {error}")):
                    decode(row(data, []))
            else:
                assert torch.equal(decode(row(data, [])), expected)


def test_exif_orientation_is_not_applied():
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    sample = RowTransform(DataConfig(**SMALL), training=False)(row(buffer.getvalue(), []))
    assert sample["labels"]["orig_size"].tolist() == [20, 30]


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (row(jpeg(64, 48)[:200], []), r"image 7 \(some.jpg\) cannot be decoded"),
        (row(b"no image", []), r"image 7 \(some.jpg\) cannot be decoded"),
        (row(jpeg(64, 48), [], size=(48, 64)), r"image 7 \(some.jpg\) is 64x48 pixels but its annotation says 48x64"),
        (row(encode(np.zeros((8, 8), np.uint16)), []), "more than 8 bits a channel"),
        (
            {**row(b"", []), "image": {"bytes": None, "path": "/nowhere/x.jpg"}},
            r"image 7 \(/nowhere/x.jpg\) is missing",
        ),
    ],
)
def test_bad_images_are_named(stored, message):
    with pytest.raises(UserError, match=message) as error:
        RowTransform(DataConfig(**SMALL), training=False)(stored)
    assert "\n" not in str(error.value)


def test_a_batch_of_mixed_sizes():
    transform = RowTransform(DataConfig(eval_size=24, max_size=60), training=False)
    samples = [transform(from_tiny(r)) for r in tiny_rows(9)]
    batch = collate(samples)
    height = max(s["pixel_values"].shape[1] for s in samples)
    width = max(s["pixel_values"].shape[2] for s in samples)
    assert batch["pixel_values"].shape == (9, 3, height, width) and batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_mask"].shape == (9, height, width) and batch["pixel_mask"].dtype == torch.bool
    assert len({s["pixel_values"].shape for s in samples}) > 3
    for index, sample in enumerate(samples):
        _, h, w = sample["pixel_values"].shape
        assert torch.equal(batch["pixel_values"][index, :, :h, :w], sample["pixel_values"])
        assert batch["pixel_values"][index].sum() == sample["pixel_values"].sum()  # the padding is zero
        assert batch["pixel_mask"][index].sum() == h * w and batch["pixel_mask"][index, :h, :w].all()
        torch.testing.assert_close(batch["labels"][index], sample["labels"], rtol=0, atol=0)


def test_a_batch_with_two_views():
    """Each view is padded by itself; the labels are those of both."""
    transform = RowTransform(DataConfig(teacher_size=130, **SMALL), training=True)
    rows = [from_tiny(r) for r in tiny_rows(6)]
    rows[2]["objects"] = None
    samples = [transform(stored) for stored in rows]
    batch = collate(samples)
    for view, mask in (("pixel_values", "pixel_mask"), ("teacher_pixel_values", "teacher_pixel_mask")):
        shapes = [sample[view].shape[1:] for sample in samples]
        height, width = (max(sides) for sides in zip(*shapes, strict=True))
        assert batch[view].shape == (6, 3, height, width) and batch[view].dtype == torch.uint8
        assert batch[mask].shape == (6, height, width) and batch[mask].dtype == torch.bool
        for index, (h, w) in enumerate(shapes):
            assert torch.equal(batch[view][index, :, :h, :w], samples[index][view])
            assert batch[view][index].sum() == samples[index][view].sum()
            assert batch[mask][index].sum() == h * w and batch[mask][index, :h, :w].all()
    assert batch["pixel_mask"].shape != batch["teacher_pixel_mask"].shape
    assert [labels["labelled"] for labels in batch["labels"]] == [True, True, False, True, True, True]
    assert {type(labels["labelled"]) for labels in batch["labels"]} == {bool}
    assert "teacher_pixel_values" not in collate([{k: s[k] for k in ("pixel_values", "labels")} for s in samples])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"box_format": "xy"}, "data.box_format is 'xy': it must be one of xywh, xyxy"),
        ({"resize": "square"}, "data.resize is 'square'"),
        ({"augmentation": "mosaic"}, "data.augmentation is 'mosaic'"),
        ({"resize": "fixed"}, r"data.fixed_size is None: resize: fixed needs \[height, width\]"),
        ({"resize": "fixed", "fixed_size": [640]}, "data.fixed_size is"),
        ({"train_sizes": []}, "data.train_sizes"),
        ({"teacher_size": 0}, "data.teacher_size is 0: it must be the shorter side in pixels or"),
        ({"teacher_size": [640]}, r"data.teacher_size is \[640\]: it must be"),
        ({"teacher_size": []}, r"data.teacher_size is \[\]: it must be"),
        ({"teacher_size": [640, -1]}, r"data.teacher_size is \[640, -1\]: it must be"),
        ({"train_split": None}, "data.train_split is null: without a split to train on data.unlabelled must be set"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer is 0"),
        ({"num_eval_images": 0}, "data.num_eval_images is 0"),
    ],
)
def test_a_wrong_configuration_is_named(values, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**values)
