"""Traps of Grounding DINO and MM Grounding DINO: the prompt, its tokens, the frame of the boxes."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from transformers import BertTokenizer, GroundingDinoImageProcessor, GroundingDinoProcessor

from asd_hf.detectors import get_adapter
from asd_hf.errors import UserError
from asd_hf.model_config import StudentConfig
from asd_hf.student import build_student
from tests import tiny
from tests.families import EDGES, FAMILIES

NAMES = ("grounding_dino", "mm_grounding_dino")
WORDS = [
    "cat",
    "dog",
    "hot",
    "light",
    "traffic",
    "lights",
    "pizza",
    "##s",
    "t",
    "-",
    "shirt",
    "un",
    "##light",
    "(",
    ")",
]


@cache
def wordpieces():
    """A tokenizer with the ids that Transformers knows as the ends of classes: [CLS], [SEP], "." and "?"."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    vocabulary = [special.get(i, f"[unused{i}]") for i in range(1030)] + WORDS
    return BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, do_lower_case=False)


@cache
def detector(name):
    """With word pieces, and heads that differ from layer to layer."""
    model, _ = FAMILIES[name]()
    values = {"decoder_layers": 3, "decoder_bbox_embed_share": False}
    values |= {"decoder_cls_embed_share": False} if name == "mm_grounding_dino" else {}
    config = model.config.to_dict() | values
    config["text_config"] |= {"vocab_size": 1030 + len(WORDS)}
    torch.manual_seed(0)
    model = type(model)(type(model.config)(**config)).eval()
    with torch.no_grad():
        for parameter in (*model.bbox_embed.parameters(), *model.class_embed.parameters()):
            parameter.normal_(0, 0.3)
        for name, parameter in model.named_parameters():
            if name.startswith("model.decoder.bbox_embed"):  # what refines is what predicts
                parameter.copy_(model.get_parameter(name.removeprefix("model.decoder.")))
    processor = GroundingDinoProcessor(GroundingDinoImageProcessor(size=EDGES), wordpieces())
    return model, processor


@pytest.fixture(params=NAMES)
def parts(request):
    return deepcopy(detector(request.param))


def ask(adapter, batch):
    return adapter(batch["pixel_values"], batch["pixel_mask"])


def read(adapter):
    """The words of each class as the tokenizer reads its tokens."""
    ids = adapter._text[0]
    return [adapter.tokenizer.decode(ids[row[row >= 0]]) for row in adapter._tokens]


CLASSES = (
    "light",
    "traffic light",
    "traffic",
    "unlight lights",
    "hot dog",
    "dog",
    "Pizzas",
    "T-shirt",
    "hot_cat",
    "s",
)


def test_each_class_has_its_own_tokens(parts):
    """Words that classes share, one class within another, word pieces, case, underscores."""
    adapter = get_adapter(*parts)
    adapter.prompt(CLASSES)
    text = "light. traffic light. traffic. unlight lights. hot dog. dog. pizzas. t - shirt. hot cat. [UNK]."
    assert adapter.tokenizer.decode(adapter._text[0]) == f"[CLS] {text} [SEP]"
    assert read(adapter) == text.removesuffix(".").split(". ")
    assert adapter.spec.class_names == CLASSES
    rows = [set(row[row >= 0].tolist()) for row in adapter._tokens]
    assert sum(map(len, rows)) == len(set.union(*rows)) and [len(row) for row in rows] == [
        1,
        2,
        1,
        3,
        2,
        1,
        2,
        3,
        2,
        1,
    ]


def test_the_prompt_is_that_of_transformers(parts):
    model, processor = parts
    adapter = get_adapter(model, processor)
    adapter.prompt(["Cat", "hot dog", "traffic light"])
    inputs = processor(text=[["Cat", "hot dog", "traffic light"]], return_tensors="pt")
    assert torch.equal(adapter._text, inputs["input_ids"]) and inputs["attention_mask"].all()


