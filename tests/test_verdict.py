"""The paired difference of two methods: its interval, its verdict, and what would decide it."""

from __future__ import annotations

import dataclasses
import math
from statistics import fmean, stdev, variance

import numpy as np
import pytest
from scipy import stats

from asd_hf.compare.verdict import BETTER, NOT_BETTER, UNDECIDED, WORSE, Difference, Needed, paired_difference
from asd_hf.errors import UserError


def record(method, seed, ap, bootstrap, **changes):
    return {
        "setting": "easy",
        "method": method,
        "seed": seed,
        "metrics": {"AP": ap},
        "bootstrap": {"seed": 0, "AP": list(bootstrap)},
        "num_images": 50,
        "data_fingerprint": "f",
        "student_sha256": f"student {seed}",
    } | changes


def two_methods(seeds=3, resamples=80, seed_sd=0.02, image_sd=0.01):
    """Records of a method and of the baseline, with noise of runs, of images, and of both together."""
    rng = np.random.default_rng(5)
    shared = rng.normal(0, 0.05, resamples)  # hard and easy resamples: the same for all runs
    sides = []
    for method, level in (("asd", 0.33), ("none", 0.3)):
        own = rng.normal(0, image_sd, resamples)
        aps = rng.normal(level, seed_sd, seeds)
        noise = rng.normal(0, image_sd / 3, (seeds, resamples))
        sides.append([record(method, s, ap, ap + shared + own + noise[s]) for s, ap in enumerate(aps)])
    return sides


def difference(mean, seeds=3, seed_sd=0.01, num_images=400, image_sd=0.005):
    return Difference(mean, seeds, seed_sd, num_images, image_sd, image_interval=(math.nan, math.nan))


def test_the_interval_is_that_of_a_naive_computation():
    ours, theirs = two_methods()
    found = paired_difference(ours[::-1], theirs)  # in any order
    d = [a["metrics"]["AP"] - b["metrics"]["AP"] for a, b in zip(ours, theirs, strict=True)]
    means = [
        fmean(a["bootstrap"]["AP"][r] - b["bootstrap"]["AP"][r] for a, b in zip(ours, theirs, strict=True))
        for r in range(80)
    ]
    of_images, of_seeds = variance(means), variance(d) / 3
    freedom = (of_images + of_seeds) ** 2 / (of_images**2 / 49 + of_seeds**2 / 2)
    welch = stats.t.ppf(0.975, freedom) * math.sqrt(of_images + of_seeds)
    half = max(welch, stats.t.ppf(0.975, 2) * math.sqrt(of_seeds))  # images never make it narrower than seeds alone
    assert found.mean == pytest.approx(fmean(d), abs=1e-12)
    assert found.interval == pytest.approx((fmean(d) - half, fmean(d) + half), abs=1e-9)
    ordered = sorted(means)  # percentile 2.5 of 80 numbers lies at 0.025 * 79 = 1.975
    low, high = (0.025 * ordered[1] + 0.975 * ordered[2], 0.975 * ordered[-3] + 0.025 * ordered[-2])
    assert found.image_interval == pytest.approx((low, high), abs=1e-12)
    assert (found.seeds, found.num_images) == (3, 50)
    assert found.seed_sd == pytest.approx(stdev(d)) and found.image_sd == pytest.approx(math.sqrt(of_images))


def test_where_images_make_no_difference_it_is_the_paired_t_test():
    aps = [0.31, 0.36, 0.3, 0.35], [0.3, 0.31, 0.29, 0.33]
    ours, theirs = ([record(m, s, ap, [ap] * 9) for s, ap in enumerate(a)] for m, a in zip("ab", aps, strict=True))
    bounds = stats.ttest_rel(*aps).confidence_interval(0.95)
    assert paired_difference(ours, theirs).interval == pytest.approx(tuple(bounds), abs=1e-9)


@pytest.mark.parametrize("image_sd", [0.001, 0.01, 0.1])
def test_what_images_add_never_makes_the_interval_narrower(image_sd):
    alone, both = (difference(0.0, seeds=3, seed_sd=0.02, image_sd=sd) for sd in (0.0, image_sd))
    width = both.interval[1] - both.interval[0]
    assert width >= alone.interval[1] - alone.interval[0]
    assert width >= 2 * stats.t.ppf(0.975, both.num_images - 1) * image_sd * (1 - 1e-12)


def test_where_all_seeds_agree_the_images_alone_count():
    spread = [-0.01, 0.0, 0.01]
    ours = [record("asd", s, 0.32, np.add(0.32, spread)) for s in range(2)]
    theirs = [record("none", s, 0.3, [0.3] * 3) for s in range(2)]
    half = stats.t.ppf(0.975, 49) * 0.01
    assert paired_difference(ours, theirs).interval == pytest.approx((0.02 - half, 0.02 + half), abs=1e-9)


def test_runs_that_are_equal_have_an_interval_of_one_point():
    runs = [record("none", s, 0.3, [0.3] * 3) for s in range(2)]
    assert paired_difference(runs, runs).interval == (0, 0)


def test_one_seed_shows_nothing_about_seeds():
    ours, theirs = two_methods(image_sd=1e-5)
    found = paired_difference(ours[:1], theirs)
    half = stats.t.ppf(0.975, 49) * found.image_sd
    assert (found.seeds, found.seed_sd) == (1, 0)
    assert found.interval == pytest.approx((found.mean - half, found.mean + half), abs=1e-12)
    for mean in (-0.5, 0.0, 0.5):
        single = dataclasses.replace(found, mean=mean)
        assert single.verdict() == UNDECIDED and single.needed() is None


