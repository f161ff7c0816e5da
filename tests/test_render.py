"""Records of a comparison as a table and pictures."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from PIL import Image

from asd_hf.compare.pictures import draw_cost, draw_curves, draw_gains, draw_inside, make_scene
from asd_hf.compare.records import load_runs, ranked
from asd_hf.compare.render import render
from asd_hf.compare.table import HEADER, fitted, table, time_to, to_markdown
from asd_hf.compare.verdict import paired_difference
from asd_hf.errors import UserError
from asd_hf.evaluation import STATS

COLUMN = {name: index for index, name in enumerate(HEADER)}


def record(method="asd", seed=0, ap=0.3, *, ms=100.0, steps=400, points=None, logged=(), teacher=0.4, **changes):
    """One run. Its AP grows evenly, or at an evaluation [step, AP] as `points` says."""
    shared = np.random.default_rng(0).normal(0, 0.004, 100)  # of the images, so the same for all
    own = np.random.default_rng([seed, *method.encode()]).normal(0, 0.002, 100)
    points = points or [(steps * k // 4, ap * k / 4) for k in range(1, 5)]
    return {
        "setting": "easy",
        "method": method,
        "seed": seed,
        "metrics": dict.fromkeys(STATS, ap) | {"AP50": 1.5 * ap, "APl": -1.0},
        "per_class": {"cat": 2 * ap, "owl": ap, "emu": -1.0},
        "bootstrap": {"seed": 0, "AP": (ap + shared + own).tolist()},
        "num_images": 1400,
        "data_fingerprint": "f",
        "student_sha256": f"student {seed}",
        "teacher": None if teacher is None else dict.fromkeys(STATS, teacher),
        "steps": steps,
        "seconds": steps * ms / 1000,
        "ms_per_step": ms,
        "peak_memory_mib": 900.4,
        "device": "cpu, 1 thread",
        "curves": {
            "train": [
                {"step": s, "seconds": s * ms / 1000, "loss": 9.0, "loss/loss_ce": 1.0} | dict.fromkeys(logged, s / 99)
                for s in range(50, steps + 1, 50)
            ],
            "eval": [{"step": s, "seconds": s * ms / 1000, "AP": a} for s, a in points],
        },
    } | changes


def write(folder, runs):
    for run in runs:
        file = folder / run["setting"] / f"{run['method']}_{run['seed']}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(run))
    return folder


def study(methods, seeds=3, **changes):
    """Every method with several seeds, whose AP differ by the same amounts."""
    return [record(name, s, ap + 0.01 * s, **changes) for name, ap in methods.items() for s in range(seeds)]


def cells(runs, column, **options):
    return {row[0]: row[COLUMN[column]] for row in table(runs, **options)[1:]}


def test_records_are_found_at_any_depth_by_setting(tmp_path):
    runs = [record("none"), record("asd"), record("asd", setting="hard")]
    write(tmp_path / "deep" / "er", runs)
    (tmp_path / "notes.txt").write_text("no record")
    found = load_runs(tmp_path)
    assert list(found) == ["easy", "hard"]
    assert [run["method"] for run in found["easy"]] == ["asd", "none"] and found["hard"] == [runs[2]]


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (["setting"], None, "setting is missing"),
        (["metrics", "APs"], None, "metrics.APs is missing"),
        (["bootstrap", "AP"], None, "bootstrap.AP is missing"),
        (["curves", "eval", 2, "seconds"], None, r"curves.eval\[2\].seconds is missing"),
        (["teacher", "AP"], None, "teacher.AP is missing"),
        (["bootstrap", "AP", 7], "x", r"bootstrap.AP\[7\] is not a finite number"),
        (["metrics", "AP"], float("nan"), "metrics.AP is not a finite number"),
        (["seed"], "0", "seed is not an integer"),
        (["curves"], [], "curves is not an object"),
    ],
)
def test_what_is_no_record_is_named_with_its_key(tmp_path, keys, value, said):
    wrong = record()
    *path, last = keys
    inner = wrong
    for key in path:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    (tmp_path / "good.json").write_text(json.dumps(record("none")))
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=rf"wrong\.json is not the record of a run: {said}$"):
        load_runs(tmp_path)


@pytest.mark.parametrize("content", [b'{"setting": ', b"\xff\xfe"])
def test_what_is_no_json_is_named(tmp_path, content):
    (tmp_path / "wrong.json").write_bytes(content)
    with pytest.raises(UserError, match=r"wrong\.json is not JSON"):
        load_runs(tmp_path)


def test_a_list_is_no_record(tmp_path):
    (tmp_path / "wrong.json").write_text("[]")
    with pytest.raises(UserError, match=r"wrong\.json .*it is not an object"):
        load_runs(tmp_path)


def test_no_record_and_one_too_many_are_refused(tmp_path):
    with pytest.raises(UserError, match="no record"):
        load_runs(tmp_path)
    write(tmp_path / "a", [record()])
    write(tmp_path / "b", [record()])
    with pytest.raises(UserError, match=r"a/easy/asd_0\.json and .*b/easy/asd_0\.json are records of the same"):
        load_runs(tmp_path)


@pytest.mark.parametrize("setting", ["../up", "a/b", "a\\b", "..", ""])
def test_a_setting_that_names_no_file_is_refused(tmp_path, setting):
    (tmp_path / "a.json").write_text(json.dumps(record(setting=setting)))
    with pytest.raises(UserError, match="cannot be the name of a file"):
        render(tmp_path)


def test_the_table_begins_with_teacher_and_baseline_and_then_goes_by_ap():
    runs = study({"asd": 0.2, "mgd": 0.35, "none": 0.25, "ld": 0.3})
    assert [row[0] for row in table(runs)] == ["method", "teacher", "none", "mgd", "ld", "asd"]
    assert list(ranked(runs, "ld")) == ["ld", "mgd", "none", "asd"]


def test_cells_of_the_table():
    runs = study({"none": 0.30, "asd": 0.35, "worst": 0.2}, steps=2000)
    runs[0]["teacher"] = None  # plain training has none
    runs[3]["metrics"]["AP"] += 0.001  # asd gains 5.1, 5.0 and 4.9 points
    runs[5]["metrics"]["AP"] -= 0.001
    rows = {row[0]: dict(zip(HEADER, row, strict=True)) for row in table(runs)[1:]}
    assert set(rows["teacher"].values()) == {"teacher", "40.0", "-"}
    asd = rows["asd"]
    difference, interval = asd["difference"].split(" ", 1)
    low, high = (float(bound) for bound in interval.strip("[]").split(", "))
    assert difference == "+5.0" and 4 < low < 5 < high < 6
    low, high = paired_difference(runs[3:6], runs[:3]).image_interval
    assert asd["over images alone"] == f"[{100 * low:+.1f}, {100 * high:+.1f}]" != interval
    assert asd["verdict"] == "better"
    wanted = {"seeds": "3", "AP": "36.0 ± 0.9", "AP50": "54.0", "APs": "36.0", "APm": "36.0", "APl": "-"}
    wanted |= {"steps": "2,000", "s/run": "200", "ms/step": "100.0", "memory, MiB": "900"}
    assert {key: asd[key] for key in wanted} == wanted
    assert rows["worst"]["verdict"] == "worse" and rows["worst"]["difference"].startswith("-10.0 [-10.")
    assert [rows["none"][key] for key in ("difference", "over images alone", "verdict")] == ["-"] * 3


def test_without_a_baseline_there_is_no_difference():
    runs = study({"asd": 0.35, "fgd": 0.3})
    for column in ("difference", "over images alone", "verdict", "baseline's AP after"):
        assert set(cells(runs, column).values()) == {"-"}
    assert cells(runs, "verdict", baseline="fgd")["asd"] == "better"


def test_an_undecided_verdict_says_what_would_decide():
    runs = study({"none": 0.3, "asd": 0.3})
    runs[3]["metrics"]["AP"] += 0.05  # asd gains 5, 2 and -1 points
    runs[4]["metrics"]["AP"] += 0.02
    runs[5]["metrics"]["AP"] -= 0.01
    assert cells(runs, "verdict")["asd"] == "undecided: 12 seeds"
    assert cells(runs[:1] + runs[3:4], "verdict")["asd"] == "undecided: one seed"
    assert cells(runs[:1] + runs[3:4], "difference")["asd"] == "+5.0"
    assert cells(runs[:1] + runs[3:], "difference")["asd"] == "+5.0 (1 seed)"
    assert cells(runs[:2] + runs[3:], "difference")["asd"].endswith("] (2 seeds)")
    for run in runs:
        noise = np.random.default_rng([*run["method"].encode()]).normal(0, 0.02, 100)
        run["bootstrap"]["AP"] = noise.tolist()
    assert cells(runs, "verdict")["asd"].startswith("undecided: ") and " images" in cells(runs, "verdict")["asd"]
    for run, gain in zip(runs[3:], (0.3, 0.0, -0.285), strict=True):
        run["metrics"]["AP"] = runs[run["seed"]]["metrics"]["AP"] + gain
    assert cells(runs, "verdict")["asd"] == "undecided"  # hopeless


def test_teachers_that_differ_have_rows_of_their_own():
    runs = study({"none": 0.3}, teacher=None) + study({"asd": 0.35}) + study({"fgd": 0.3, "ld": 0.3}, teacher=0.5)
    assert [row[:3] for row in table(runs)[1:3]] == [
        ["teacher of asd", "-", "40.0"],
        ["teacher", "-", "50.0"],  # that of most methods
    ]


def test_a_teacher_of_many_is_named_by_the_first():
    runs = study({"none": 0.3, "fgd": 0.3, "ld": 0.3}) + study({"weak": 0.35, "weak_asd": 0.3}, teacher=0.1)
    assert [row[0] for row in table(runs)[1:3]] == ["teacher", "teacher of weak and 1 more"]


def test_a_markdown_table_is_aligned_and_its_cells_stay_whole():
    lines = to_markdown([["method", "AP", "verdict"], ["a|b", "31.2", "better"], ["two\nlines", "-", "-"]]).split("\n")
    assert lines == [
        "| method    |   AP | verdict |",
        "| --------- | ---: | ------- |",
        "| a\\|b      | 31.2 | better  |",
        "| two lines |    - | -       |",
    ]


def test_a_table_is_folded_to_the_terminal():
    rows = [["method", "AP", "a wide column", "verdict"], ["none", "31.2", "-", "better"]]
    width = len(to_markdown(rows).split("\n")[0])
    assert fitted(rows, width) == to_markdown(rows)
    two = fitted(rows, width - 1).split("\n\n")
    assert two == [to_markdown([row[:3] for row in rows]), to_markdown([[row[0], row[3]] for row in rows])]
    assert len(fitted(rows, 1).split("\n\n")) == 3  # narrower than any: a column each


BASE = [(100, 0.10), (200, 0.20), (400, 0.30)]


@pytest.mark.parametrize(
    ("points", "ms", "wanted"),
    [
        (BASE, 100, (1, 1)),
        ([(100, 0.1), (200, 0.2), (300, 0.4)], 100, (0.625, 0.625)),  # half-way from 200 to 300: of 400 steps
        ([(100, 0.1), (200, 0.2), (300, 0.4)], 160, (1, 0.625)),
        ([(100, 0.35), (200, 0.2), (300, 0.4)], 200, (0.5, 0.25)),  # at the first evaluation, and first of all times
        ([(100, 0.1), (200, 0.4), (300, 0.2), (400, 0.5)], 100, (5 / 12, 5 / 12)),  # for the first time
        ([(100, 0.1), (800, 0.45)], 100, (1.25, 1.25)),
        ([(100, 0.1), (400, 0.299)], 100, None),
    ],
)
def test_time_to_the_baselines_ap(points, ms, wanted):
    found = time_to([record(points=points, ms=ms)], [record("none", points=BASE)])
    assert found == (None if wanted is None else pytest.approx(wanted))


def test_time_to_goes_by_the_mean_over_the_common_seeds():
    base = [record("none", 0, points=[(100, 0.2), (400, 0.3)]), record("none", 1, points=[(100, 0.0), (400, 0.1)])]
    own = [record(seed=s, points=[(100, 0.1 * s), (200, 0.5 * s)]) for s in range(3)]
    assert time_to(own, base).steps == pytest.approx((100 + 100 * 0.15 / 0.2) / 400)
    assert time_to(own[2:], base) is None
    base[0]["curves"]["eval"] = []
    assert time_to(own, base) is None
    assert time_to(own[1:], base).steps == pytest.approx(0.25)


def test_runs_of_unequal_steps_are_brought_together_by_their_share():
    """As they are where each run has a budget of minutes."""
    own = [record(seed=0, points=[(100, 0.1), (200, 0.2)]), record(seed=1, points=[(100, 0.1), (400, 0.7)])]
    base = [record("none", s, points=[(100, 0.0), (250, 0.21)]) for s in range(2)]
    # At half of their steps, 100 and 200, they have 0.1 and 0.3; at the end 0.2 and 0.7.
    assert time_to(own, base).steps == pytest.approx((150 + 150 * (0.21 - 0.2) / (0.45 - 0.2)) / 250)


def test_the_share_of_time_is_shown():
    runs = study({"none": 0.3, "worst": 0.1}) + study({"asd": 0.6}, ms=150)
    shown = cells(runs, "baseline's AP after")
    assert shown == {"teacher": "-", "none": "100 % of its time", "asd": "76 % of its time", "worst": "-"}


def names(count):
    return {f"method_{n:02d}": 0.3 + 0.002 * n for n in range(count)}


def test_of_many_methods_lines_show_baseline_best_and_asd():
    few = make_scene("easy", study({"none": 0.3, **names(7)}), "none")
    assert len(few.lines) == 8 and not few.left_out
    many = make_scene("easy", study({"none": 0.3, "asd_t1": 0.1, "asd": 0.2, **names(12)}), "none")
    assert many.lines == ["none", *(f"method_{n:02d}" for n in range(11, 5, -1)), "asd", "asd_t1"]
    assert "6 more methods left out" in draw_curves(many).get_suptitle()
    looks = [many.looks[name] for name in many.methods]
    assert len({(look.colour, look.marker) for look in looks}) == len({look[:2] for look in looks}) == 15


def test_the_curves_are_in_points_and_mean_over_seeds():
    steps, minutes = draw_curves(make_scene("easy", study({"none": 0.3, "asd": 0.36}, ms=600), "none")).axes
    base, asd, teacher = steps.lines
    assert base.get_xdata() == pytest.approx([100, 200, 300, 400]) and base.get_color() == "#444444"
    assert asd.get_ydata() == pytest.approx([9.25, 18.5, 27.75, 37])  # 36, 37 and 38 at the end
    assert minutes.lines[1].get_xdata() == pytest.approx([1, 2, 3, 4])
    assert teacher.get_linestyle() == "--" and list(teacher.get_ydata()) == [40, 40]
    band = steps.collections[1].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((9, 38))
    assert "AP" in steps.get_ylabel() and "0-100" in steps.get_ylabel()


def test_a_teacher_far_above_does_not_press_the_curves_flat():
    figure = draw_curves(make_scene("easy", study({"none": 0.1, "asd": 0.12}, teacher=0.64), "none"))
    assert figure.axes[0].get_ylim()[1] < 20
    assert "64.0  teacher (above)" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_no_name_covers_another_or_a_point():
    crowd = {name: 0.3 + 0.0001 * n for n, name in enumerate(names(12))}
    edge = {"a method with a rather long name": 0.31}
    figure = draw_cost(make_scene("easy", study({"none": 0.3, **crowd}) + study(edge, ms=130), "none"))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    labels = [text for text in axes.texts if text.get_text() in {"none", *crowd, *edge}]
    boxes = [super(type(text), text).get_window_extent() for text in labels]  # without their lines to the points
    assert len(boxes) == 14
    for index, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:index] + boxes[index + 1 :])
        assert not any(box.contains(*axes.transData.transform(text.xy)) for text in labels)
        assert axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)


def test_of_many_methods_the_costs_name_those_with_lines():
    few, many = (make_scene("easy", study({"none": 0.3, **names(n)}), "none") for n in (15, 16))
    shown = [{text.get_text() for text in draw_cost(scene).axes[0].texts} for scene in (few, many)]
    assert shown[0] >= set(few.methods) and len(few.lines) < len(few.methods) == 16
    assert shown[1] & set(many.methods) == set(many.lines)
    figure = draw_cost(many)
    assert sum(line.get_color() == "#BBBBBB" for line in figure.axes[0].lines) == 17 - len(many.lines)
    assert figure.get_suptitle().endswith("; the other methods in grey")


def test_statistics_of_methods_are_drawn_and_losses_are_not():
    share, cosine = "distillation_gradient_share", "distillation_gradient_cosine"
    runs = study({"none": 0.3}) + study({"asd": 0.35, "asd_t1": 0.3}, logged=["asd/w_ii", share])
    runs += study({"ld": 0.3}, logged=["ld/region", share, cosine])
    panels = {axes.get_title(): axes for axes in draw_inside(make_scene("easy", runs, "none")).axes}
    assert {title: len(axes.lines) for title, axes in panels.items()} == {
        "asd/w_ii": 2,
        "ld/region": 1,
        share: 3,
        cosine: 1,
    }
    assert panels["ld/region"].lines[0].get_ydata()[-1] == pytest.approx(400 / 99)
    assert draw_inside(make_scene("easy", study({"none": 0.3}), "none")) is None
    many = study({"none": 0.3}) + study({"asd": 0.3}, logged=[share, *(f"asd/{n}" for n in range(9))])
    figure = draw_inside(make_scene("easy", many, "none"))
    assert len([axes for axes in figure.axes if axes.get_visible()]) == 7 and "3 more" in figure.get_suptitle()


def test_gains_are_drawn_by_size_and_class():
    runs = study({"none": 0.3, "asd": 0.35, "fgd": 0.25})
    runs[3]["metrics"]["APs"] += 0.06  # of `asd` with seed 0
    figure = draw_gains(make_scene("easy", runs, "none"))
    panels = {axes.get_xlabel(): axes for axes in figure.axes}
    ticks = {title: [text.get_text() for text in axes.get_xticklabels()] for title, axes in panels.items()}
    assert ticks == {
        "objects by size": ["small", "medium"],
        "objects by class": ["cat", "owl"],
    }  # large, emu: not seen
    _, asd, fgd = panels["objects by size"].lines
    assert asd.get_ydata() == pytest.approx([7, 5]) and fgd.get_ydata() == pytest.approx([-5, -5])
    assert panels["objects by class"].lines[1].get_ydata() == pytest.approx([10, 5])
    bar = panels["objects by size"].collections[0].get_segments()[0]
    assert bar[:, 1] == pytest.approx([5, 11])
    assert draw_gains(make_scene("easy", [run for run in runs if run["method"] != "none"], "none")) is None
    runs = study({"none": 0.3, "asd": 0.35})
    for run in runs:
        run["per_class"] = {f"class {n}": run["metrics"]["AP"] * (1 + (n != 3)) for n in range(13)}
    figure = draw_gains(make_scene("easy", runs, "none"))
    names = [text.get_text() for text in figure.axes[1].get_xticklabels()]
    assert len(names) == 12 and "class 3" not in names and "1 more class left out" in figure.get_suptitle()


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_comparison_is_written_with_its_pictures(tmp_path, seeds):
    runs = study({"none": 0.3}, seeds) + study({"asd": 0.35, "a|b $x": 0.32}, seeds, logged=["asd/w_ii"])
    hard = copy.deepcopy(runs)
    for run in hard:
        run["setting"] = "very hard"
    write(tmp_path / "records", [run for run in runs if "|" not in run["method"]])
    write(tmp_path / "records", hard)
    shown = render(tmp_path / "records", tmp_path / "out")
    pictures = [
        f"{setting}_{what}.png" for setting in ("easy", "very hard") for what in ("cost", "curves", "gains", "inside")
    ]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(["easy.md", "very hard.md", *pictures])
    for name in pictures:
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 300 and picture.height > 200 and picture.info["dpi"][0] == pytest.approx(110, abs=1)
            assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 20
    page = (tmp_path / "out" / "very hard.md").read_text()
    rows = to_markdown(table(load_runs(tmp_path / "records")["very hard"]))
    assert rows in page and rows in shown and "| a\\|b $x " in page
    assert page.startswith("# very hard\n") and "on 1,400 images" in page and "## How to read it" in page
    assert "![curves](very%20hard_curves.png)" in page and "lie in `../records`" in page
    assert shown.count("| method ") == 2


def test_by_default_it_is_written_beside_the_records(tmp_path):
    write(tmp_path, study({"none": 0.3, "asd": 0.35}))
    render(tmp_path, baseline="asd")
    assert "lie beside this file" in (tmp_path / "easy.md").read_text()
    assert sorted(file.name for file in tmp_path.glob("*.*")) == [
        "easy.md",
        *(f"easy_{what}.png" for what in ("cost", "curves", "gains")),
    ]


def test_runs_that_cannot_be_paired_say_why_and_hide_nothing_else(tmp_path):
    runs = study({"none": 0.3, "asd": 0.35, "fgd": 0.34})
    for run in runs:
        run["student_sha256"] += "x" * (run["method"] == "fgd")
    rows = {row[0]: row for row in table(runs)}
    reason = "not comparable: easy/fgd_0 and easy/none_0 did not start from the same student (student_sha256)"
    assert rows["fgd"][HEADER.index("verdict")] == reason and rows["fgd"][HEADER.index("difference")] == "-"
    assert rows["asd"][HEADER.index("difference")].startswith("+5.0")
    assert reason in render(write(tmp_path, runs))
