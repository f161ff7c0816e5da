from __future__ import annotations

import contextlib
import io
import json
import time
from pathlib import Path
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import DeformableDetrImageProcessor, DetrImageProcessor
from transformers.image_transforms import center_to_corners_format

from asd_hf.errors import UserError
from asd_hf.evaluation import STATS, CocoEvaluator, CocoMetric, format_table, milliseconds_per_image, postprocess
from asd_hf.evaluation import coco as coco_module
from asd_hf.evaluation.coco import ImageResult

COCO_TINY = Path(__file__).parents[1].parent / "shared/data/coco_tiny"
BAR = 1e-9


def random_image(seed: int, classes: int, detections: int) -> tuple[np.ndarray, np.ndarray]:
    """(K, 6) predictions and (G, 7) ground truth with crowds, score ties, false alarms and duplicates."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 12))  # 0: an image without objects
    wh = rng.uniform(4, 220, (count, 2)) * rng.choice([0.1, 1], (count, 1))
    boxes = np.concatenate([rng.uniform(0, 400, (count, 2)), wh], 1)
    labels = rng.integers(0, classes - 2, count)  # the last two classes never occur in the ground truth
    crowd = rng.random(count) < 0.15
    area = wh.prod(1) * rng.uniform(0.4, 1, count)  # of a mask: less than the box's
    truth = np.column_stack([boxes, area, crowd, labels])
    rows = np.column_stack(
        [rng.uniform(0, 400, (detections, 2)), rng.uniform(4, 220, (detections, 2)), rng.random(detections)]
    )
    rows = np.column_stack([rows, rng.integers(0, classes - 1, detections)])  # one class is never predicted
    hits = rng.integers(0, max(count, 1), detections) if count else np.zeros(0, int)
    keep = len(hits) * 2 // 3
    rows[:keep, :4] = boxes[hits[:keep]] + rng.normal(0, 4, (keep, 4)) if count else rows[:keep, :4]
    rows[:keep, 5] = labels[hits[:keep]]
    rows[:, 4] = rows[:, 4].round(1)  # ties
    rows[:, 2:4] = rows[:, 2:4].clip(1)
    return rows.astype(np.float32), truth


def fill(evaluator: CocoEvaluator, ids: list[int], images: dict[int, tuple], batch: int = 4) -> None:
    for start in range(0, len(ids), batch):
        part = ids[start : start + batch]
        rows, truth = zip(*(images[i] for i in part), strict=True)
        sizes = torch.tensor([[480, 640]] * len(part))
        evaluator.add(torch.tensor(part), torch.from_numpy(np.stack(rows)), truth, sizes)


def pycocotools_numbers(annotations: dict, results: list[dict]) -> tuple[dict[str, float], dict[int, float]]:
    """The twelve numbers and each category's AP, by pycocotools itself."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = annotations
        truth.createIndex()
        found = truth.loadRes(results) if results else COCO()  # `loadRes` takes no empty list
        judge = COCOeval(truth, found, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    per_class = {}
    for index, category in enumerate(judge.params.catIds):
        precision = judge.eval["precision"][:, :, index, 0, -1]
        per_class[category] = precision[precision > -1].mean() if (precision > -1).any() else -1.0
    return dict(zip(STATS, judge.stats, strict=True)), per_class


def annotation_file(images: dict[int, tuple], category_ids: list[int]) -> dict:
    annotations = []
    for image_id, (_, truth) in images.items():
        for x, y, w, h, area, crowd, label in truth.tolist():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[int(label)],
                    "bbox": [x, y, w, h],
                    "area": area,
                    "iscrowd": int(crowd),
                }
            )
    return {
        "images": [{"id": i, "height": 480, "width": 640} for i in images],
        "annotations": annotations,
        "categories": [{"id": c, "name": f"class {c}"} for c in category_ids],
    }


