import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForObjectDetection,
    ConvNextImageProcessor,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
)

from asd_hf.architecture import new_processor
from asd_hf.commands import run
from asd_hf.copying import copy_weights
from asd_hf.criterion import DetectionCriterion
from asd_hf.detectors import get_adapter
from asd_hf.errors import UserError
from asd_hf.freezing import backbone_stage, freeze_backbone
from asd_hf.loading import PACKAGED, load_teacher
from asd_hf.model_config import StudentConfig
from asd_hf.student import build_student
from tests import tiny

SIZE = {"shortest_edge": 64, "longest_edge": 96}
CONVNEXT = {"model_type": "convnext", "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def build(config=None, classes=tiny.CLASSES, teacher=None, processor=None):
    torch.manual_seed(1)
    teacher = teacher or tiny.deformable_detr(decoder_layers=4)
    student = build_student(
        config or StudentConfig(), get_adapter(teacher, processor or tiny.processor()), classes, SIZE
    )
    return student.model, student.processor


def save(model, folder, processor=None):
    model.save_pretrained(folder)
    (processor or tiny.processor()).save_pretrained(folder)
    return str(folder)


def train_step(adapter):
    """One large optimizer step on the detection loss."""
    batch = tiny.batch(2)
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    adapter.model.train()
    losses = DetectionCriterion()(adapter(batch["pixel_values"], batch["pixel_mask"]), batch["labels"])
    sum(losses.values()).backward()
    torch.optim.Adam(parameters, lr=0.01, eps=1e-20).step()  # moves all that has any gradient


# -- teacher and checkpoints ------------------------------------------------------------------------------------------


def test_teacher_is_frozen_and_in_full_precision(tmp_path):
    model = tiny.deformable_detr()
    adapter = load_teacher(save(model.half(), tmp_path))
    teacher, processor = adapter.model, adapter.processor
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert teacher.dtype == torch.float32 and processor.image_mean
    torch.testing.assert_close(teacher.class_embed[0].weight, model.class_embed[0].weight.float())


def test_missing_models_and_processors_are_one_clear_line(tmp_path):
    for name in ("/no/such/folder", "../folder", "nobody/nothing", str(tmp_path)):
        with pytest.raises(UserError, match=f"model.teacher: .*{name}") as error:
            load_teacher(name)
        assert "\n" not in str(error.value)
    tiny.deformable_detr().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no image processor"):
        load_teacher(str(tmp_path))
    tiny.processor().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"decoder_layers": 3}))
    with pytest.raises(UserError, match="lacks .* weights of DeformableDetr.*decoder.layers.2"):
        load_teacher(str(tmp_path))
    config.write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="unknown detector family 'bert'"):
        load_teacher(str(tmp_path))


def test_pickled_weights_are_never_read(tmp_path):
    model = tiny.deformable_detr()
    model.config.save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)

    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save(model.state_dict() | {"payload": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        UserError, match="no file named model.safetensors.*pytorch_model.bin.*convert them by"
    ) as error:
        load_teacher(str(tmp_path))
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_code_of_a_checkpoint_is_never_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # Transformers would ask
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    own = {"AutoConfig": "own.Own", "AutoModelForObjectDetection": "own.Own"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    with pytest.raises(UserError, match="model.teacher: .* needs code of its own, which is never run") as error:
        load_teacher(str(folder))
    assert "\n" not in str(error.value)
    tiny.deformable_detr().save_pretrained(folder)  # of a known family: Transformers' own code serves
    tiny.processor().save_pretrained(folder)
    for name, keys in (("config.json", own), ("preprocessor_config.json", {"AutoImageProcessor": "own.Own"})):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"auto_map": keys}))
    assert load_teacher(str(folder)).spec.family == "deformable_detr"
    assert not (tmp_path / "ran").exists()


def test_checkpoint_student_is_loaded_as_it_is(tmp_path):
    model = tiny.deformable_detr(seed=5, auxiliary_loss=False)
    large = {"shortest_edge": 128, "longest_edge": 256}
    student, processor = build(save(model, tmp_path, tiny.processor(size=large)))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], tensor, rtol=0, atol=0)
    assert dict(processor.size)["shortest_edge"] == 64 and student.config.auxiliary_loss and student.training
    with pytest.raises(UserError, match="model.student.num_queries is for a new student"):
        build(StudentConfig(checkpoint=str(tmp_path), num_queries=4))