def test_before_the_classes_the_answer_is_transformers(parts, monkeypatch):
    """The model on what its own processor makes of images of unequal sizes; every layer as its loss receives it."""
    model, processor = parts
    adapter = get_adapter(model, processor)
    batch, names = tiny.batch(2), ["cat", "hot dog", "pizzas"]
    adapter.prompt(names)
    images = [p[:, m.any(1)][:, :, m.any(0)] for p, m in zip(batch["pixel_values"], batch["pixel_mask"], strict=True)]
    inputs = processor(images=images, text=[names] * 2, return_tensors="pt")
    pixels, mask = adapter.prepare(batch["pixel_values"], batch["pixel_mask"])
    torch.testing.assert_close(pixels, inputs["pixel_values"], rtol=1e-5, atol=1e-5)
    assert torch.equal(mask, inputs["pixel_mask"].bool())
    layers = {}

    def tap(logits, *_, outputs_class, outputs_coord, **__):
        layers["logits"], layers["boxes"] = outputs_class, outputs_coord
        return logits.sum(), {}, None

    model.loss_function = tap
    with torch.no_grad():
        own = model(**inputs | {"pixel_values": pixels}, labels=batch["labels"])
        monkeypatch.setattr(adapter, "_classes", lambda logits: logits)
        output = ask(adapter, batch)
    count = inputs["input_ids"].shape[1]
    assert output.logits.isfinite().all() and not own.logits[..., count:].isfinite().any()
    torch.testing.assert_close(output.logits, layers["logits"][..., :count], rtol=0, atol=0)
    torch.testing.assert_close(output.boxes, layers["boxes"], rtol=0, atol=0)
    torch.testing.assert_close(output.logits[-1], own.logits[..., :count], rtol=0, atol=0)
    torch.testing.assert_close(output.boxes[-1], own.pred_boxes, rtol=0, atol=0)
    torch.testing.assert_close(output.queries.transpose(0, 1), own.intermediate_hidden_states, rtol=0, atol=0)
    assert (output.boxes[0] - output.boxes[1]).abs().max() > 1e-3  # a wrong layer would show


def test_a_class_has_the_mean_probability_of_its_tokens(parts):
    adapter = get_adapter(*parts)
    adapter.prompt(CLASSES)
    ids, generator = adapter._text[0].tolist(), torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 5, len(ids), generator=generator).double() * 4
    found = adapter._classes(logits)
    assert found.shape == (2, 2, 5, len(CLASSES))
    ends = [i for i, token in enumerate(ids) if token in (101, 1012, 102)]
    for i, (start, stop) in enumerate(zip(ends, ends[1:-1], strict=False)):
        mean = torch.stack([logits[..., t].sigmoid() for t in range(start + 1, stop)]).mean(0)
        torch.testing.assert_close(found[..., i], torch.logit(mean), rtol=1e-9, atol=1e-9)