@pytest.mark.parametrize("detections", [30, 160])
def test_numbers_are_those_of_pycocotools(detections):
    category_ids = [3, 5, 8, 13, 21, 34, 55]
    ids = [int(i) for i in np.random.default_rng(1).permutation(10_000)[:40] + 1]
    images = {i: random_image(i, 7, detections) for i in ids}
    evaluator = CocoEvaluator([f"class {c}" for c in category_ids], category_ids)
    fill(evaluator, ids, images)
    found = evaluator.compute()
    results = evaluator.predictions()
    assert len(results) == 40 * detections
    expected, per_class = pycocotools_numbers(annotation_file(images, category_ids), results)

    assert 0.05 < expected["AP"] < 0.9 and all(value > 0 for value in expected.values())
    assert [found[name] for name in STATS] == [expected[name] for name in STATS]  # to the last bit
    assert set(found) == {*STATS, "per_class"}
    assert found["per_class"] == {f"class {c}": ap for c, ap in per_class.items()}
    assert found["per_class"]["class 55"] == found["per_class"]["class 34"] == -1  # absent classes
    assert all(type(value) is float for value in found["per_class"].values())


# Few places, sizes and scores, so that nearly everything ties, IoUs lie on the thresholds and areas on the borders of
# small and large; beside them what is tiny, huge, or no round number.
COARSE = st.sampled_from([0.0, 1.0, 8.0, 16.0, 24.0, 32.0, 96.0])
SIDES = COARSE | st.sampled_from([1e-6, 1e-3, 1e5, 1e6]) | st.floats(0, 200, width=32)
BOXES = st.tuples(COARSE | st.floats(-50, 300, width=32), COARSE | st.floats(-50, 300, width=32), SIDES, SIDES)
AREAS = st.sampled_from([0.0, 1e-9, 32**2 - 0.5, 32**2, 32**2 + 1e-9, 96**2, 96**2 + 1e-9, 1e10, 1e12])
SCORES = st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1, width=32)
IDS = st.integers(-(2**62), 2**62) | st.sampled_from([0, 1, 2, 10, 2**31, 2**53, 2**53 + 1])
STRETCHES = st.sampled_from([0.5, 0.75, 0.95, 1.0, 2.0])


@st.composite
def hard_images(draw) -> tuple[dict[int, tuple], int]:
    """Images by id, and the number of classes: crowds, images and classes without objects or without predictions, more
    than 100 predictions of one class, boxes without area."""
    classes = draw(st.integers(1, 5))
    labels = st.integers(0, classes - 1)
    images = {}
    for image_id in draw(st.lists(IDS, min_size=1, max_size=5, unique=True)):
        truth = []
        for box in draw(st.lists(BOXES, max_size=6)):
            area = draw(st.just(box[2] * box[3]) | AREAS)
            truth.append([*box, area, draw(st.sampled_from([0, 0, 0, 1])), draw(labels)])
        rows = [[*box, draw(SCORES), draw(labels)] for box in draw(st.lists(BOXES, max_size=6))]
        for *box, _, _, label in truth:
            for stretch in draw(st.lists(STRETCHES, max_size=3)):  # near an object, often of its class
                rows.append([*box[:2], box[2] * stretch, box[3], draw(SCORES), draw(st.just(label) | labels)])
        if rows and draw(st.integers(0, 7)) == 0:
            scores, label = draw(st.lists(SCORES, min_size=1, max_size=5)), rows[0][5]
            rows = [[*rows[i % len(rows)][:4], scores[i % len(scores)], label] for i in range(130)]
        images[image_id] = (
            np.array(rows, dtype=np.float32).astype(float).reshape(-1, 6),
            np.array(truth, dtype=float).reshape(-1, 7),
        )
    return images, classes


def test_any_input_scores_as_with_pycocotools_to_the_last_bit():
    aps, most = [], 0

    @settings(max_examples=120, deadline=None, derandomize=True, database=None)
    @given(hard_images())
    def check(drawn):
        nonlocal most
        images, classes = drawn
        results = [
            {"image_id": image_id, "category_id": int(label), "bbox": box, "score": confidence}
            for image_id, (rows, _) in images.items()
            for *box, confidence, label in rows.tolist()
        ]
        expected, per_class = pycocotools_numbers(annotation_file(images, list(range(classes))), results)
        found = coco_module.score({i: ImageResult(*image, (480, 640)) for i, image in images.items()}, classes)
        assert found == (expected, list(per_class.values()))
        aps.append(found[0]["AP"])
        most = max([most, *(np.bincount(rows[:, 5].astype(int), minlength=1).max() for rows, _ in images.values())])

    check()
    assert most > 100 and sum(0.05 < ap < 0.95 for ap in aps) > 30


