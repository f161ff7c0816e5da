"""What every adapter must do, whatever its family. Each family's own traps are tested in its own file."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MODEL_FOR_OBJECT_DETECTION_MAPPING, MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING

from asd_hf.detectors import ADAPTERS, get_adapter
from asd_hf.evaluation import evaluate_detector
from asd_hf.fast_criterion import use_fast_criterion
from tests import tiny
from tests.families import FAMILIES, OPEN_VOCABULARY, STUDENTS

FULL = ((96, 96),)  # height, width: no padding, so that every family sees the same frame
WITHOUT_ADAPTER = {
    # RT-DETR for pages, whose queries also have a reading order: Transformers refuses to train it.
    *("pp_doclayout_v2", "pp_doclayout_v3", "pp_doclayout_v4"),
    # A map of where text is: no queries, no classes, no boxes.
    *("pp_ocrv5_mobile_det", "pp_ocrv5_server_det", "pp_ocrv6_medium_det", "pp_ocrv6_small_det"),
    # A box for every patch of CLIP: no queries and no decoder.
    *("owlvit", "owlv2"),
    # A DETR that is told its classes, for teachers alone, like Grounding DINO: not written yet.
    "omdet-turbo",
}


def adapter_of(name, **options):
    adapter = get_adapter(*FAMILIES[name](**options))
    if adapter.open_vocabulary:
        adapter.prompt(options.get("classes", tiny.CLASSES))
    return adapter


@pytest.fixture(params=FAMILIES)
def adapter(request):
    return adapter_of(request.param)


@pytest.fixture(params=STUDENTS)
def student(request):
    return adapter_of(request.param)


def ask(adapter, batch, labels=False):
    return adapter(batch["pixel_values"], batch["pixel_mask"], batch["labels"] if labels else None)


def ask_transformers(adapter, batch, **inputs):
    """The model itself on what the adapter gives it."""
    pixels, mask = adapter.prepare(batch["pixel_values"], batch["pixel_mask"])
    if adapter.spec.family != "yolos":
        inputs["pixel_mask"] = mask
    return adapter.model(pixel_values=pixels, **inputs)


def decoder_layers(adapter):
    return adapter.model.get_submodule(
        "vit.encoder.layer" if adapter.spec.family == "yolos" else "model.decoder.layers"
    )


def losses_of(adapter, batch):
    """Transformers' own losses in training mode, with batch norm as in evaluation: images do not see each other."""
    adapter.model.train()
    for module in adapter.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    torch.manual_seed(0)
    return ask(adapter, batch, labels=True)


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device, or copy a list of numbers to it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name() in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::equal",
            "aten::lift_fresh",  # torch.tensor(...), and a list as index
        )
        return function(*args, **(kwargs or {}))


def test_every_family_of_transformers_has_its_adapter():
    mappings = MODEL_FOR_OBJECT_DETECTION_MAPPING, MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING
    theirs = {config.model_type for mapping in mappings for config in mapping}
    assert theirs > WITHOUT_ADAPTER and set(ADAPTERS) == theirs - WITHOUT_ADAPTER
    assert {FAMILIES[name]()[0].config.model_type for name in FAMILIES} == set(ADAPTERS)


def test_spec_describes_the_model(adapter):
    spec = adapter.spec
    assert spec.class_names == tiny.CLASSES and spec.family == adapter.model.config.model_type
    output = ask(adapter, tiny.batch(2, sizes=((128, 128),)))
    columns = len(tiny.CLASSES) + (spec.activation == "softmax")
    assert output.logits.shape == (spec.num_layers, 2, spec.num_queries, columns) == (spec.num_layers, 2, 12, columns)
    assert output.boxes.shape == (spec.num_layers, 2, 12, 4)
    assert output.queries.shape == (spec.num_layers, 2, 12, spec.hidden_size)
    assert output.features and len(output.features) == len(spec.strides)
    assert tuple(round(128 / f.shape[-1]) for f in output.features) == spec.strides == tuple(sorted(spec.strides))
    assert (output.decode is not None) == ("decode" in spec.capabilities) and "features" in spec.capabilities
    assert (output.proposals is not None) == ("proposals" in spec.capabilities)
    assert output.losses is None


@pytest.mark.parametrize("name", STUDENTS)
def test_last_layer_equals_transformers(name):
    adapter = adapter_of(name)
    batch = tiny.batch(2, sizes=FULL)
    own, output = ask_transformers(adapter, batch), ask(adapter, batch)
    torch.testing.assert_close(output.logits[-1], own.logits, rtol=0, atol=0)
    torch.testing.assert_close(output.boxes[-1], own.pred_boxes, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["yolos", "rt_detr"])  # they see padding