@pytest.mark.parametrize("variant", [{}, {"with_box_refine": True}, {"two_stage": True}])
def test_other_classes_keep_the_weights_of_known_ones(tmp_path, caplog, variant):
    caplog.set_level(logging.INFO)
    model = tiny.deformable_detr(**variant)
    student, processor = build(save(model, tmp_path), classes=("Pizza", "zebra", "traffic_light"))
    assert "5 classes replaced by one of 3: 2 keep their weights, 1 are fresh (zebra)" in caplog.text
    assert student.config.id2label == {0: "Pizza", 1: "zebra", 2: "traffic_light"} and student.config.num_labels == 3
    batch = tiny.batch(2)
    old = get_adapter(model, tiny.processor())(batch["pixel_values"], batch["pixel_mask"])
    new = get_adapter(student.eval(), processor)(batch["pixel_values"], batch["pixel_mask"])
    torch.testing.assert_close(new.logits[..., [0, 2]], old.logits[..., [4, 2]])
    torch.testing.assert_close(new.boxes, old.boxes)  # in two stages: the same proposals are chosen
    assert (student.class_embed[0].weight is student.class_embed[1].weight) == ("two_stage" not in variant)


# -- new students -----------------------------------------------------------------------------------------------------


def test_new_student_has_the_options_and_fresh_heads():
    options = {"dropout": 0.2, "encoder_ffn_dim": 16}
    config = StudentConfig(encoder_layers=2, decoder_layers=3, num_queries=7, d_model=64, config=options)
    teacher_processor = tiny.processor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    student, processor = build(config, classes=("a", "b"), processor=teacher_processor)
    spec = get_adapter(student, processor).spec
    assert (spec.class_names, spec.num_layers, spec.num_queries, spec.hidden_size) == (("a", "b"), 3, 7, 64)
    assert len(student.model.encoder.layers) == 2 and student.config.dropout == 0.2
    assert student.model.encoder.layers[0].mlp.fc1.out_features == 16
    assert spec.pixel_mean == pytest.approx((0.1, 0.2, 0.3)) and spec.pixel_std == pytest.approx((0.4, 0.5, 0.6))
    assert student.config.auxiliary_loss and student.training
    torch.testing.assert_close(student.class_embed[0].bias.sigmoid(), torch.full((2,), 0.01))
    assert student.bbox_embed[0].layers[-1].bias.tolist() == [0, 0, -2, -2]
    assert student.model.query_position_embeddings.weight.std() > 0.9


def test_new_student_of_a_named_architecture_needs_no_teacher():
    config = StudentConfig(base="deformable_detr", backbone="resnet18", d_model=32, encoder_layers=1, decoder_layers=2)
    adapter = build_student(config, None, ("a",), SIZE)
    student, processor = adapter.model, adapter.processor
    assert (
        processor.image_mean == (0.485, 0.456, 0.406)
        and student.model.backbone.model.feature_info.channels()[-1] == 512
    )
    with pytest.raises(UserError, match="there is no pretrained teacher"):
        build_student(StudentConfig(), None, ("a",), SIZE)
    with pytest.raises(UserError, match="copy_weights needs model.teacher"):
        build_student(StudentConfig(base="deformable_detr", copy_weights=True), None, ("a",), SIZE)


def test_the_packaged_teacher_is_an_architecture_too():
    """The student of a run without the teacher, built as if it were there."""
    alone = build_student(StudentConfig(base="shapes", decoder_layers=2), None, ("a", "b"), SIZE)
    taught = build_student(StudentConfig(decoder_layers=2), load_teacher("shapes"), ("a", "b"), SIZE)
    assert alone.model.config.to_dict() == taught.model.config.to_dict() and alone.spec == taught.spec


@pytest.mark.parametrize("base", ["deformable_detr", "a folder"])
def test_a_named_architecture_sees_pixels_alike_with_and_without_a_teacher(tmp_path, base):
    teacher = get_adapter(tiny.deformable_detr(0), tiny.processor(image_mean=[0.7, 0.7, 0.7]))
    if base == "a folder":
        base = str(save(tiny.deformable_detr(0), tmp_path / "base", tiny.processor(image_mean=[0.2, 0.3, 0.4])))
    alone, taught, after = (
        build_student(StudentConfig(base=of), by, ("a",), SIZE).processor.image_mean
        for of, by in ((base, None), (base, teacher), ("teacher", teacher))
    )
    assert alone == taught != after == (0.7, 0.7, 0.7)