def test_data_sets_for_pycocotools_are_what_it_makes_itself():
    images = {i: ImageResult(*random_image(i, 7, 30), (480, 640)) for i in (9, 2, 5)}
    truth, found = coco_module.coco_datasets(images, 7)
    expected = annotation_file({i: images[i][:2] for i in sorted(images)}, list(range(7)))
    assert truth["annotations"] == expected["annotations"] and len(truth["annotations"]) > 10
    results = [{key: row[key] for key in ("image_id", "category_id", "bbox", "score")} for row in found["annotations"]]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        loaded = coco.loadRes(results).dataset["annotations"]
    assert found["annotations"] == [{key: row[key] for key in row if key != "segmentation"} for row in loaded]
    assert [image["id"] for image in found["images"]] == [2, 5, 9] and found["categories"] == truth["categories"]


def test_predictions_are_unrounded_float32_values():
    rows = torch.tensor([[[0.1, 0.2, 0.3, 0.7, 1 / 3, 1.0]]])
    evaluator = CocoEvaluator(["a", "b"], [10, 20])
    evaluator.add(torch.tensor([7]), rows, [np.zeros((0, 7))], torch.tensor([[4, 5]]))
    rows.zero_()  # what was given is copied
    evaluator.gather()
    assert CocoEvaluator(["a", "b"]).category_ids == [1, 2]
    (result,) = evaluator.predictions()
    assert (result["image_id"], result["category_id"]) == (7, 20)
    given = torch.tensor([0.1, 0.2, 0.3, 0.7, 1 / 3]).double().tolist()
    assert [*result["bbox"], result["score"]] == given
    json.dumps(result)


def test_nothing_found_and_nothing_there():
    evaluator = CocoEvaluator(["a"])
    truth = [np.array([[1, 1, 50, 50, 2500, 0, 0.0]]), np.zeros((0, 7))]
    evaluator.add(torch.tensor([1, 2]), torch.zeros(2, 0, 6), truth, torch.tensor([[9, 9]] * 2))
    found = evaluator.compute()
    assert found["AP"] == found["AR100"] == found["APm"] == 0
    assert found["APs"] == found["APl"] == -1
    assert evaluator.predictions() == []

    evaluator = CocoEvaluator(["a"])
    rows = torch.rand(1, 3, 6) * torch.tensor([9, 9, 9, 9, 1, 0])
    evaluator.add(torch.tensor([1]), rows, [np.zeros((0, 7))], torch.tensor([[9, 9]]))
    found = evaluator.compute()
    assert found.pop("per_class") == {"a": -1} and set(found.values()) == {-1}


def test_bad_input_is_one_clear_line():
    evaluator = CocoEvaluator(["a", "b"])
    sizes, empty = torch.tensor([[9, 9]] * 2), [np.zeros((0, 7))] * 2
    rows = torch.rand(2, 3, 6)
    rows[1, 2, 4] = float("nan")
    with pytest.raises(UserError, match="image 42: .*diverged"):
        evaluator.add(torch.tensor([41, 42]), rows, empty, sizes)
    rows = torch.rand(2, 3, 6)
    rows[0, 0, 5] = 2
    with pytest.raises(UserError, match="class index 2 .* 2 classes"):
        evaluator.add(torch.tensor([41, 42]), rows, empty, sizes)
    with pytest.raises(UserError, match="class index 5 .* 2 classes"):
        evaluator.add(torch.tensor([41, 42]), torch.rand(2, 3, 6), [np.full((1, 7), 5.0), empty[0]], sizes)
    with pytest.raises(UserError, match="no image"):
        CocoEvaluator(["a"]).compute()
    for truth, width in ((np.ones((1, 7)), 9), (empty[0], 8)):
        evaluator = CocoEvaluator(["a", "b"])
        evaluator.add(torch.tensor([41]), torch.rand(1, 3, 6), empty[:1], sizes[:1])
        evaluator.add(torch.tensor([41]), torch.rand(1, 3, 6), [truth], torch.tensor([[9, width]]))
        with pytest.raises(UserError, match="image id 41 names two different images"):
            evaluator.compute()