def test_boxes_of_full_images_are_the_models_own_whatever_the_size(name):
    """Exactly: 1312 times 1 / 1312 is not 1 in fp32."""
    adapter = adapter_of(name)
    batch = tiny.batch(1, sizes=((32, 1312),))
    own = ask_transformers(adapter, batch).pred_boxes
    torch.testing.assert_close(ask(adapter, batch).boxes[-1], own, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in STUDENTS if name != "yolos"])  # Transformers' YOLOS gives one layer
def test_every_layer_equals_those_that_transformers_computes_its_loss_of(name):
    adapter = adapter_of(name)
    batch, seen = tiny.batch(2, sizes=FULL), {}
    output = ask(adapter, batch)
    if name in ("d_fine", "deimv2"):
        adapter.model.model.decoder.training = True  # in evaluation they compute one layer only
    adapter.model.config.auxiliary_loss = True

    def tap(logits, labels, device, boxes, config, outputs_class, outputs_coord, *_, **__):
        seen["logits"], seen["boxes"] = (outputs_class, logits), (outputs_coord, boxes)
        return logits.sum(), {}, None

    adapter.model.loss_function = tap
    ask_transformers(adapter, batch, labels=batch["labels"])
    num_layers = output.logits.shape[0]
    for key in ("logits", "boxes"):
        layers, last = seen[key]
        layers = layers if layers.shape[1] == 2 else layers.transpose(0, 1)  # B is 2, L is 3
        assert layers.shape[1] == 2 and num_layers == 3
        # The loss takes the last layer from elsewhere: in DETR it is normalised once more.
        layers = torch.cat([layers[-num_layers:-1], last[None]])
        torch.testing.assert_close(getattr(output, key), layers, rtol=0, atol=0)


def test_the_model_in_training_mode_shows_the_same_queries(student):
    """No denoising queries and no groups: they are for Transformers' own loss alone."""
    batch = tiny.batch(2, sizes=FULL)
    expected = ask(student, batch)
    for training in (True, False):
        for module in student.model.modules():  # dropout and batch norm stay as they are
            module.training = training and not isinstance(module, nn.BatchNorm2d | nn.Dropout)
        output = ask(student, batch, labels=student.own_loss)
        assert output.logits.shape == expected.logits.shape
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.boxes, expected.boxes, rtol=1e-4, atol=1e-4)
        assert (output.losses is not None) == student.own_loss


def test_a_box_is_evaluated_where_the_model_sees_it(adapter):
    """Images of unequal sizes in one batch. Ground truth stands where the raw model has its best box of each class,
    by arithmetic that knows only the family's frame: evaluated through the whole pipeline, the AP is 1."""
    batch = tiny.batch(4)
    output = ask(adapter, batch)
    for label in batch["labels"]:
        label["ground_truth"] = torch.zeros(0, 7, dtype=torch.float64)
    pixels, mask = adapter.prepare(batch["pixel_values"], batch["pixel_mask"])
    if adapter.open_vocabulary:
        boxes, logits = output.boxes[-1], output.logits[-1]
        assert not adapter.sees_padding
    else:
        own = ask_transformers(adapter, batch)
        boxes, logits = own.pred_boxes, own.logits
    if adapter.spec.activation == "softmax":
        scores = logits.softmax(-1)[..., :-1]
        best = scores.argmax(-1, keepdim=True)
        scores = torch.zeros_like(scores).scatter(-1, best, scores.gather(-1, best))
    else:
        scores = logits.sigmoid()
    placed = 0
    for column in range(len(tiny.CLASSES)):
        image, query = np.unravel_index(scores[..., column].argmax(), scores.shape[:2])
        if not scores[image, query, column]:
            continue  # no query has this class as its best
        height, width = tiny.SIZES[image]
        frame = mask.shape[1:] if adapter.sees_padding else (height, width)
        cx, cy, w, h = (boxes[image, query].double() * torch.tensor([frame[1], frame[0]] * 2)).tolist()
        x, y, w, h = (2 * v for v in (cx - w / 2, cy - h / 2, w, h))  # the files are twice as large
        truth = torch.tensor([[x, y, w, h, w * h, 0, column]], dtype=torch.float64)
        label = batch["labels"][image]
        label["ground_truth"] = torch.cat([label["ground_truth"], truth])
        placed += 1
    numbers, _ = evaluate_detector(adapter, [batch], tiny.CLASSES, progress=False)
    assert placed and numbers["AP"] == pytest.approx(1)


def test_decode_repeats_the_models_own_answer(adapter):
    if "decode" not in adapter.spec.capabilities:
        pytest.skip("the family has no decoder that can be asked")
    output = ask(adapter, tiny.batch(4))
    again = output.decode(*output.decode.own)
    for key in ("logits", "boxes", "queries"):
        torch.testing.assert_close(getattr(again, key), getattr(output, key), rtol=1e-5, atol=1e-5)
    fewer = output.decode(*(None if t is None else t[:, :4] for t in output.decode.own))
    assert fewer.logits.shape[2] == 4 and fewer.logits.isfinite().all()