def test_a_class_keeps_the_weights_that_it_has_under_its_other_name(tmp_path):
    """`model.class_map` says what the teacher calls a class; a checkpoint of the same data calls it so too."""
    name = save(tiny.deformable_detr(), tmp_path)
    old = load_teacher(name).model.class_embed[0].weight
    student = build_student(name, None, ("kitten", "pizza", "yak"), SIZE, {"kitten": "cat"})
    new = student.model.class_embed[0].weight
    assert torch.equal(new[0], old[0]) and torch.equal(new[1], old[4])
    assert not any(torch.equal(new[2], row) for row in old)


def test_other_families_follow_their_backbone_and_width():
    """The channels that RT-DETR's neck reads, and LW-DETR's levels, are those of what is asked for."""
    small = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "decoder_layers": 2, "num_queries": 9}
    config = StudentConfig(base="rt_detr", backbone="test_resnet", config=small, **sizes)
    student = build_student(config, None, ("a",), {"height": 64, "width": 64})
    assert student.model.config.encoder_in_channels == [48, 192, 96] == list(student.backbone.channels)
    assert student.spec.hidden_size == 32 and student.processor.size["height"] == 64
    batch = tiny.batch(2, num_classes=1)
    losses = student(batch["pixel_values"], batch["pixel_mask"], batch["labels"]).losses
    assert sum(losses.values()).isfinite()
    vit = {"model_type": "lw_detr_vit", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    vit |= {"window_block_indices": [0, 2], "out_indices": [2, 4], "num_windows": 4, "image_size": 64}
    levels = {"backbone_config": vit, "projector_scale_factors": [2.0, 0.5], "group_detr": 2, "c2f_num_blocks": 1}
    levels |= {"decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4}
    config = StudentConfig(base="lw_detr", d_model=32, decoder_layers=2, num_queries=9, config=levels)
    assert build_student(config, None, ("a",), {"height": 64, "width": 64}).spec.strides == (8, 32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (StudentConfig(config={"drop_out": 0.1}), "model.student.config.drop_out is unknown.*did you mean 'dropout'"),
        (StudentConfig(config={"num_labels": 3}), "model.student.config.num_labels is unknown"),
        (StudentConfig(config={"dropout": "a lot"}), "cannot have this configuration.*dropout"),
        (StudentConfig(num_queries=3, config={"num_queries": 4}), "num_queries contradicts"),
        (StudentConfig(backbone="resnet19"), "timm has no 'resnet19': did you mean 'resnet18'"),
        (StudentConfig(backbone="/no/folder"), "model.student.backbone: folder /no/folder does not exist"),
        (StudentConfig(pretrained_backbone=True), "pretrained_backbone needs model.student.backbone"),
        (StudentConfig(backbone="resnet18", config={"backbone_config": CONVNEXT}), "not both"),
        (StudentConfig(backbone="resnet18", pretrained_backbone=True), "no weights of backbone resnet18"),
        (StudentConfig(d_model=20), "cannot be built.*divisible"),
        (StudentConfig(decoder_layers=1), "needs at least 2 decoder layers"),
        (StudentConfig(base="grounding-dino"), "a grounding-dino can only be a teacher"),
        (StudentConfig(base="yolos", backbone="resnet18"), "a yolos is one transformer and has no backbone"),
        (StudentConfig(base="yolos", decoder_layers=2), "model.student.decoder_layers: Yolos has no such size"),
        (
            StudentConfig(base="lw_detr", backbone="resnet18"),
            "backbone of a lw_detr is a lw_detr_vit, not timm_backbo",
        ),
        (StudentConfig(base="rf_detr", config={"backbone_config": {"model_type": "rf_detr_dinov2"}}), "out_indices"),
        (StudentConfig(base="rt_detr", config={"backbone_config": {"model_type": "resnet", "depths": 3}}), "no backb"),
        (StudentConfig(base="detr", num_queries=0), "model.student.num_queries must be 1 or more, not 0"),
    ],
)
def test_bad_options_are_one_clear_line(config, message):
    with pytest.raises(UserError, match=message) as error:
        build(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        StudentConfig(backbone="resnet18", frozen_batch_norm=False),
        StudentConfig(config={"backbone_config": CONVNEXT}),
        StudentConfig(config={"with_box_refine": True, "two_stage": True}, frozen_batch_norm=False),
    ],
    ids=["timm", "convnext", "two_stage"],
)
def test_saved_student_loads_without_us(tmp_path, config):
    student, processor = build(config, classes=("a", "b"))
    train_step(get_adapter(student, processor))  # batch norm, where it is trained, has statistics of its own then
    save(student, tmp_path, processor)
    loaded, report = AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    batch = tiny.batch(2)
    pixels = get_adapter(loaded, processor).normalize(batch["pixel_values"], batch["pixel_mask"])
    ours, theirs = (m.eval()(pixel_values=pixels, pixel_mask=batch["pixel_mask"]) for m in (student, loaded))
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.pred_boxes, theirs.pred_boxes)
    assert loaded.config.id2label == {0: "a", 1: "b"}
    student.load_state_dict(loaded.state_dict())  # as a resumed run does


