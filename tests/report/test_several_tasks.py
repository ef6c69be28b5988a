"""Reports of several tasks: a section each, layers by tasks, scores by length, the same numbers in every file."""

from __future__ import annotations

import csv
import html
import re
import statistics
from pathlib import Path

import pytest
from synthetic import LAYERS, TASKS, several

from statewise.report import SHARES, boards_of, leaderboard, show_score, write_all
from statewise.report.charts import Axis, Curve, Guide, curves
from statewise.report.overview import headline_of_all, matrix, mean_ranks
from statewise.report.summary import show_interval
from statewise.tasks import tasks

LENGTHS = (20, 40, 80, 160)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    said = write_all(several(), out)
    assert {p.name for p in out.iterdir()} == {
        "report.html", "leaderboard.md", "leaderboard.csv", "results.csv", "lengths.csv"
    }  # fmt: skip
    assert all(p.name in " ".join(said) for p in out.iterdir())
    return out


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_each_task_has_a_section_and_the_overview_leads_there(page):
    assert re.findall(r'<article id="(board\d)"', page) == re.findall(r'<a href="#(board\d)">', page)
    assert page.count("<article") == page.count("</article>") == len(TASKS)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for name in re.findall(r' (?:aria-labelledby|for)="([^"]+)"', page):
        assert name in ids


def test_a_line_has_one_colour_on_every_board():
    boards = boards_of(several())
    for name in LAYERS:
        found = {r.index for b in boards for r in leaderboard(b) if r.name == f"{name} width=32"}
        assert len(found) == 1
    assert len({r.index for r in leaderboard(boards[1]) if r.kind in ("layer", "failed")}) == 6


def test_the_overview_has_the_means_of_the_boards():
    boards = boards_of(several())
    found = matrix(boards)
    assert [name for name, _, _ in found["heads"]] == [b["name"] for b in boards]
    for row in found["rows"]:
        for board, cell in zip(boards, row["cells"], strict=True):
            line = next((r for r in leaderboard(board) if r.name == row["name"]), None)
            if line is None:
                assert cell["text"] == "–" and cell["words"] == "not run"
            elif not line.scores:
                assert cell["text"] == "failed" and "12 GiB" in cell["words"]
            else:
                assert cell["text"] == show_score(statistics.fmean(line.scores), board["task"]["metric"])
    for column, board in enumerate(boards):
        best = [row["name"] for row in found["rows"] if row["cells"][column]["kind"] == "best"]
        assert best == [next(r.name for r in leaderboard(board) if r.kind == "layer")]


def test_what_does_not_beat_the_baseline_says_so():
    made = several()
    made["boards"][0]["task"]["baseline"] = 0.999
    cells = [row["cells"][0] for row in matrix(boards_of(made))["rows"]]
    assert all(cell["kind"] == "below" for cell in cells if cell["text"] not in ("–", "failed"))
    said = "".join(p["name"] if isinstance(p, dict) else p for p in headline_of_all(boards_of(made)))
    assert "No layer beats the baseline on parity length=40." in said


def test_mean_ranks_are_of_layers_that_finished_everywhere():
    made = several()
    for cell in made["boards"][2]["layers"][0]["cells"]:
        cell.update(status="failed", reason="killed", curve=[])
    boards = boards_of(made)
    ranks = mean_ranks(boards)
    assert "gru width=32" not in ranks and len(ranks) == 4  # reservoir was run on one task alone
    for name, rank in ranks.items():
        assert rank == statistics.fmean(r.rank for b in boards for r in leaderboard(b) if r.name == name)
    assert list(ranks.values()) == sorted(ranks.values())


def test_equal_scores_share_their_places():
    made = several()
    made["boards"] = made["boards"][:1]
    for entry in made["boards"][0]["layers"]:
        for cell in entry["cells"]:
            cell["score"] = 0.75
    assert set(mean_ranks(boards_of(made)).values()) == {3.0}


def test_scores_by_length_are_the_same_in_the_page_the_tables_and_the_rows(folder, page):
    rows = read(folder / "lengths.csv")
    made = several()
    cells = [(b, c) for b in made["boards"] for e in b["layers"] for c in e["cells"] if c["status"] == "done"]
    assert len(rows) == len(cells) * len(LENGTHS)
    scores = {(b["name"], c["key"], s["length"]): s["score"] for b, c in cells for s in c["scores_by_length"]}
    for row in rows:
        score = scores[row["board"], row["key"], int(row["length"])]
        assert row["score"] == ("" if score is None else repr(score))  # to the last bit
        assert row["examples"] == "1024" and row["train_length"] == str(made_length(row["task"]))
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    markdown = (folder / "leaderboard.md").read_text(encoding="utf-8")
    for board in made["boards"]:
        for entry in board["layers"]:
            for n in LENGTHS:
                found = [scores.get((board["name"], c["key"], n)) for c in entry["cells"]]
                if all(found):
                    shown = show_score(statistics.fmean(found), board["task"]["metric"])
                    assert shown in text and shown in markdown