def test_nothing_stays_on_the_model(adapter):
    modules = list(adapter.model.modules())

    def state():
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in modules]
        return (
            hooks,
            [sorted(k for k in vars(m) if not k.startswith("_")) for m in modules],
            dict(vars(adapter.model.config)),
        )

    ask(adapter, tiny.batch(1))  # caches of constants may grow once
    before = state()
    output = ask(adapter, tiny.batch(2), labels=adapter.own_loss)
    if output.decode is not None:
        output.decode(*output.decode.own)
    assert state() == before

    def fail(*_):
        raise InterruptedError

    handle = decoder_layers(adapter)[-1].register_forward_pre_hook(fail)
    before = state()
    with pytest.raises(InterruptedError):
        ask(adapter, tiny.batch(2), labels=adapter.own_loss)
    assert state() == before
    if output.decode is not None:
        with pytest.raises(InterruptedError):
            output.decode(*output.decode.own)
        assert state() == before
    handle.remove()


def test_predictions_are_fp32_under_autocast(adapter):
    batch = tiny.batch(2, sizes=FULL)
    exact = ask(adapter, batch)
    with torch.autocast("cpu", torch.bfloat16):
        output = ask(adapter, batch)
    assert output.logits.dtype == output.boxes.dtype == torch.float32
    if adapter.spec.family not in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2"):  # these choose other proposals
        assert (output.boxes[0] - exact.boxes[0]).abs().median() < 0.02


@pytest.mark.parametrize("fast", [False, True])
def test_own_losses_are_transformers(student, fast):
    """The sum is the loss of the model itself, denoising and groups included, and so is the gradient of every part."""
    if not student.own_loss:
        pytest.skip("trained by DetectionCriterion")
    batch = tiny.batch(2, sizes=FULL)
    student.fast_loss = fast
    if fast:
        use_fast_criterion(student.model)
    output = losses_of(student, batch)
    if fast:
        del student.model._loss_function
    student.model.config.auxiliary_loss = True
    torch.manual_seed(0)
    expected = ask_transformers(student, batch, labels=batch["labels"]).loss
    total = sum(output.losses.values())
    torch.testing.assert_close(total, expected)
    assert all(loss.isfinite() and loss.dim() == 0 for loss in output.losses.values()) and len(output.losses) < 20
    trained = {name: p for name, p in student.model.named_parameters() if p.requires_grad}
    ours, theirs = (torch.autograd.grad(loss, trained.values(), allow_unused=True) for loss in (total, expected))
    assert sum(gradient is not None and bool(gradient.any()) for gradient in theirs) > 0.9 * len(trained)
    largest = max(reference.abs().max().item() for reference in theirs if reference is not None)
    for name, gradient, reference in zip(trained, ours, theirs, strict=True):
        if reference is None:
            assert gradient is None or not gradient.any(), name
        else:  # some gradients are zero but for rounding: a softmax does not see the bias of its keys
            tolerance = 1e-4 * reference.abs().max().item() + 1e-6 * largest
            torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=tolerance, msg=name)


def test_the_host_waits_for_nothing_but_the_models_own(student):
    batch = tiny.batch(2, sizes=FULL)
    for label in batch["labels"]:
        label["labelled"] = True
    for training in (False, student.own_loss):
        student.model.train(training)
        student.model.config.auxiliary_loss = training
        with Waits() as ours:
            ask(student, batch, labels=training)
        with Waits() as own:
            ask_transformers(student, batch, **({"labels": batch["labels"]} if training else {}))
        assert ours.count <= own.count


@pytest.mark.parametrize("fast", [False, True])
def test_own_losses_leave_unlabelled_images_out(student, fast):
    """With confident heads: at the initial ones the background costs next to nothing."""
    if not student.own_loss:
        pytest.skip("trained by DetectionCriterion")
    student.fast_loss = fast
    if fast:
        use_fast_criterion(student.model)
    with torch.no_grad():
        for head in student.class_heads:
            if isinstance(head, nn.Linear):
                head.bias.zero_()
    batch = tiny.batch(2, sizes=FULL, boxes=(3, 0))
    for label, flag in zip(batch["labels"], (True, False), strict=True):
        label["labelled"] = flag
    first = losses_of(student, batch).losses
    batch["pixel_values"][1] = 255 - batch["pixel_values"][1]
    second = losses_of(student, batch).losses
    for name, loss in first.items():
        torch.testing.assert_close(loss, second[name], msg=name)
    batch["labels"][0] |= {
        "labelled": False,
        "boxes": torch.zeros(0, 4),
        "class_labels": torch.zeros(0).long(),
    }
    nothing = losses_of(student, batch)
    assert sum(nothing.losses.values()) == 0
    (nothing.logits.sum() + sum(nothing.losses.values())).backward()


