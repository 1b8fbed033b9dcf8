import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from hf_vla.report import write_report
from hf_vla.report.charts import CHART_POINTS, memory_chart, training_charts
from hf_vla.report.findings import beats_random, listens, sees
from hf_vla.report.page import PICTURE_BYTES, contact_sheets, offline_rows
from hf_vla.report.run_files import Event, LogLine, MemoryLine, Offline, Run, wilson

RECIPE = {
    "about": {"purpose": "A first <try> & no more"},
    "model": {
        "vggt": "facebook/VGGT-1B",
        "freeze_vggt": True,
        "freeze_lang_encoder": True,
        "fusion": {"type": "gated"},
    },
    "lora": {"apply_to": ["lang_encoder"], "r": 16},
    "data": {"dataset": "demos", "views": [{"camera": "front", "offset": 0}, {"camera": "wrist", "offset": -3}]},
    "evaluation": {"swapped": {"faucet-open": "faucet-close"}},
}
OFFLINE = {
    "names": ["x", "gripper"],
    "policy": {"mae": [0.0123, 0.5], "mean_mae": 0.25615, "gripper_accuracy": 0.9},
    "mean_action": {"mae": [0.2, 0.4], "mean_mae": 0.3, "gripper_accuracy": 0.95},
    "hold_still": {"mae": [0.3, 0.6], "mean_mae": 0.45},
    "windows": 40,
    "episodes": 2,
}


def counts(**successes):
    return {task.replace("_", "-"): {"successes": k, "episodes": 20} for task, k in successes.items()}


@pytest.fixture
def full_run(tmp_path):
    """A run that holds everything that a run may hold."""
    swapped = {"faucet-open": {"successes": 19, "episodes": 20, "own_task_successes": 1}, "mean_success": 0.95}
    run = {
        "hf_vla": "0.1.0",
        "commit": "0123456789abcdef",
        "machine": {"cpu": "two cores"},
        "versions": {"torch": "9.8.7"},
        "parameters": {"trained": 2_000_000, "frozen": 6_000_000},
        "train": {"loss": 0.1, "eval_loss": 0.2},
        "offline": OFFLINE,
        "rollouts": {**counts(button=17, faucet_open=20), "mean_success": 0.925},
        "rollouts_without_pictures": counts(button=3, faucet_open=20),
        "rollouts_swapped_instruction": swapped,
        "rollouts_random": counts(button=0, faucet_open=0),
        "memory": {"planned_peak_bytes": 10 * 2**30, "budget_bytes": 12 * 2**30, "measured_peak_bytes": 11 * 2**30},
        "events": [{"time": "2025-01-02T03:04:05", "step": 2, "kind": "out_of_memory", "text": "again as 2 x 4"}],
    }
    history = [{"step": step, "loss": 1 / step, "grad_norm": 1.0, "learning_rate": 1e-3} for step in range(1, 5)]
    steps = [{"step": step, "allocated_peak": step * 2**30, "retries": 1, "budget": None} for step in range(1, 5)]
    episode = {"task": "open it", "episode_index": 7, "fps": 10, "names": ["x", "<g>"]}
    episode |= {"recorded": [[0, 1], [1, 1]], "predicted": [[0.1, 1], [0.9, 1]]}
    write(tmp_path / "recipe.json", RECIPE)
    write(tmp_path / "run.json", run)
    write(tmp_path / "log_history.json", [*history, {"step": 4, "eval_loss": 0.3}, {"step": 4, "train_runtime": 1.0}])
    write(tmp_path / "episode.json", episode)
    (tmp_path / "memory.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    for condition in ("policy", "random"):
        (tmp_path / "rollouts" / condition).mkdir(parents=True)
        Image.new("RGB", (64, 32), "teal").save(tmp_path / "rollouts" / condition / "button.png")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path


def write(path, value):
    path.write_text(json.dumps(value))


def page_of(run_dir):
    return write_report(run_dir).read_text(encoding="utf-8")


def words_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL))