@pytest.mark.parametrize("donor_class", [ResNetBackbone, ResNetForImageClassification])
def test_pretrained_backbone_from_a_folder(tmp_path, donor_class):
    donor = donor_class(ResNetConfig(**{k: v for k, v in tiny.HF_RESNET.items() if k != "model_type"}))
    donor.save_pretrained(tmp_path)
    weights = {name.removeprefix("resnet."): p for name, p in donor.named_parameters()}
    student, processor = build(StudentConfig(backbone=str(tmp_path), pretrained_backbone=True))
    adapter = get_adapter(student, processor)
    assert adapter.spec.strides == (8, 16, 32, 64)
    for name, parameter in adapter.backbone.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=0, atol=0)
        assert parameter.requires_grad == (backbone_stage(name) > 1), name
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"depths": [1, 1, 2, 1]}))
    with pytest.raises(UserError, match="no weights of backbone .* it lacks .*stages.2.layers.1"):
        build(StudentConfig(backbone=str(tmp_path), pretrained_backbone=True))


STATISTICS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


def pixel_statistics(processor):
    spec = get_adapter(tiny.deformable_detr(), processor).spec
    return torch.tensor([spec.pixel_mean, spec.pixel_std])


@pytest.mark.parametrize("teacher", [{}, STATISTICS, {"do_normalize": False}, {"do_rescale": False}])
@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("vit_base_patch16_224", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
        ("resnet18.a1_in1k", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ],
)
def test_pretrained_timm_backbone_sees_the_pixels_that_it_knows(name, mean, std, teacher):
    theirs = tiny.processor(**teacher)
    pretrained, fresh = (StudentConfig(backbone=name, pretrained_backbone=flag) for flag in (True, False))
    for known in (None, theirs):
        processor = new_processor(pretrained, "deformable_detr", known, SIZE)
        torch.testing.assert_close(pixel_statistics(processor), torch.tensor([mean, std]))
        assert dict(processor.size) == SIZE
    processor = new_processor(fresh, "deformable_detr", theirs, SIZE)
    torch.testing.assert_close(pixel_statistics(processor), pixel_statistics(theirs))


def test_pretrained_backbone_of_a_folder_brings_its_pixel_statistics(tmp_path, caplog):
    config = ResNetConfig(**{k: v for k, v in tiny.HF_RESNET.items() if k != "model_type"})
    ResNetBackbone(config).save_pretrained(tmp_path)
    teacher = tiny.processor(image_mean=[0.7, 0.7, 0.7])
    pretrained = StudentConfig(backbone=str(tmp_path), pretrained_backbone=True)
    _, processor = build(pretrained, processor=teacher)
    assert processor.image_mean == teacher.image_mean
    assert f"no image processor with {tmp_path}: normalised as the teacher" in caplog.text
    ConvNextImageProcessor(**STATISTICS, rescale_factor=1 / 127.5).save_pretrained(tmp_path)
    student, processor = build(pretrained, processor=teacher)
    spec = get_adapter(student, processor).spec
    assert spec.pixel_mean == pytest.approx((0.05, 0.1, 0.15)) and spec.pixel_std == pytest.approx((0.2, 0.25, 0.3))
    assert dict(processor.size) == SIZE
    _, processor = build(StudentConfig(backbone=str(tmp_path)), processor=teacher)  # its weights are fresh
    assert processor.image_mean == teacher.image_mean