def test_own_losses_of_images_without_objects(student):
    if not student.own_loss:
        pytest.skip("trained by DetectionCriterion")
    total = sum(losses_of(student, tiny.batch(2, boxes=(0,))).losses.values())
    total.backward()
    assert total.isfinite() and total > 0


def test_own_losses_know_the_padding(student):
    """Boxes of the labels are brought into the frame of the model: of a perfect answer the box loss is 0."""
    if not student.own_loss:
        pytest.skip("trained by DetectionCriterion")
    batch = tiny.batch(4, boxes=(1,))
    student.model.eval()
    output = ask(student, batch)
    for image, label in enumerate(batch["labels"]):
        label["boxes"] = output.boxes[-1, image, :1].detach()
        label["class_labels"] = output.logits[-1, image, 0].argmax()[None]
    own = ask(student, batch, labels=True).losses
    label_loss = {name: loss for name, loss in own.items() if "bbox" in name or "giou" in name}
    for label in batch["labels"]:
        label["boxes"] = (label["boxes"] + 0.3).clamp(max=1)
    moved = ask(student, batch, labels=True).losses
    assert label_loss and all(loss < moved[name] for name, loss in label_loss.items() if name.count("_") == 1)


def test_new_classes_keep_the_weights_of_known_ones(student):
    batch = tiny.batch(2, sizes=FULL)
    old = ask(student, batch)
    names, rows = ("zebra", "pizza", "cat", "kite", "dog", "traffic light", "bus"), [None, 4, 0, 3, 1, 2, None]
    two_stage_choice = student.spec.family in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2", "lw_detr", "rf_detr")
    student.replace_classes(names, rows)
    new = ask(student, batch)
    assert student.spec.class_names == names == tuple(student.model.config.id2label.values())
    assert new.logits.shape[-1] == len(names) + (student.spec.activation == "softmax")
    if not two_stage_choice:  # a fresh class may choose other proposals
        columns = [1, 2, 3, 4, 5]
        torch.testing.assert_close(new.logits[..., columns], old.logits[..., [rows[c] for c in columns]])
        torch.testing.assert_close(new.boxes, old.boxes)


def test_saved_and_loaded_it_answers_the_same(student, tmp_path):
    student.replace_classes(("pizza", "bus"), [4, None])
    student.model.save_pretrained(tmp_path)
    loaded, report = type(student.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    again = get_adapter(loaded.eval(), student.processor)
    batch = tiny.batch(2)
    torch.testing.assert_close(ask(again, batch).logits, ask(student, batch).logits, rtol=0, atol=0)
    assert again.spec == student.spec


def test_gradient_reaches_the_student_through_every_output(student):
    """Of each layer's output alone: to the backbone and its own decoder layer, and to no later one."""
    student.model.train().requires_grad_(True)
    with torch.no_grad():
        for parameter in student.model.parameters():
            if not parameter.any():  # through zeros nothing passes
                parameter.normal_(0, 0.1)
    output = ask(student, tiny.batch(2), labels=student.own_loss)
    layers = decoder_layers(student)[-student.spec.num_layers :]
    parts = {"backbone": student.backbone} | dict(enumerate(layers))
    parameters = [(part, p) for part, module in parts.items() for p in module.parameters()]

    def reached(tensor):
        weights = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))  # norms have constant sums
        loss = (tensor * weights).sum()
        gradients = torch.autograd.grad(loss, [p for _, p in parameters], retain_graph=True, allow_unused=True)
        found = [(part, g) for (part, _), g in zip(parameters, gradients, strict=True) if g is not None]
        assert all(g.isfinite().all() for _, g in found)
        return {part for part, g in found if g.any()}

    for level in output.features:
        assert "backbone" in reached(level)
    for key in ("logits", "boxes", "queries"):
        for i, tensor in enumerate(getattr(output, key)):
            found = reached(tensor)
            assert {"backbone", i} <= found, key
            assert found <= {"backbone", *range(i + 1)}, key


def test_image_processors_make_multiples_where_the_adapter_says_so(student):
    image, edges = torch.zeros(3, 141, 187, dtype=torch.uint8), {"shortest_edge": 117, "longest_edge": 199}
    pixels = student.processor(image, size=edges, do_pad=False, return_tensors="pt")["pixel_values"]
    multiple = student.processor_multiple
    assert pixels.shape[2:] == tuple(side // multiple * multiple for side in (117, 155))
    if multiple % student.size_divisor == 0:  # it can take them as they are
        image = pixels.to(torch.uint8)
        assert student.prepare(image, image[:, 0] == image[:, 0])[0].shape == pixels.shape


def test_prompts_are_for_teachers_only():
    assert all(adapter_of(name).open_vocabulary == (name in OPEN_VOCABULARY) for name in FAMILIES)