def coco_tiny_images() -> tuple[dict, dict[int, tuple], list[int], list[str]]:
    """The real annotations of coco_tiny, with noisy copies of the ground truth as predictions."""
    annotations = json.loads((COCO_TINY / "annotations/instances_val2017.json").read_text())
    category_ids = sorted(category["id"] for category in annotations["categories"])
    names = {category["id"]: category["name"] for category in annotations["categories"]}
    by_image = {image["id"]: [] for image in annotations["images"]}
    for a in annotations["annotations"]:
        label = category_ids.index(a["category_id"])
        by_image[a["image_id"]].append([*a["bbox"], a["area"], a["iscrowd"], label])
    rng = np.random.default_rng(0)
    images = {}
    for image_id, rows in by_image.items():
        truth = np.array(rows, dtype=float).reshape(-1, 7)
        guess = np.zeros((100, 6))
        if len(truth):
            chosen = truth[rng.integers(0, len(truth), 100)]
            guess = np.column_stack([chosen[:, :4] * rng.normal(1, 0.12, (100, 4)), rng.random(100), chosen[:, 6]])
            wrong = rng.random(100) < 0.3
            guess[wrong, 5] = rng.integers(0, len(category_ids), wrong.sum())
        images[image_id] = guess.astype(np.float32), truth
    return annotations, images, category_ids, [names[c] for c in category_ids]


@pytest.mark.skipif(not COCO_TINY.exists(), reason="needs real COCO annotations")
def test_real_crowds():
    annotations, images, category_ids, names = coco_tiny_images()
    assert sum(a["iscrowd"] for a in annotations["annotations"]) == 11
    evaluator = CocoEvaluator(names, category_ids)
    fill(evaluator, list(images), images)
    found = evaluator.compute()
    expected, per_class = pycocotools_numbers(annotations, evaluator.predictions())
    assert [found[name] for name in STATS] == [expected[name] for name in STATS]
    assert [*found["per_class"].values()] == [per_class[c] for c in category_ids]
    assert 0.05 < found["AP"] < 0.9


def on_rank(rank: int, folder: str, answers) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images = {i: random_image(i, 7, 30) for i in range(1, 22)}
    predictions, references = metric_inputs(images)
    evaluator = CocoEvaluator([str(c) for c in range(7)])
    fill(evaluator, [*images, 1][rank::2], images)  # 21 images on two ranks: one comes again, as samplers do it
    numbers, again = evaluator.compute(), evaluator.compute()
    kept = evaluator.num_images, len(evaluator.images), len(evaluator._added)
    two_images = CocoEvaluator([str(c) for c in range(7)])
    fill(two_images, [1], {1: images[1 + rank]})  # one id, another image on each rank
    with pytest.raises(UserError, match="image id 1 names two different images"):
        two_images.compute()
    metric = CocoMetric(cache_dir=folder, num_process=2, process_id=rank, experiment_id="two")
    metric.add_batch(predictions=predictions[rank::2], references=references[rank::2])
    answers[rank] = numbers, again, kept, evaluator.predictions(), metric.compute()
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    images = {i: random_image(i, 7, 30) for i in range(1, 22)}
    evaluator = CocoEvaluator([str(c) for c in range(7)])
    fill(evaluator, list(images), images)
    expected = evaluator.compute()
    assert evaluator.num_images == 21 and len(evaluator.predictions()) == 21 * 30
    with mp.Manager() as manager:
        answers = manager.dict()
        mp.spawn(on_rank, (str(tmp_path), answers), nprocs=2)
        answers = dict(answers)
    for rank in range(2):
        numbers, again, kept, predictions, from_metric = answers[rank]
        assert numbers == again == expected
        assert kept == (21, 21 if rank == 0 else 0, 0)
        assert predictions == (evaluator.predictions() if rank == 0 else [])
        assert from_metric == ({name: expected[name] for name in STATS} if rank == 0 else None)


