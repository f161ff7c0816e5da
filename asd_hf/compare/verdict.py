"""Whether a method is better than the baseline: the paired difference of AP, its interval, and what would decide it.

Two things could have come out otherwise: the seeds of the trainings and the images of the evaluation. An interval that
counts only one of them is too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from ..errors import UserError

CONFIDENCE = 0.95
MARGIN = 0.01  # of AP in 0..1: a gain that is surely smaller than one point is none
BETTER, WORSE, NOT_BETTER, UNDECIDED = "better", "worse", "not better", "undecided"
MOST_SEEDS = 100
GROWTHS = np.arange(11, 1001) / 10  # 1.1, 1.2, ... 100 times what there is


class NotComparable(UserError):
    """Two runs that cannot be paired, and why."""


class Needed(NamedTuple):
    """What would decide, in all and not in addition. None: what there is now is enough."""

    seeds: int | None = None
    images: int | None = None


@dataclass(frozen=True)
class Difference:
    """AP of a method minus AP of the baseline, over the seeds that both have. AP is in 0..1.

    Attributes:
        mean: over seeds.
        seeds: that both have. With 1 nothing is known about seeds: `interval` is of the images alone.
        seed_sd: sample standard deviation of the difference over seeds; 0 with one seed.
        num_images: of the evaluation.
        image_sd: standard deviation of `mean` over resamples of the images.
        image_interval: the paired bootstrap interval over images, from the percentiles 2.5 and 97.5.
    """

    mean: float
    seeds: int
    seed_sd: float
    num_images: int
    image_sd: float
    image_interval: tuple[float, float]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval over seeds and images: Student's t, degrees of freedom by Welch and Satterthwaite.

        With few seeds these are too many where images count for something: what images add must not make the interval
        narrower than seeds alone would. So it misses the truth in 5.6 % of cases or fewer (2 to 5 seeds, simulated).
        """
        parts = [(self.seed_sd**2 / self.seeds, self.seeds - 1), (self.image_sd**2, self.num_images - 1)]
        parts = [(variance, freedom) for variance, freedom in parts if variance > 0]
        if not parts:
            return self.mean, self.mean
        total = sum(variance for variance, _ in parts)
        freedom = total**2 / sum(variance**2 / freedom for variance, freedom in parts)
        sides = [_quantile(freedom) * math.sqrt(total)]
        sides += [_quantile(freedom) * math.sqrt(variance) for variance, freedom in parts]
        return self.mean - max(sides), self.mean + max(sides)

    def verdict(self, margin: float = MARGIN) -> str:
        """`BETTER`: the interval lies above 0; `WORSE`: below 0; `NOT_BETTER`: below `margin`; else `UNDECIDED`.

        One seed is always `UNDECIDED`.
        """
        low, high = self.interval
        if self.seeds == 1:
            return UNDECIDED
        if low > 0:
            return BETTER
        if high < 0:
            return WORSE
        return NOT_BETTER if high < margin else UNDECIDED

    def needed(self, margin: float = MARGIN) -> Needed | None:
        """What would end an `UNDECIDED` if the mean and the spreads stayed as they are.

        The fewest seeds with these images; if 100 are too few, the fewest images with these seeds; if 100 times as
        many are too few, both, grown by the same factor. Images and factors go in steps of a tenth of what there is:
        the spreads are not known any better.

        Returns:
            None if there is a verdict, if all that does not decide, or if there is one seed: it has no spread.
        """
        if self.seeds == 1 or self.verdict(margin) != UNDECIDED:
            return None
        more = range(self.seeds + 1, MOST_SEEDS + 1)
        factors = [(math.ceil(self.seeds * g), math.ceil(self.num_images * g)) for g in GROWTHS]
        ways = [
            *(Needed(seeds=seeds) for seeds in more),
            *(Needed(images=images) for _, images in factors),
            *(Needed(min(seeds, MOST_SEEDS), images) for seeds, images in factors if self.seeds < MOST_SEEDS),
        ]
        return next((way for way in ways if self._grown(way).verdict(margin) != UNDECIDED), None)

    def _grown(self, to: Needed) -> Difference:
        seeds, images = to.seeds or self.seeds, to.images or self.num_images
        image_sd = self.image_sd * math.sqrt(self.num_images / images)
        return replace(self, seeds=seeds, num_images=images, image_sd=image_sd)


def common_seeds(runs: Sequence[dict], baseline_runs: Sequence[dict]) -> list[int]:
    """The seeds that both have, in order."""
    return sorted({run["seed"] for run in runs} & {run["seed"] for run in baseline_runs})


def paired_difference(runs: Sequence[dict], baseline_runs: Sequence[dict]) -> Difference:
    """Pairs the records of a method with those of the baseline by seed. Seeds that only one has are left out.

    Args:
        runs: records of one method, one a seed.
        baseline_runs: records of the baseline in the same setting, one a seed.

    Raises:
        NotComparable: runs that belong together were scored on unequal data or resamples, or trained from unequal
            students.
        UserError: there is no common seed.
    """
    seeds = common_seeds(runs, baseline_runs)
    if not seeds:
        raise UserError(f"{_name(runs[0])} and {_name(baseline_runs[0])}: the two methods have no seed in common")
    ours, theirs = ({run["seed"]: run for run in side} for side in (runs, baseline_runs))
    pairs = [(ours[seed], theirs[seed]) for seed in seeds]
    for run, base in pairs:
        for other in (run, base):
            _check_same_images(other, pairs[0][1])
        if run["student_sha256"] != base["student_sha256"]:
            raise NotComparable(f"{_name(run)} and {_name(base)} did not start from the same student (student_sha256)")
    differences = np.array([run["metrics"]["AP"] - base["metrics"]["AP"] for run, base in pairs])  # (seeds,)
    resampled = np.mean(
        [np.subtract(run["bootstrap"]["AP"], base["bootstrap"]["AP"]) for run, base in pairs], axis=0
    )  # (resamples,): before the spread is taken, for all runs share a resample's images
    tail = 100 * (1 - CONFIDENCE) / 2
    return Difference(
        mean=float(differences.mean()),
        seeds=len(seeds),
        seed_sd=float(differences.std(ddof=1)) if len(seeds) > 1 else 0.0,
        num_images=pairs[0][1]["num_images"],
        image_sd=float(resampled.std(ddof=1)),
        image_interval=tuple(np.percentile(resampled, [tail, 100 - tail]).tolist()),
    )


def _quantile(freedom: float) -> float:
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def _check_same_images(run: dict, first: dict) -> None:
    names = f"{_name(run)} and {_name(first)}"
    if run["data_fingerprint"] != first["data_fingerprint"]:
        raise NotComparable(f"{names} were not scored on the same images (data_fingerprint)")
    if run["bootstrap"]["seed"] != first["bootstrap"]["seed"]:
        raise NotComparable(f"{names} have bootstraps of different seeds: the resamples are not the same")
    if len(run["bootstrap"]["AP"]) != len(first["bootstrap"]["AP"]):
        raise NotComparable(f"{names} have bootstraps of different lengths: the resamples are not the same")


def _name(run: dict) -> str:
    """As its file is called."""
    return f"{run['setting']}/{run['method']}_{run['seed']}"
