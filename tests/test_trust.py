"""How much a teacher is trusted: the formula on scenes of known losses, its running means, its place in a method."""

import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from asd_hf.criterion import DetectionCriterion
from asd_hf.detectors.base import DetectorOutput
from asd_hf.errors import UserError
from asd_hf.methods import CombinedMethod, get_method
from asd_hf.trust import Trust
from tests import tiny
from tests.answers import ask_both, batch, detector, specs
from tests.test_asd import output


def scene(seed, counts=(2, 3), shares=(0.1, 0.4), softmax=False):
    """A student, a shallower teacher and labels of two images.

    Args:
        counts: of objects in each image; None: it is not labelled.
        shares: of the way that the last layers of the two have gone to the labels.
    """
    truth = tiny.batch(2, seed=seed, num_classes=3, boxes=[count or 0 for count in counts])["labels"]
    guesses = (output(5 + i, 2 * seed + i, 4 - i, columns=3 + softmax) for i in (1, 2))
    both = [replace(guess, proposals=(guess.logits[0] - 3, guess.boxes[0])) for guess in guesses]  # do not count
    for image, (label, count) in enumerate(zip(truth, counts, strict=True)):
        label |= {"boxes": label["boxes"].double(), "labelled": count is not None}
        for guess, share in zip(both, shares, strict=True):
            wanted, objects = torch.full(guess.logits.shape[2:], -9.0).double(), len(label["boxes"])
            wanted[torch.arange(objects), label["class_labels"]] = 9
            wanted[objects:, 3:] = 9  # "no object"
            guess.logits[-1, image].lerp_(wanted, share)
            guess.boxes[-1, image, :objects].lerp_(label["boxes"], share)
    return *both, truth


def detection_loss(guess, truth, softmax=False):
    criterion = DetectionCriterion("softmax" if softmax else "sigmoid", class_cost=2, class_loss_weight=2)
    last = DetectorOutput(guess.logits[-1:], guess.boxes[-1:], guess.queries[-1:])
    return sum(criterion(last, truth).values()).item()


def make(factor=1.0, softmax=False):
    return Trust(factor, "softmax" if softmax else "sigmoid").double()


HEADS = pytest.mark.parametrize("softmax", [False, True], ids=["sigmoid", "softmax"])


@HEADS
def test_trust_is_full_before_a_good_teacher_and_0_before_a_worse_one(softmax):
    for shares, value in (((0, 1), 1), ((0.9, 0), 0), ((1, 0.9), 0)):
        assert make(2.0, softmax)(*scene(1, shares=shares, softmax=softmax), step=0) == value
    student, _, truth = scene(1, softmax=softmax)
    assert make(2.0, softmax)(student, student, truth, step=0) == 0
    for share in (0.3, 0.6, 0.9):
        student, teacher, truth = scene(1, shares=(0, share), softmax=softmax)
        lead = 1 - detection_loss(teacher, truth, softmax) / detection_loss(student, truth, softmax)
        assert lead > 0.01
        for trust in (0.5, 1.0, 2.0):
            got = make(trust, softmax)(student, teacher, truth, step=0)
            assert not got.requires_grad and got.item() == pytest.approx(min(1, trust * lead), rel=1e-10)


COUNTS = ((2, 3), (0, 0), (None, 4), (1, None))  # images without objects count, those without labels do not


@HEADS
def test_trust_is_of_running_means_which_batches_without_labels_leave_alone(softmax):
    trust, means, nothing = make(1.0, softmax), [0.0, 0.0], scene(100, (None, None), softmax=softmax)
    assert trust(*nothing, step=0) == 1  # nothing is known against the teacher
    for i in range(30):
        *both, truth = scene(i, COUNTS[i % 4], (0.1 + 0.02 * (i % 7), 0.4), softmax)
        step = max(1 / (i + 1), 0.1)
        means = [m + step * (detection_loss(x, truth, softmax) - m) for m, x in zip(means, both, strict=True)]
        got = trust(*both, truth, step=0)
        assert 0 < got < 1 and got.item() == pytest.approx(1 - means[1] / means[0], rel=1e-10)
        assert trust(*nothing, step=0) == got


def test_trust_is_kept_between_comparisons():
    trust = make()
    found = [trust(*scene(step), step=step).item() for step in range(10)]
    assert trust.batches == 3
    assert found == [found[0]] * 4 + [found[4]] * 4 + [found[8]] * 2 and len(set(found)) == 3