def test_memory_is_the_rows_alone():
    evaluator = CocoEvaluator(["a"] * 5)
    for image_id in range(4):
        logits = torch.randn(1, 900, 5)  # 4,500 candidates
        rows = postprocess(logits, torch.rand(1, 900, 4), torch.tensor([[480, 640]]), "sigmoid")
        evaluator.add(torch.tensor([image_id]), rows, [np.zeros((3, 7))], torch.tensor([[480, 640]]))
    evaluator.gather()
    for result in evaluator.images.values():
        for array, size in ((result.predictions, 100 * 6 * 8), (result.ground_truth, 3 * 7 * 8)):
            owner = array if array.base is None else array.base
            assert owner.nbytes == size


def metric_inputs(images: dict[int, tuple]) -> tuple[list[dict], list[dict]]:
    predictions, references = [], []
    for image_id, (rows, truth) in images.items():
        boxes = {"boxes": rows[:, :4], "scores": torch.from_numpy(rows[:, 4]), "labels": rows[:, 5].astype(int)}
        predictions.append({"image_id": image_id, **boxes})
        boxes = {"boxes": truth[:, :4].tolist(), "labels": truth[:, 6].astype(int)}
        boxes |= {"area": truth[:, 4], "iscrowd": truth[:, 5].astype(int)}
        references.append({"image_id": image_id, **boxes})
    return predictions, references


def test_evaluate_metric_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    images = {i: random_image(i, 7, 30) for i in range(1, 13)}
    images[12] = images[12][0] * np.float32([1, 1, 1, 1, 1, 0]), np.zeros((0, 7))  # the last one shows class 0 alone
    evaluator = CocoEvaluator([str(c) for c in range(7)])
    fill(evaluator, list(images), images)
    expected = {name: value for name, value in evaluator.compute().items() if name in STATS}
    predictions, references = metric_inputs(images)

    metric = CocoMetric(cache_dir=str(tmp_path))
    for start in range(0, 12, 5):
        part = slice(start, start + 5)
        metric.add_batch(predictions=predictions[part], references=references[part])
    metric.add_batch(predictions=predictions[:2], references=references[:2])  # come twice, count once
    assert metric.compute() == pytest.approx(expected, abs=BAR)

    loaded = evaluate.load(coco_module.__file__, cache_dir=str(tmp_path))
    assert loaded.compute(predictions=predictions, references=references) == pytest.approx(expected, abs=BAR)

    with pytest.raises(ValueError, match="prediction of image 1 beside reference 2"):
        CocoMetric(cache_dir=str(tmp_path)).compute(predictions=predictions[:1], references=references[1:2])


@pytest.mark.parametrize(("queries", "classes"), [(50, 7), (300, 91), (10, 3)])
def test_postprocess_is_transformers_for_sigmoid_heads(queries, classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, queries, classes, generator=generator)
    boxes = torch.rand(3, queries, 4, generator=generator)
    sizes = torch.tensor([[480, 640], [333, 500], [640, 427]])
    expected = DeformableDetrImageProcessor().post_process_object_detection(
        SimpleNamespace(logits=logits, pred_boxes=boxes), threshold=0, target_sizes=sizes, top_k=100
    )
    rows = postprocess(logits, boxes, sizes, "sigmoid")
    assert rows.shape == (3, min(100, queries * classes), 6) and rows.dtype == torch.float32
    for row, image in zip(rows, expected, strict=True):
        torch.testing.assert_close(row[:, 4], image["scores"])
        assert torch.equal(row[:, 5].long(), image["labels"])
        corners = torch.cat([row[:, :2], row[:, :2] + row[:, 2:4]], 1)
        torch.testing.assert_close(corners, image["boxes"], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("top_k", [100, 5])
def test_postprocess_is_transformers_for_softmax_heads(top_k):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 30, 6, generator=generator)  # five classes and "no object"
    boxes = torch.rand(2, 30, 4, generator=generator)
    sizes = torch.tensor([[480, 640], [640, 427]])
    expected = DetrImageProcessor().post_process_object_detection(
        SimpleNamespace(logits=logits, pred_boxes=boxes), threshold=0, target_sizes=sizes
    )
    rows = postprocess(logits, boxes, sizes, "softmax", top_k)
    assert rows.shape == (2, min(top_k, 30), 6) and rows[..., 5].max() <= 4
    for row, image in zip(rows, expected, strict=True):
        scores, order = image["scores"].sort(descending=True)
        order = order[:top_k]
        torch.testing.assert_close(row[:, 4], scores[:top_k])
        assert torch.equal(row[:, 5].long(), image["labels"][order])
        corners = torch.cat([row[:, :2], row[:, :2] + row[:, 2:4]], 1)
        torch.testing.assert_close(corners, image["boxes"][order], atol=1e-3, rtol=1e-5)