def made_length(task: str) -> int:
    return TASKS[task][1]


def test_length_charts_mark_the_training_length_chance_and_baseline(page):
    charts = [c for c in re.findall(r'<svg class="chart".*?</svg>', page, re.S) if "length of test examples" in c]
    assert len(charts) == len(TASKS)
    for chart, (_, trained) in zip(charts, TASKS.values()):
        assert "trained up to here" in chart and "chance" in chart and "baseline" in chart
        ticks = list(re.findall(r'text-anchor="middle" x="[\d.]+" y="[\d.]+">(\d+)<', chart))
        assert ticks == [str(n) for n in LENGTHS], trained


def test_the_training_length_stands_between_its_neighbours():
    points = tuple((float(n), 0.9, 0.9, 0.9) for n in LENGTHS)
    text = curves(
        [Curve("a", 0, points)], [Guide("chance", 0.5, "", ((20.0, 0.5), (160.0, 0.4)))], title="t", x_label="x",
        y_label="y", show_x=str, show_y=str, at=LENGTHS, mark=(60.0, "here"),
    )  # fmt: skip
    x = Axis(20 / 1.12, 160 * 1.12, 68, 480 - 24 - 7.6, log=True)
    place = float(re.search(r'<g class="guide"><line x1="([\d.]+)"', text).group(1))
    assert place == pytest.approx(x(60.0), abs=0.2) and x(40.0) < place < x(80.0)
    low, high = (float(p.split(",")[1]) for p in re.search(r'polyline points="([^"]+)"', text).group(1).split())
    assert low < high  # pixels grow downwards, chance falls
    assert text.count('class="mark"') == len(LENGTHS)


def test_guides_that_coincide_are_named_together():
    points = ((0.0, 0.6, 0.6, 0.6), (1.0, 0.7, 0.7, 0.7))
    text = curves([Curve("a", 0, points)], [Guide("chance", 0.5), Guide("baseline", 0.5)], title="t", x_label="x",
                  y_label="y", show_x=str, show_y=str)  # fmt: skip
    assert text.count('class="guide"') == 1 and ">chance, baseline<" in text


def test_failures_name_task_seed_and_length_and_leave_out_what_was_stopped(page):
    failed = html.unescape(page[page.index('id="failures"') : page.index('id="how"')])
    assert "on copy length=60, seed 0, at length 160: out of memory: 9 GiB" in failed
    assert failed.count("wanted 12 GiB") == 3 and "successive halving" not in failed
    assert page.count("stopped at step 100 by successive halving") == len(TASKS)


def test_every_seed_has_its_command(page):
    text = html.unescape(page)
    for board in several()["boards"]:
        for entry in board["layers"]:
            assert all(cell["command"] in text for cell in entry["cells"])


def test_the_leaderboard_as_csv_has_mean_and_interval(folder):
    rows = read(folder / "leaderboard.csv")
    boards = boards_of(several())
    assert len(rows) == sum(len(leaderboard(b)) for b in boards)
    for board in boards:
        mine = [r for r in rows if r["board"] == board["name"]]
        for row, line in zip(mine, leaderboard(board), strict=True):
            assert row["name"] == line.name and row["kind"] == line.kind
            if line.kind == "layer":
                assert float(row["mean"]) == line.mean and float(row["sd"]) == line.sd
                assert (float(row["low95"]), float(row["high95"])) == line.interval
            elif line.kind == "failed":
                assert row["mean"] == "" and row["seeds"] == "0"


def test_results_have_every_run_of_every_board(folder):
    rows = read(folder / "results.csv")
    made = several()
    count = sum(len(e["cells"]) + len(e["others"]) for b in made["boards"] for e in b["layers"])
    assert len(rows) == count + 2 * len(TASKS)
    pruned = [r for r in rows if r["status"] == "pruned"]
    assert len(pruned) == len(TASKS) and all(r["score"] == "" and r["chosen"] == "0" for r in pruned)


@pytest.mark.parametrize(
    ("interval", "metric", "words"),
    [
        ((0.951, 0.993), "accuracy", "95.1 to 99.3 %"), ((0.95, 1.04), "exact", "95.0 to 100.0 %"),
        ((-0.1, 0.5), "far", "0.0 to 50.0 %"), ((0.012346, 0.02), "loss", "0.01235 to 0.02"), (None, "accuracy", ""),
    ],
)  # fmt: skip
def test_intervals_as_words(interval, metric, words):
    assert show_interval(interval, metric) == words


def test_shares_are_the_metrics_that_end_at_one():
    """Of every generated task: what is better the higher it is, is shown in per cent; nothing else is."""
    generated = [info.cls for info in tasks if info.cls.data == "generated"]
    assert len(generated) >= 35
    for cls in generated:
        assert (cls.metric in SHARES) == cls.higher_is_better, cls.name