@pytest.mark.parametrize("whose", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_broken_batch_does_not_break_trust(whose, value):
    trust = make()
    before = trust(*scene(0), step=0)
    broken = scene(1)
    broken[whose].logits[-1, 0, 0, 0] = value
    assert trust(*broken, step=0) == before
    torch.testing.assert_close(trust(*scene(0), step=0), before, rtol=1e-10, atol=0)


def test_trust_is_saved():
    first, fresh, second = make(), make(), make()
    for i in range(3):
        first(*scene(i), step=0)
    second.load_state_dict(first.state_dict())
    known, unknown, loaded = (trust(*scene(3), step=0) for trust in (first, fresh, second))
    assert loaded == known != unknown


@HEADS
def test_low_precision_is_compared_in_fp32_under_autocast(softmax):
    student, teacher, truth = scene(0, softmax=softmax)
    for x in (student, teacher):
        x.logits, x.boxes = x.logits.bfloat16(), x.boxes.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = make(1.0, softmax).float()(student, teacher, truth, step=0)
    wide = (replace(x, logits=x.logits.float(), boxes=x.boxes.float()) for x in (student, teacher))
    assert 0 < got < 1 and got == make(1.0, softmax).float()(*wide, truth, step=0)


OPTIONS = {"balanced_pairs": {"score": "both"}, "asd": {"ramp_steps": 0}, "fgd": {}}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_scales_imitation_and_not_what_the_method_learns_for_itself(name):
    student, teacher = detector("deformable_detr", num_queries=8), detector("other", 1, num_queries=11)
    ours, theirs = ask_both(student, teacher, batch())
    # The teacher is right about some objects.
    found = zip(theirs.logits[-1, :, :4].argmax(-1), theirs.boxes[-1, :, :4], strict=True)
    truth = [{"class_labels": classes, "boxes": boxes} for classes, boxes in found]
    losses, kind = [], get_method(name)
    for trust in (0.0, 0.5):
        torch.manual_seed(0)
        method = kind(kind.config_class(weight=2.0, trust=trust, **OPTIONS[name]), *specs(student, teacher)).double()
        losses.append(method(ours, theirs, truth))
        assert bool(method.trust) == (f"{name}/trust" in method.statistics) == bool(trust)
    trust = method.statistics[f"{name}/trust"].item()
    assert 0.01 < trust < 0.5 and losses[0].keys() == losses[1].keys()
    assert not method.trains_itself - losses[0].keys()
    for key, loss in losses[0].items():
        factor = 1 if key.endswith("sampling") else trust
        assert losses[1][key].item() == pytest.approx(factor * loss.item(), rel=1e-12), key
    # Each method of several has its own.
    kind = get_method("fitnet")
    blind = kind(kind.config_class(), *specs(student, teacher)).double()
    both = CombinedMethod({name: method, "fitnet": blind})
    both(ours, theirs, truth)
    assert f"{name}/trust" in both.statistics and "fitnet/trust" not in both.statistics


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_trust_that_cannot_be(value):
    with pytest.raises(UserError, match="method.trust must be 0 or above, not"):
        get_method("fgd").config_class(trust=value)


def work(rank, world, path):
    """Trust after each of some batches, of which a rank sees its part."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/{world}", rank=rank, world_size=world)
    trust, trusts = make(), []
    for i, counts in enumerate((((3, 2), (0, 1)), ((None, None), (4, 0)), ((None, None),) * 2, ((0, None), (0, 1)))):
        parts = [scene(2 * i + half, counts[half]) for half in range(2)]
        if world == 1:
            *both, labels = zip(*parts, strict=True)
            tensors = [[(x.logits, x.boxes, x.queries) for x in halves] for halves in both]
            both = [DetectorOutput(*(torch.cat(x, 1) for x in zip(*halves, strict=True))) for halves in tensors]
            parts = [(*both, labels[0] + labels[1])]
        trusts.append(trust(*parts[rank], step=0).item())
    torch.save(trusts, f"{path}/{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file store")
def test_two_ranks_trust_as_one_with_both_batches(tmp_path):
    for world in (1, 2):
        torch.multiprocessing.start_processes(work, (world, str(tmp_path)), nprocs=world, start_method="fork")
    one, *two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert two[0] == two[1] and two[0] == pytest.approx(one, rel=1e-12)
    assert all(0 < trust < 1 for trust in one) and len(set(one)) == 3  # the batch without labels changes nothing