class Outline(HTMLParser):
    """Collect what makes a page self-contained and readable by a machine voice."""

    def __init__(self):
        super().__init__()
        self.sources, self.ids, self.unnamed, self.open = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.sources += [attrs[key] for key in ("src", "href", "xlink:href") if key in attrs]
        self.ids += [attrs["id"]] if "id" in attrs else []
        if (tag == "img" and not attrs.get("alt")) or (tag == "svg" and not attrs.get("aria-label")):
            self.unnamed.append(tag)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "img", "br", "link"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_full_run_fills_every_section(full_run):
    words = words_of(page_of(full_run))
    assert re.findall(r"Not (?:measured|recorded): (?:run\.json|this run) has no (\S+)", words) == ["rollouts_expert"]
    for text in ("92 %", "0.256", "2.00 M", "11.00 GiB", "+10.0 %", "again as 2 x 4", "9.8.7", "Allocator retries: 1"):
        assert text in words, text


def test_page_loads_nothing_and_is_well_formed(full_run):
    outline = Outline()
    page = page_of(full_run)
    outline.feed(page)
    assert outline.open == []
    assert outline.unnamed == []
    assert all(source.startswith(("data:image/", "#")) for source in outline.sources)
    assert len(set(outline.ids)) == len(outline.ids)
    assert "<script" not in page and "@import" not in page


def test_words_from_files_are_escaped(full_run):
    page = page_of(full_run)
    assert "A first &lt;try&gt; &amp; no more" in page
    assert "<try>" not in page and "<g>:" not in page
    assert "<figcaption>&lt;g&gt;</figcaption>" in page


def test_recipe_is_told_in_plain_words(full_run):
    words = words_of(page_of(full_run))
    assert "frozen VGGT, facebook/VGGT-1B . It sees front and wrist (-3 frames)" in words
    assert "LoRA, rank 16 LLaMA" in words
    assert "gated , a gate on the picture tokens" in words


def test_bare_run_names_everything_missing(tmp_path):
    write(tmp_path / "recipe.json", {})
    write(tmp_path / "run.json", {"rollouts": None, "memory": None})
    words = words_of(page_of(tmp_path))
    for name in ("log_history.json", "episode.json", "memory.jsonl", "rollouts/", "model/"):
        assert f"this run has no {name} ." in words, name
    for key in ("rollouts", "offline"):
        assert f"run.json has no {key} ." in words, key


def test_same_files_give_the_same_page(full_run):
    assert page_of(full_run) == page_of(full_run)


