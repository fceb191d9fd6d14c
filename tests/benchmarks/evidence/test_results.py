"""Finished pieces, and which of them compare."""

import json
import multiprocessing

import numpy as np
import pytest

from benchmarks.evidence import choices, report
from benchmarks.evidence.configurations import sizes
from benchmarks.evidence.intervals import estimate, mean_over_tasks
from benchmarks.evidence.results import Results, identity
from benchmarks.evidence.tables import Board, difference, markdown, percent, select


def test_pieces_outlive_a_line_that_was_cut_short(tmp_path):
    results = Results(tmp_path / "deep" / "results.jsonl")
    assert results.records() == []
    first = results.add({"what": 1}, {"found": "ㄅ"})
    with open(results.path, "ab") as file:
        file.write(b'{"id": "half", "key": {"wh')
    second = results.add({"what": (2, 3)}, {"found": 2.5})
    results.add({"what": 1}, {"found": "again"})
    assert results.records() == [first, json.loads(json.dumps(second))]
    assert first["id"] == identity({"what": 1}) != second["id"] == identity({"what": [2, 3]})


def _add(path, writer: int) -> None:
    for number in range(100):
        Results(path).add({"writer": writer, "number": number}, {"found": "x" * 5000})


def test_several_processes_write_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_add, args=(tmp_path / "results", k)) for k in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(Results(tmp_path / "results").records()) == 400


# --- intervals ---


def test_interval_covers_the_other_seeds_and_groups_that_might_have_been():
    """About 95 % of them, by its definition, where seeds and groups both matter; clips alone would give far less."""
    rng, inside, naive = np.random.default_rng(0), 0, 0
    counts = np.full(20, 10.0)
    for _ in range(300):
        rates = 0.5 + 0.06 * rng.standard_normal((8, 1)) + 0.1 * rng.standard_normal((1, 20))
        hits = rng.binomial(10, rates.clip(0, 1)).astype(float)
        found = estimate(hits, counts, draws=500)
        inside += found.low <= 0.5 <= found.high
        half = 1.96 * np.sqrt(0.25 / 1600)
        naive += abs(found.mean - 0.5) <= half
    assert 0.88 < inside / 300 <= 0.99
    assert naive / 300 < 0.75


def test_variance_of_few_seeds_is_not_understated():
    """Of three seeds alone: that of the mean of three draws, s²/3 with the unbiased s²."""
    hits = np.array([[40.0], [50.0], [60.0]])
    from benchmarks.evidence.intervals import _drawn

    values = _drawn(hits, np.array([100.0]), 200_000)
    assert values.var() == pytest.approx(0.1**2 / 3, rel=0.02)
    found = estimate(hits, np.array([100.0]))
    assert (found.mean, found.seeds, found.by_seed) == (0.5, 3, (0.4, 0.5, 0.6))


def test_one_seed_and_one_group_have_no_width():
    found = estimate(np.array([[3.0]]), np.array([4.0]))
    assert (found.low, found.mean, found.high) == (0.75, 0.75, 0.75)


def test_groups_count_by_their_clips():
    assert estimate(np.array([[9.0, 1.0]]), np.array([90.0, 1.0])).mean == pytest.approx(10 / 91)


def test_mean_over_tasks_draws_their_seeds_together():
    """What a seed brings to one task and takes from another is no uncertainty of the mean."""
    up, down = np.array([[40.0], [60.0]]), np.array([[60.0], [40.0]])
    found = mean_over_tasks([up, down], [np.array([100.0])] * 2)
    assert (found.low, found.mean, found.high) == pytest.approx((0.5, 0.5, 0.5))


# --- tables ---


def record(row: str, seed: int, hits: list[float], what: str = "frozen", method: str = "linear", **more) -> dict:
    task = more.pop("task", "trill")
    key = {"version": 1, "experiment": "results", "what": what, "kind": more.get("kind", "pretrained"), "seed": seed}
    key |= {"configuration": {"name": row, **more.pop("configuration", {})}, "set": {"task": task}}
    key |= {"recipe": {"steps": more.pop("steps", 5), "epochs": 1, "batch_size": 2, "frames": 3}, "pretraining": {}}
    about = {"row": row, "seed": seed, "kind": "pretrained", "what": what, "task": task}
    of = {"groups": ["a", "b"], "counts": [10, 10], "classes": 2, "clips": 50}
    found = {"hits": {method: hits}, "set": of, "environment": {"torch": "x"}}
    return {"id": identity(key), "key": key, **about, **found, **more}


def test_only_what_compares_is_compared():
    """Of each row the last configuration, of all the last steps, unless others are asked for."""
    records = [
        record("aape", 0, [1, 1], steps=3),
        record("aape", 0, [2, 2], configuration={"states": 32}),
        record("aape", 0, [3, 3]),
        record("conv", 0, [4, 4]),
    ]
    kept, left_out = select(records)
    assert [each["hits"]["linear"][0] for each in kept] == [3, 4]
    assert left_out == 2
    kept, left_out = select(records, steps=3)
    assert [each["hits"]["linear"][0] for each in kept] == [1]