def test_no_residual_block_of_a_fresh_backbone_is_shut():
    """timm starts the last norm of each block at 0; frozen, the block would never take part."""
    student, processor = build(StudentConfig(backbone="resnet18"))
    adapter = get_adapter(student, processor)
    train_step(adapter)
    for name, parameter in adapter.backbone.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


# -- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "trained"),
    [
        (tiny.TIMM_RESNET, ("layer2.", "layer3.", "layer4.")),
        (tiny.HF_RESNET, ("encoder.stages.1.", "encoder.stages.2.", "encoder.stages.3.")),
        (CONVNEXT, ("encoder.stages.1.", "encoder.stages.2.", "encoder.stages.3.", "hidden_states_norms.")),
    ],
    ids=["timm", "transformers", "convnext"],
)
def test_stem_and_first_stage_are_frozen_and_the_rest_moves(caplog, backbone, trained):
    caplog.set_level(logging.INFO)
    student, processor = build(StudentConfig(frozen_stages=1, config={"backbone_config": backbone}))
    adapter = get_adapter(student, processor)
    before = {name: p.detach().clone() for name, p in adapter.backbone.named_parameters()}
    expected = {name for name in before if name.startswith(trained)}
    assert 0 < len(expected) < len(before)
    assert f"{len(before) - len(expected)} of {len(before)} backbone tensors frozen" in caplog.text
    assert {name for name, p in adapter.backbone.named_parameters() if p.requires_grad} == expected
    others = [p for n, p in student.named_parameters() if not n.startswith("model.backbone.")]
    assert others and all(p.requires_grad for p in others)
    train_step(adapter)
    moved = {name for name, p in adapter.backbone.named_parameters() if not torch.equal(p, before[name])}
    assert moved == expected


@pytest.mark.parametrize("backbone", [tiny.TIMM_RESNET, tiny.HF_RESNET], ids=["timm", "transformers"])
@pytest.mark.parametrize(("stages", "frozen"), [(-1, set()), (0, {0}), (2, {0, 1, 2}), (4, {0, 1, 2, 3, 4})])
def test_frozen_stages_count_from_the_stem(backbone, stages, frozen):
    adapter = get_adapter(tiny.deformable_detr(backbone_config=backbone), tiny.processor())
    names = freeze_backbone(adapter, stages)
    still = {name for name, p in adapter.backbone.named_parameters() if not p.requires_grad}
    assert set(names) == still and {backbone_stage(name) for name in still} == frozen


def test_frozen_stages_default_to_one_for_pretrained_backbones_only(tmp_path):
    folder = save(tiny.deformable_detr(), tmp_path)
    for config, frozen in (
        (StudentConfig(), False),
        (StudentConfig(copy_weights=True), True),
        (StudentConfig(copy_weights=True, backbone="resnet18"), False),
        (StudentConfig(checkpoint=folder), True),
        (StudentConfig(checkpoint=folder, frozen_stages=-1), False),
    ):
        student, processor = build(config)
        parameters = get_adapter(student, processor).backbone.parameters()
        assert all(p.requires_grad for p in parameters) != frozen, config


def test_a_backbone_without_stages_cannot_be_frozen_in_part():
    adapter = get_adapter(tiny.deformable_detr(), tiny.processor())
    adapter.model.model.backbone.model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
    with pytest.raises(UserError, match="cannot tell the stages of Sequential"):
        freeze_backbone(adapter, 1)