def test_perfect_answers_score_one():
    """Boxes that the data pipeline made relative come back to the pixels of the file."""
    sizes = torch.tensor([[480, 640], [333, 500]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4]], [[0.25, 0.5, 0.5, 0.25]]])
    logits = torch.full((2, 1, 3), -9.0)
    logits[:, 0, 1] = 9
    absolute = center_to_corners_format(boxes[:, 0]) * sizes.flip(1).repeat(1, 2)
    absolute[:, 2:] -= absolute[:, :2]
    truth = [np.array([[*box, box[2] * box[3], 0, 1]]) for box in absolute.double().tolist()]
    evaluator = CocoEvaluator(["a", "b", "c"])
    evaluator.add(torch.tensor([1, 2]), postprocess(logits, boxes, sizes, "sigmoid"), truth, sizes)
    assert evaluator.compute()["AP"] == pytest.approx(1)


def test_protocol_knows_the_split():
    def protocol(ids, images, **changes):
        evaluator = CocoEvaluator([str(c) for c in range(7)])
        fill(evaluator, ids, images)
        evaluator.gather()
        terms = {"resolution": {"shortest_edge": 800}, "top_k": 100, "source": "coco", "split": "val"}
        return evaluator.protocol(**terms | changes)

    images = {i: random_image(i, 7, 30) for i in range(1, 9)}
    first = protocol(list(images), images)
    assert first["num_images"] == 8 and first["score_threshold"] == 0 and first["resolution"] == {"shortest_edge": 800}
    assert first["backend"].startswith("hotcoco ")
    assert json.loads(json.dumps(first)) == first
    assert protocol(list(images)[::-1], images) == first  # order does not matter
    assert protocol(list(images)[1:], images)["fingerprint"] != first["fingerprint"]
    images[3] = images[3][0], np.concatenate([images[3][1], np.ones((1, 7))])
    assert protocol(list(images), images)["fingerprint"] != first["fingerprint"]


def test_table():
    numbers = dict.fromkeys(STATS, 0.4567)
    lines = format_table(
        {
            "teacher": {"parameters": 40_123_456, **numbers, "ms_per_image": 123.44},
            "student (EMA)": {"parameters": 1_300_000, **numbers, "APs": -1.0},
        }
    ).splitlines()
    assert len({len(line) for line in lines}) == 1
    header = ["model", "params", "(M)", "AP", "AP50", "AP75", "APs", "APm", "APl", "ms/image"]
    assert [line.split() for line in lines] == [
        header,
        ["teacher", "40.1", *["45.7"] * 6, "123.4"],
        ["student", "(EMA)", "1.3", *["45.7"] * 3, "-", *["45.7"] * 2, "-"],
    ]


def test_latency_is_the_median_of_one_image():
    calls = []

    class Adapter:
        model = torch.nn.Linear(1, 1)

        def __call__(self, pixel_values, pixel_mask):
            assert not self.model.training and not torch.is_grad_enabled()
            calls.append(pixel_values.shape)
            time.sleep({6: 0.5}.get(len(calls), 0.2 if len(calls) <= 4 else 0.02))  # four to warm up, an outlier

    milliseconds = milliseconds_per_image(
        Adapter(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.ones(2, 8, 8), repeats=3, warmup=4
    )
    assert 20 <= milliseconds < 150
    assert len(calls) == 7 and set(calls) == {(1, 3, 8, 8)}
    assert Adapter.model.training