def test_pairs_are_of_the_seeds_that_both_have():
    ours, theirs = two_methods(seeds=4)
    theirs[0]["metrics"]["AP"] = ours[3]["metrics"]["AP"] = 9
    assert paired_difference(ours[:3], theirs[1:]) == paired_difference(ours[1:3], theirs[1:3])
    with pytest.raises(UserError, match="easy/asd_0 and easy/none_2: .*no seed in common"):
        paired_difference(ours[:2], theirs[2:])


@pytest.mark.parametrize(
    ("mean", "verdict"),
    [
        (0.0202, BETTER),
        (0.0198, UNDECIDED),
        (-0.0098, UNDECIDED),
        (-0.0102, NOT_BETTER),
        (-0.0198, NOT_BETTER),
        (-0.0202, WORSE),
    ],
)
def test_verdicts(mean, verdict):
    half = stats.t.ppf(0.975, 2) * 0.01 / math.sqrt(3)
    found = difference(mean, seed_sd=0.01 * 0.02 / half, image_sd=0)  # the interval is mean +- 0.02
    assert found.verdict() == verdict
    assert (found.verdict(margin=0.5) == NOT_BETTER) == (verdict in (UNDECIDED, NOT_BETTER))


def decided(found, needed):
    """The verdict with that many seeds and images, worked out anew."""
    seeds, images = needed.seeds or found.seeds, needed.images or found.num_images
    scaled = found.image_sd * math.sqrt(found.num_images / images)
    return difference(found.mean, seeds, found.seed_sd, images, scaled).verdict() != UNDECIDED


def test_needed_seeds_are_the_fewest_that_decide():
    fewest = []
    for mean, image_sd in ((0.025, 0.005), (0.02, 0.005), (0.009, 0.002), (-0.001, 0.003)):
        found = difference(mean, seed_sd=0.015, image_sd=image_sd)
        needed = found.needed()
        assert needed.images is None and decided(found, needed)
        assert not any(decided(found, Needed(seeds=seeds)) for seeds in range(3, needed.seeds))
        fewest.append(needed.seeds)
    assert fewest[0] == 4  # one more than there are


def test_needed_images_where_no_seeds_would_do():
    found = difference(0.01, seeds=8, seed_sd=0.004, image_sd=0.02)
    needed = found.needed()
    assert needed.seeds is None and needed.images % 40 == 0 and decided(found, needed)
    assert not decided(found, Needed(seeds=100))
    assert not any(decided(found, Needed(images=images)) for images in range(440, needed.images, 40))


def test_both_are_needed_where_neither_would_do():
    found = difference(0.01, seeds=3, seed_sd=0.02, image_sd=0.02)
    needed = found.needed()
    assert decided(found, needed) and needed.seeds > 3 and needed.images > 400
    assert needed.seeds == math.ceil(3 * needed.images / 400)  # grown alike
    assert not decided(found, Needed(seeds=100)) and not decided(found, Needed(images=40_000))
    assert not decided(found, Needed(needed.seeds - 1, needed.images - 40))
    assert not decided(found, Needed(images=needed.images)) and not decided(found, Needed(seeds=needed.seeds))


def test_nothing_is_needed_where_there_is_a_verdict_and_nothing_helps_where_all_is_hopeless():
    assert difference(0.1).needed() is None
    assert difference(0.1).verdict() == BETTER
    hopeless = difference(0.005, seed_sd=0.3, image_sd=0.001)
    assert hopeless.verdict() == UNDECIDED and hopeless.needed() is None


@pytest.mark.parametrize(
    ("seed_sd", "image_sd", "most"),
    [(0.0, 0.2, 0.08), (0.02, 0.2, 0.08), (0.1, 0.02, 0.08), (0.02, 0.02, 0.08)],  # the last: Welch's weak spot
)
def test_without_a_difference_verdicts_are_wrong_as_rarely_as_they_say(seed_sd, image_sd, most):
    """AP is the mean over 100 images. Methods differ by image, runs by luck; neither method is better."""
    rng = np.random.default_rng(0)
    studies, seeds, images = 400, 3, 100
    weights = rng.multinomial(images, [1 / images] * images, size=200) / images  # (resamples, images)
    wrong = 0
    for _ in range(studies):
        level = rng.normal(0.3, 0.3, images)
        sides = []
        for method in ("asd", "none"):
            own = level + rng.normal(0, image_sd, images)
            runs = own + rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, 0.02, (seeds, images))
            boots = runs @ weights.T
            sides.append([record(method, s, runs[s].mean(), boots[s], num_images=images) for s in range(seeds)])
        wrong += paired_difference(*sides).verdict() in (BETTER, WORSE)
    assert 0.02 < wrong / studies < most


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_fingerprint": "g"}, "same images"),
        ({"student_sha256": "another"}, "same student"),
        ({"bootstrap": {"seed": 1, "AP": [0.0] * 80}}, "different seeds"),
        ({"bootstrap": {"seed": 0, "AP": [0.0] * 79}}, "different lengths"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused_by_name(changes, message, side):
    ours, theirs = sides = two_methods()
    sides[side][1] |= changes
    with pytest.raises(UserError, match=message) as caught:
        paired_difference(ours, theirs)
    first, second = str(caught.value).split(" and ", 1)
    assert first in ("easy/asd_1", "easy/none_1") and second.startswith("easy/none_") and "\n" not in second
    paired_difference(ours[::2], theirs)  # the others do


def test_seeds_scored_on_unequal_images_are_refused():
    ours, theirs = two_methods()
    for side in (ours, theirs):
        side[2]["data_fingerprint"] = "g"  # the pair agrees with itself
    with pytest.raises(UserError, match="easy/asd_2 and easy/none_0 were not scored on the same images"):
        paired_difference(ours, theirs)
