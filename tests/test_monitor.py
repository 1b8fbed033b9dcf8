import json
import logging

import pytest
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_vla.memory import monitor
from hf_vla.memory.monitor import MemoryMonitor, Reading
from hf_vla.run import read_info

GIB = 2**30


class Linear(PreTrainedModel):
    """The least that a Trainer trains."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).square().mean()}


class Points(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"x": torch.ones(2) * i, "labels": torch.ones(1)}


def train(directory, **kwargs) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=4,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(Linear(PreTrainedConfig()), arguments, train_dataset=Points())
    trainer.add_callback(MemoryMonitor(directory, **kwargs))
    trainer.train()
    return trainer


def lines(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "memory.jsonl").read_text().splitlines()]


def test_every_optimizer_step_leaves_a_line(tmp_path):
    train(tmp_path, planned_peak=3 * GIB, budget=4 * GIB)
    written = lines(tmp_path)
    assert [line["step"] for line in written] == [1, 2, 3, 4]
    assert set(written[0]) == {
        *("step", "allocated_peak", "reserved_peak", "device_used", "retries", "planned_peak", "budget", "host_rss")
    }
    assert all(line["planned_peak"] == 3 * GIB and line["budget"] == 4 * GIB for line in written)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may be in use already")
def test_without_a_gpu_only_the_hosts_memory_is_told(tmp_path):
    train(tmp_path)
    for line in lines(tmp_path):
        assert line["allocated_peak"] is line["reserved_peak"] is line["device_used"] is line["retries"] is None
        assert 50 * 2**20 < line["host_rss"] < 100 * GIB
    assert "events" not in read_info(tmp_path)


@pytest.fixture
def cuda(monkeypatch):
    """A GPU of 48 GiB whose counters the test sets; `calls` tells what was asked of it, in order."""

    class Cuda:
        allocated_peak, reserved, reserved_peak, others, retries = 3 * GIB, 4 * GIB, 5 * GIB, GIB, 2

        def memory_stats(self):
            return {
                "allocated_bytes.all.peak": self.allocated_peak,
                "reserved_bytes.all.peak": self.reserved_peak,
                "reserved_bytes.all.current": self.reserved,
                "num_alloc_retries": self.retries,
            }

        def mem_get_info(self):
            return 48 * GIB - self.reserved - self.others, 48 * GIB

    fake = Cuda()
    fake.calls = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", fake.memory_stats)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fake.mem_get_info)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: fake.calls.append("reset"))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: fake.calls.append(how))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: fake.calls.append(path))
    return fake


class Steps:
    """Drives a monitor as a Trainer does, a step at a time."""

    def __init__(self, directory, rank=0, **kwargs):
        self.args = TrainingArguments(output_dir=str(directory), use_cpu=True, report_to=[])
        self.state = TrainerState(is_world_process_zero=rank == 0, is_local_process_zero=rank == 0)
        self.control = TrainerControl()
        self.monitor = MemoryMonitor(directory, **kwargs)

    def step(self):
        self.monitor.on_step_begin(self.args, self.state, self.control)
        self.state.global_step += 1
        self.monitor.on_step_end(self.args, self.state, self.control)


def events(directory) -> list[tuple[int, str]]:
    return [(event["step"], event["kind"]) for event in read_info(directory).get("events", [])]


def test_counters_are_those_of_the_allocator_and_the_device(tmp_path, cuda):
    Steps(tmp_path).step()
    line = lines(tmp_path)[0]
    assert (line["allocated_peak"], line["reserved_peak"]) == (3 * GIB, 5 * GIB)
    assert (line["device_used"], line["retries"]) == (5 * GIB, 2)
    assert cuda.calls == ["reset"]


def test_each_episode_near_the_budget_is_told_once(tmp_path, cuda, caplog):
    steps = Steps(tmp_path, budget=10 * GIB, planned_peak=8 * GIB)
    with caplog.at_level(logging.WARNING):
        for peak in (9.0, 9.2, 9.4, 8.0, 9.5):
            cuda.reserved_peak = int(peak * GIB)
            steps.step()
    assert events(tmp_path) == [(2, "near_budget"), (5, "near_budget")]
    assert "92% of 10.00 GiB" in caplog.text and len(caplog.records) == 2


def test_another_process_that_takes_what_the_plan_counts_on_is_told(tmp_path, cuda):
    steps = Steps(tmp_path, planned_peak=20 * GIB)
    for others in (24, 27, 29, 30, 24, 29):  # 48 - 4 reserved - others are free, and 16 are still wanted
        cuda.others = others * GIB
        steps.step()
    assert events(tmp_path) == [(3, "memory_taken"), (6, "memory_taken")]
    text = read_info(tmp_path)["events"][0]["text"]
    assert "taken 5.00 GiB" in text and "15.00 GiB are free" in text and "16.00 GiB more" in text


def test_a_gpu_that_was_full_from_the_start_is_no_news(tmp_path, cuda):
    steps = Steps(tmp_path, planned_peak=20 * GIB)
    cuda.others = 40 * GIB
    steps.step()
    steps.step()
    assert events(tmp_path) == []


def test_what_this_run_itself_grows_by_is_not_anothers(tmp_path, cuda):
    steps = Steps(tmp_path, planned_peak=47 * GIB)
    for reserved in (4, 20, 46):
        cuda.reserved = reserved * GIB
        steps.step()
    assert events(tmp_path) == []


def test_other_ranks_write_beside_rank_0_and_warn_without_run_json(tmp_path, cuda, caplog, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "process_index", 3)
    cuda.reserved_peak = 10 * GIB
    steps = Steps(tmp_path, rank=3, budget=10 * GIB)
    steps.step()
    assert [path.name for path in tmp_path.iterdir()] == ["memory.rank3.jsonl"]
    assert "nears the budget" in caplog.text


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(monitor, "SECONDS_BETWEEN_LOOKS", 0.0)


def test_a_snapshot_on_request_holds_one_whole_step(tmp_path, cuda, impatient):
    steps = Steps(tmp_path)
    steps.step()
    (tmp_path / "memory_snapshot").touch()
    for _ in range(3):
        steps.step()
    start, path, stop = [call for call in cuda.calls if call != "reset"]
    assert start["max_entries"] > 0 and stop == {"enabled": None}
    assert path == str(tmp_path / "memory_snapshot_3.pickle")
    assert not (tmp_path / "memory_snapshot").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may be in use already")
def test_a_snapshot_without_a_gpu_is_declined(tmp_path, caplog):
    steps = Steps(tmp_path)
    (tmp_path / "memory_snapshot").touch()
    steps.step()
    assert "no memory snapshot" in caplog.text and not (tmp_path / "memory_snapshot").exists()


def test_the_logger_gets_gib_of_what_was_measured():
    reading = Reading(allocated_peak=GIB, reserved_peak=2 * GIB, device_used=3 * GIB, retries=0, host_rss=GIB // 2)
    assert monitor.log_values(reading) == {
        "memory/allocated_peak_gib": 1.0,
        "memory/reserved_peak_gib": 2.0,
        "memory/device_used_gib": 3.0,
        "memory/host_rss_gib": 0.5,
        "memory/retries": 0,
    }


@pytest.mark.gpu
def test_on_a_gpu_the_peaks_of_each_step_are_its_own(tmp_path):
    steps = Steps(tmp_path)
    torch.zeros(1, device="cuda")
    torch.empty(2**28, dtype=torch.uint8, device="cuda")
    steps.step()
    steps.monitor.on_step_begin(steps.args, steps.state, steps.control)
    torch.empty(2**24, dtype=torch.uint8, device="cuda")
    steps.monitor.on_step_end(steps.args, steps.state, steps.control)
    first, second = lines(tmp_path)
    assert first["allocated_peak"] < 2**28 and 2**24 <= second["allocated_peak"] < 2**25
    assert second["device_used"] > second["reserved_peak"] > 0