@pytest.mark.parametrize("name", ["recipe.json", "run.json"])
def test_directory_that_is_no_run_is_refused(full_run, name):
    (full_run / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        write_report(full_run)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("run.json", "{", "JSON"),
        ("run.json", '{"rollouts": {"reach": {"successes": 1, "episodes": 0}}}', "rollouts.reach"),
        ("run.json", json.dumps({"offline": OFFLINE | {"names": ["x"]}}), "2 numbers for 1 names"),
        ("recipe.json", "[]", "whole file"),
        ("log_history.json", '[{"loss": 1}]', "0.step"),
        ("memory.jsonl", '{"step": 1}\n{"step"', "JSON"),
        ("episode.json", '{"names": ["x"]}', "task"),
        ("rollouts/policy/button.png", "no picture", "picture"),
    ],
)
def test_malformed_file_is_named_and_leaves_no_page(full_run, name, content, reason):
    (full_run / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        write_report(full_run)
    assert reason in str(error.value)
    assert not (full_run / "report.html").exists()


def test_wilson_agrees_with_published_values():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_only_separate_intervals_make_a_finding():
    run = Run(rollouts=counts(a=17, b=12, c=2), rollouts_random=counts(a=0, b=9, c=18))
    finding = beats_random(run)
    assert finding.verdict == "partly"
    assert "random actions: a." in finding.text
    assert "overlap, so nothing can be said, on b." in finding.text
    assert "opposite holds on c." in finding.text


def test_recorded_interval_goes_before_our_own():
    wide = {"a": {"successes": 17, "episodes": 20, "interval": [0.1, 1.0]}}
    assert sees(Run(rollouts=counts(a=17), rollouts_without_pictures=counts(a=3))).verdict == "shown"
    assert sees(Run(rollouts=wide, rollouts_without_pictures=counts(a=3))).verdict == "not shown"


def test_nothing_is_concluded_from_what_is_not_measured():
    finding = sees(Run(rollouts=counts(a=20)))
    assert finding.verdict == "not measured"
    assert "rollouts_without_pictures" in finding.text


def test_policy_deaf_to_its_instruction_is_not_said_to_listen():
    """It always opens the faucet: full marks on its own task, and on the swap that says open."""
    swapped = {
        "faucet-open": {"successes": 0, "episodes": 20, "own_task_successes": 20},
        "faucet-close": {"successes": 20, "episodes": 20, "own_task_successes": 0},
    }
    deaf = Run(rollouts=counts(faucet_open=20, faucet_close=0), rollouts_swapped_instruction=swapped)
    assert listens(deaf).verdict == "not shown"
    swapped["faucet-open"] = {"successes": 20, "episodes": 20, "own_task_successes": 0}
    heeding = Run(rollouts=counts(faucet_open=20, faucet_close=20), rollouts_swapped_instruction=swapped)
    assert listens(heeding).verdict == "shown"


def test_offline_rows_mark_the_best_and_align_decimals():
    rows = {row.label: row for row in offline_rows(Offline(**OFFLINE))}
    assert rows["x"].values == {"policy": "0.0123", "mean_action": "0.2000", "hold_still": "0.3000"}
    assert rows["x"].best == {"policy"}
    assert rows["gripper"].best == {"mean_action"}
    assert rows["gripper accuracy"].best == {"mean_action"}
    assert "hold_still" not in rows["gripper accuracy"].values


def test_reason_for_skipped_rollouts_is_told(full_run):
    write(full_run / "run.json", {"rollouts_skipped": "no graphics library"})
    assert "skipped: no graphics library" in words_of(page_of(full_run))


def test_thinned_memory_keeps_its_highest_step():
    steps = [MemoryLine(step=step, allocated_peak=2**30) for step in range(CHART_POINTS * 7)]
    steps[3001] = MemoryLine(step=3001, allocated_peak=9 * 2**30)
    chart = memory_chart(steps, [Event(kind="out_of_memory", step=3001)])
    assert len(chart.lines) == 1
    assert len(chart.lines[0].x) <= CHART_POINTS
    assert max(chart.lines[0].y) == 9
    assert "highest of 7" in chart.note


def test_memory_of_steps_that_were_done_again_is_drawn_once():
    steps = [
        MemoryLine(step=step, allocated_peak=2**30 * size) for step, size in ((1, 1), (2, 2), (3, 3), (2, 4), (3, 5))
    ]
    (line,) = memory_chart(steps, []).lines
    assert (line.x, line.y) == ([1, 2, 3], [1, 4, 5])


def test_memory_of_a_run_without_a_gpu_is_the_hosts(full_run):
    (full_run / "memory.jsonl").write_text('{"step": 1, "allocated_peak": null, "host_rss": 2147483648}\n')
    assert "GiB of host memory" in words_of(page_of(full_run))
    chart = memory_chart([MemoryLine(step=1, allocated_peak=2**30, host_rss=2**31)], [])
    assert chart.title == "GiB on this process's GPU"


def test_memory_without_byte_counts_has_no_chart(full_run):
    (full_run / "memory.jsonl").write_text('{"step": 1, "allocated_peak": null}\n')
    assert "memory.jsonl holds no byte counts" in words_of(page_of(full_run))


def test_loss_that_is_not_a_number_is_still_drawn():
    history = [LogLine(step=1, loss=1.0), LogLine(step=2, loss=float("nan")), LogLine(step=3, loss=0.5)]
    assert [chart.title for chart in training_charts(history)] == ["Loss"]


def test_charts_take_their_colours_from_the_page():
    svg = training_charts([LogLine(step=1, loss=1.0), LogLine(step=2, loss=0.5)])[0].svg
    assert "var(--first)" in svg
    assert not re.search(r"#0000\d\d", svg)


def test_reading_a_run_needs_neither_torch_nor_matplotlib():
    code = "import sys, hf_vla.report; sys.exit(bool({'torch', 'matplotlib', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_many_sheets_fit_the_page(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    for task in range(6):
        (tmp_path / "policy").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "policy" / f"task-{task}.png")
    sheets = contact_sheets(tmp_path)["policy"]
    assert len(sheets) == 6
    assert sum(len(sheet.uri) for sheet in sheets) < 1.4 * PICTURE_BYTES
    assert all(sheet.uri.startswith("data:image/jpeg") for sheet in sheets)