def test_differences_are_paired_by_seed_and_losing_rows_are_there():
    board = Board(
        [
            record("aape", 0, [6, 5]),
            record("aape", 1, [8, 7]),
            record("aape", 2, [0, 0]),  # without a partner
            record("conv", 0, [5, 4]),
            record("conv", 1, [7, 6]),
            record("aape-fixed", 0, [9, 9]),
            record("aape-fixed", 1, [10, 10]),
        ]
    )
    gain = board.difference(("aape", "pretrained"), ("conv", "pretrained"), [("frozen", "linear", "trill")])
    assert (gain.mean, gain.low, gain.high, gain.seeds) == (pytest.approx(0.1), 0.1, pytest.approx(0.1), 2)
    text = "\n".join(report.comparison(board))
    assert "| AaPE − convolution | **+10.0 (+10.0 to +10.0)**" in text
    assert "| AaPE − AaPE, fixed filters | **−30.0 (" in text
    assert "Of 4 intervals" in text
    assert "4 exclude 0" in text


def test_shifts_are_columns_of_their_own():
    hits = {fit: [[10, 10]] + [[5, 5]] * 14 + [[1, 1]] for fit in ("unshifted", "shifted")}
    board = Board([record("aape", 0, [], what="shifts") | {"hits": hits}])
    (table, *_) = [text for text in report.shifts(board) if text]
    assert "| AaPE | 100.0 (100.0 to 100.0) | 47.3 (47.3 to 47.3) | 50.6 (50.6 to 50.6) | 10.0 |" in table


def test_numbers_as_text():
    assert percent(None) == difference(None) == ""
    found = estimate(np.array([[3.0, 5.0]]), np.array([10.0, 10.0]))
    assert percent(found) == "40.0 (30.0 to 50.0)"
    assert difference(found) == "**+40.0 (+30.0 to +50.0)**"
    across = estimate(np.array([[-3.0, 5.0]]), np.array([10.0, 10.0]))
    assert difference(across) == "+10.0 (−30.0 to +50.0)"
    assert markdown("title", ["a"], [("row", [""])]) == ""


def test_the_rule_picks_the_cheapest_within_a_point_of_the_best():
    """Frozen s16-h32 would do; fine-tuned it is too bad."""
    scores = {"s32-h64": (9.0, 9.0), "s16-h64": (8.9, 8.9), "s16-h32": (8.95, 8.7), "s8-h16": (8.7, 9.0)}
    records = [record(name, 0, [frozen] * 2) for name, (frozen, _) in scores.items()]
    found, judged = choices.choice(Board(records), sizes())
    assert (found.name, judged) == ("s16-h32", ["frozen, logistic regression"])
    records += [record(name, 0, [tuned] * 2, "tuned", "tuned") for name, (_, tuned) in scores.items()]
    found, judged = choices.choice(Board(records), sizes())
    assert (found.name, judged) == ("s16-h64", ["frozen, logistic regression", "fine-tuned"])
    assert "picks num_states = 16, encoder_dim = 64" in "\n".join(choices.study(Board(records)))


def test_runs_stand_beside_each_other(tmp_path, capsys):
    """The stems and the tasks that both have, the short run's seeds and the long one's."""
    files = []
    for name, steps, seeds in (("results", 500, (0, 1)), ("results-pool", 5000, (0,))):
        records = [record(row, seed, [6, 5 + seed], steps=steps) for row in ("aape", "conv") for seed in seeds]
        records += [record("aape", 0, [7, 7], task="drums", steps=steps)]
        if name == "results":
            records += [record(row, 0, [8, 8], task="tones", steps=steps) for row in ("aape", "conv")]
            records += [record("conv+mlp", 0, [9, 9], steps=steps)]
        trained = [record("aape", seed, [], what="pretraining", steps=steps) for seed in seeds]
        records += [{key: value for key, value in each.items() if key != "hits"} for each in trained]
        for each in records:
            each["key"]["experiment"] = name
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("\n".join(json.dumps(each | {"id": identity(each["key"])}) for each in records))
    assert report.main(["--beside", *map(str, files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "**Frozen, logistic regression: accuracy in %**"
    assert lines[2] == "| | trill | mean |"
    assert [line.split(" | ")[0] for line in lines[4:10]] == [
        "| AaPE, 500 steps, 2 seeds",
        "| AaPE, 5,000 steps, 1 seed",
        "| convolution, 500 steps, 2 seeds",
        "| convolution, 5,000 steps, 1 seed",
        "| AaPE − convolution, 500 steps, 2 seeds",
        "| AaPE − convolution, 5,000 steps, 1 seed",
    ]
    assert not any(lines[10:])


def test_figures_are_written(tmp_path):
    from benchmarks.evidence.figures import accuracies, shift_curves

    hits = {fit: [[5, 5]] * 16 for fit in ("unshifted", "shifted")}
    records = [record(name, seed, [6, 5 + seed]) for name in ("aape", "conv") for seed in (0, 1)]
    records += [record("aape", 0, [6, 5], "tuned", "tuned"), record("aape", 0, [], what="shifts") | {"hits": hits}]
    board = Board(records)
    for path in (accuracies(board, tmp_path), shift_curves(board, tmp_path)):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_report_without_results(tmp_path, capsys):
    assert report.main(["--cache", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "report: there are no results yet: python -m benchmarks.evidence.compare\n"