@pytest.mark.parametrize("backbone", [tiny.TIMM_RESNET, tiny.HF_RESNET], ids=["timm", "transformers"])
def test_batch_norm_of_trained_stages_learns_when_asked(backbone):
    config = {"backbone_config": backbone}
    student, processor = build(StudentConfig(frozen_stages=1, frozen_batch_norm=False, config=config))
    adapter = get_adapter(student, processor)
    norms = {n: m for n, m in adapter.backbone.named_modules() if "BatchNorm2d" in type(m).__name__}
    before = {n: (m.weight.clone(), m.running_mean.clone()) for n, m in norms.items()}
    for _ in range(2):  # timm starts the last norm of a block at 0, so that the others learn from the second step on
        train_step(adapter)
    for name, norm in norms.items():
        weight, mean = before[name]
        fixed = backbone_stage(name) <= 1
        assert torch.equal(norm.running_mean, mean) == torch.equal(norm.weight, weight) == fixed, name
    frozen, _ = build(StudentConfig(config=config))
    assert frozen.state_dict().keys() == student.state_dict().keys()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.modules())


# -- copied weights ---------------------------------------------------------------------------------------------------


def test_a_whole_copy_answers_as_the_teacher():
    for variant in ({}, {"with_box_refine": True}, {"two_stage": True}):
        teacher = tiny.deformable_detr(**variant)
        student, processor = build(StudentConfig(copy_weights=True), teacher=teacher)
        batch = tiny.batch(2)
        own, copied = (
            get_adapter(m.eval(), processor)(batch["pixel_values"], batch["pixel_mask"]) for m in (teacher, student)
        )
        torch.testing.assert_close(copied.logits, own.logits)
        torch.testing.assert_close(copied.boxes, own.boxes)


@pytest.mark.parametrize("variant", [{"with_box_refine": True}, {"two_stage": True}], ids=["refine", "two_stage"])
def test_fewer_layers_and_queries_are_copied_evenly(caplog, variant):
    caplog.set_level(logging.INFO)
    teacher = tiny.deformable_detr(decoder_layers=5, encoder_layers=3, **variant)
    config = StudentConfig(copy_weights=True, decoder_layers=3, encoder_layers=1, num_queries=8, backbone="resnet18")
    student, _ = build(config, teacher=teacher)
    pairs = [("model.encoder.layers.0.mlp.fc1", "model.encoder.layers.2.mlp.fc1")]
    for ours, theirs in ((0, 0), (1, 2), (2, 4)):
        pairs.append((f"model.decoder.layers.{ours}.mlp.fc1", f"model.decoder.layers.{theirs}.mlp.fc1"))
        pairs.append((f"bbox_embed.{ours}.layers.0", f"bbox_embed.{theirs}.layers.0"))
        pairs.append((f"class_embed.{ours}", f"class_embed.{theirs}"))
    if "two_stage" in variant:
        pairs += [("class_embed.3", "class_embed.5"), ("bbox_embed.3.layers.2", "bbox_embed.5.layers.2")]
    else:
        queries = teacher.model.query_position_embeddings.weight
        torch.testing.assert_close(student.model.query_position_embeddings.weight, queries[:8], rtol=0, atol=0)
    for ours, theirs in pairs:
        copied, source = student.get_submodule(ours), teacher.get_submodule(theirs)
        torch.testing.assert_close(copied.weight, source.weight, rtol=0, atol=0)
    assert "of the student's modules from the teacher" in caplog.text


def test_a_backbone_is_copied_as_a_whole_or_not_at_all():
    """resnet34 begins with modules that are the same as resnet18's: a part of a backbone is worth nothing."""
    small, large = (
        get_adapter(
            tiny.deformable_detr(seed=i, backbone_config=tiny.TIMM_RESNET | {"backbone": f"resnet{depth}"}),
            tiny.processor(),
        )
        for i, depth in enumerate((18, 34))
    )
    before = {k: v.clone() for k, v in small.backbone.state_dict().items()}
    copied = copy_weights(small, large)
    assert copied and not any("backbone" in name for name in copied)
    assert all(torch.equal(v, before[k]) for k, v in small.backbone.state_dict().items())


def test_the_packaged_teacher_has_the_ap_that_its_metrics_state(tmp_path):
    """On the first 100 evaluation images; its whole AP is within the spread of such a part."""
    folder = PACKAGED["shapes"]
    stated = json.loads((folder / "metrics.json").read_text())["student"]["AP"]
    out = tmp_path / "metrics.json"
    arguments = ["--model", "shapes", "--data", "shapes?num_train=1&num_val=100", "--output", str(out)]
    assert run("evaluate", [*arguments, "--batch-size", "50"]) == 0
    assert json.loads(out.read_text())["AP"] == pytest.approx(stated, abs=0.08)
