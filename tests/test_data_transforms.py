from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from transformers import DeformableDetrImageProcessor

from asd_hf.data import DataConfig, RowTransform, build_transform, collate, resize_spec
from asd_hf.data.transforms import RandomSizeCrop, ResizeShortest
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
def test_boxes_follow_the_pixels(augmentation, resize):
    """A coloured rectangle is found again in the pixels, where the transformed box says it is."""
    config = DataConfig(augmentation=augmentation, resize=resize, fixed_size=[70, 90], **SMALL)
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
        found = sample["pixel_values"][1].numpy() > 127
        height_, width_ = found.shape
        ys, xs = np.nonzero(found)
        if not len(sample["labels"]["boxes"]):
            assert len(xs) <= 2 * max(found.shape)  # at most an edge of it was left by the crop
            continue
        cx, cy, bw, bh = (
            sample["labels"]["boxes"][0].double() * torch.tensor([width_, height_, width_, height_])
        ).tolist()
        if min(bw, bh) < 3:
            continue
        seen += 1
        box = np.array([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2])
        np.testing.assert_allclose(
            box, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], atol=1.5
        )  # a crop is enlarged
        cropped += abs(bw * bh / (height_ * width_) - w * h / (height * width)) > 0.02
        flipped += abs((cx / width_) - (x + w / 2) / width) > 0.05
    assert seen > 40
    assert (cropped > 8) == (augmentation == "detr")
    assert (flipped > 8) == (augmentation != "none")


def test_the_crop_is_the_one_of_detr():
    """Sizes of RandomSizeCrop and of the crop branch under the original's numbers."""
    transform = build_transform(DataConfig(), training=True)
    crop = transform.transforms[1].transforms[1].transforms
    assert crop[0].sizes == [400, 500, 600] and crop[0].max_size is None
    assert (crop[1].min_size, crop[1].max_size) == (384, 600)
    assert crop[2].sizes == list(range(480, 801, 32)) and crop[2].max_size == 1333
    torch.manual_seed(0)
    image = v2.functional.pil_to_tensor(Image.new("RGB", (700, 500)))
    sizes = [RandomSizeCrop(384, 600)(image).shape[-2:] for _ in range(200)]
    assert {(384 <= h <= 500) and (384 <= w <= 600) for h, w in sizes} == {True}
    assert max(w for _, w in sizes) > 590 and min(w for _, w in sizes) < 394 and max(h for h, _ in sizes) > 490
    assert RandomSizeCrop(384, 600)(image[:, :50, :60]).shape[-2:] == (50, 60)  # as far as the image reaches


def test_resize_draws_every_size():
    torch.manual_seed(0)
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    assert {ResizeShortest([10, 12, 14], None)(image).shape[-2] for _ in range(60)} == {10, 12, 14}


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
    assert torch.equal(sample["pixel_values"], v2.functional.pil_to_tensor(image.convert("RGB")))


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
        labels = batch["labels"][index]
        assert labels.keys() == sample["labels"].keys()
        for key, value in sample["labels"].items():
            assert torch.equal(labels[key], value) and labels[key].dtype == value.dtype


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"box_format": "xy"}, "data.box_format is 'xy': it must be one of xywh, xyxy"),
        ({"resize": "square"}, "data.resize is 'square'"),
        ({"augmentation": "mosaic"}, "data.augmentation is 'mosaic'"),
        ({"resize": "fixed"}, r"data.fixed_size is None: resize: fixed needs \[height, width\]"),
        ({"resize": "fixed", "fixed_size": [640]}, "data.fixed_size is"),
        ({"train_sizes": []}, "data.train_sizes"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer is 0"),
        ({"num_eval_images": 0}, "data.num_eval_images is 0"),
    ],
)
def test_a_wrong_configuration_is_named(values, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**values)