def test_logits_of_classes_are_stable(parts):
    """Neither saturates nor underflows; tokens of other classes and -inf of unused ones have no part in it."""
    adapter = get_adapter(*parts)
    adapter.prompt(("dog", "traffic light"))
    logits = torch.full((3, adapter._text.shape[1]), -torch.inf)
    dog, light = (row[row >= 0] for row in adapter._tokens)
    for row, value in enumerate((-300.0, 0.5, 300.0)):
        logits[row, dog], logits[row, light] = value, value
    logits.requires_grad_()
    found = adapter._classes(logits)
    expected = torch.tensor([-300.0, 0.5, 300.0])[:, None].expand(3, 2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.sum().backward()
    assert logits.grad[:, torch.cat([dog, light])].isfinite().all()


def test_another_prompt_takes_the_place_of_the_first(parts):
    adapter = get_adapter(*parts)
    batch = tiny.batch(1)
    with pytest.raises(UserError, match="prompt"):
        ask(adapter, batch)
    assert adapter.spec.class_names == ()
    answers = []
    for names in (("dog", "cat", "traffic light"), ("cat",), ("dog", "cat", "traffic light")):
        adapter.prompt(names)
        answers.append(ask(adapter, batch).logits)
        assert adapter.spec.class_names == names and answers[-1].shape[-1] == len(names)
    assert torch.equal(answers[0], answers[2])


def test_prompts_that_the_model_cannot_take(parts):
    adapter = get_adapter(*parts)
    limit = adapter.model.config.max_text_len
    fitting = ["cat"] * (limit // 2 - 1)  # a token and a full stop each, [CLS] and [SEP]
    adapter.prompt(fitting)
    assert adapter._text.shape == (1, limit)
    assert ask(adapter, tiny.batch(1)).logits.isfinite().all()
    with pytest.raises(UserError, match=f"{limit + 2} tokens.* takes {limit}.*fewer classes"):
        adapter.prompt([*fitting, "dog"])
    for name in ("st. light", "cat?"):
        with pytest.raises(UserError, match="model.class_map"):
            adapter.prompt(["dog", name])
    for name in ("", " _ "):
        with pytest.raises(UserError, match="has no text"):
            adapter.prompt(["dog", name])
    assert adapter.spec.class_names == tuple(fitting)  # what cannot be asked changes nothing


SIZES = ((64, 128), (128, 64))


def still(adapter):
    """Boxes stay where the cells of the feature maps put the proposals."""
    core = adapter.model.model
    with torch.no_grad():
        for heads in (adapter.model.bbox_embed, core.decoder.bbox_embed, core.encoder_output_bbox_embed):
            for parameter in heads.parameters():
                parameter.zero_()
    adapter.prompt(("dog",))
    return adapter


def test_proposals_stand_at_their_cells_of_the_valid_image(parts):
    adapter = still(get_adapter(*parts))
    boxes = ask(adapter, tiny.batch(2, sizes=SIZES)).boxes
    assert boxes.max() <= 1 and not adapter.sees_padding
    levels = set()
    for image, (height, width) in zip(boxes[-1], SIZES, strict=True):
        for cx, cy, w, h in image.double().tolist():
            level = torch.tensor(w / 0.05).log2().round().int().item()
            levels.add(level)
            stride = adapter.spec.strides[level]
            assert w == pytest.approx(h) == pytest.approx(0.05 * 2**level, rel=1e-4)
            for cell in (cx * width / stride - 0.5, cy * height / stride - 0.5):
                assert cell == pytest.approx(round(cell), abs=1e-3)
    assert len(levels) > 1


def test_decode_takes_boxes_of_the_valid_image(parts):
    adapter = still(get_adapter(*parts))
    output = ask(adapter, tiny.batch(2, sizes=SIZES))
    generator = torch.Generator().manual_seed(0)
    references = torch.rand(2, 5, 4, generator=generator) * 0.9 + 0.05
    queries = output.decode.own[0][:, :5]
    torch.testing.assert_close(output.decode(queries, None, references).boxes[-1], references)
    # More questions than the model's own.
    more = torch.cat([output.decode.own[0]] * 2, 1), None, torch.cat([output.decode.own[2]] * 2, 1)
    assert output.decode(*more).logits.shape[2] == 2 * adapter.spec.num_queries


def test_the_heads_are_exact_under_autocast(parts, monkeypatch):
    adapter = get_adapter(*parts)
    adapter.prompt(("cat", "hot dog"))
    monkeypatch.setattr(adapter, "_classes", lambda logits: logits)
    model, core = adapter.model, adapter.model.model
    heads = {
        "last": model.bbox_embed[-1],
        "refines": core.decoder.bbox_embed[0],
        "all": core.encoder_output_bbox_embed,
    }
    with torch.autocast("cpu", torch.bfloat16):
        with adapter.tap(heads) as seen:
            output = ask(adapter, tiny.batch(2))
        boxes = {name: answer for name, (_, _, answer) in seen.items()}
        with adapter.tap(heads) as seen:
            again = output.decode(*output.decode.own)
        boxes |= {f"{name} again": answer for name, (_, _, answer) in seen.items()}
    assert len(boxes) == 5 and all(x.dtype == torch.float32 for x in boxes.values())
    for result in (output, again):
        assert result.logits.dtype == result.boxes.dtype == torch.float32
        assert (result.logits != result.logits.bfloat16()).any()


def test_the_image_processor_is_the_adapters(parts):
    adapter = get_adapter(*parts)
    assert adapter.processor is parts[1].image_processor
    assert adapter.spec.pixel_mean == pytest.approx((0.485, 0.456, 0.406))


def test_it_can_only_be_a_teacher(parts):
    adapter = get_adapter(*parts)
    adapter.prompt(("cat",))
    for ask_for in (lambda: adapter.class_heads, lambda: adapter.replace_classes(("dog",), [None])):
        with pytest.raises(UserError, match="can only be a teacher"):
            ask_for()
    for options in (StudentConfig(base=adapter.spec.family), StudentConfig(decoder_layers=2)):
        with pytest.raises(UserError, match="can only be a teacher"):
            build_student(options, adapter, ("cat",), EDGES)
