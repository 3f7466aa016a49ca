"""What a frozen teacher says is asked for once, kept, and the same in a run that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from leafseg.config import TrainingSettings
from leafseg.data.dataset import PositionSampler
from leafseg.errors import DataError
from leafseg.training import teacher_pairs as module
from leafseg.training.teacher_pairs import PAIRS_FILE, teacher_pairs


class Numbers(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        position, index = key
        return {"x": torch.full((2, 3), index + position / 1000), "position": position}


class Teacher:
    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, batch: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
        assert seed == 5
        self.asked += len(batch["x"])
        return {"input": batch["x"], "wanted": batch["x"].sum((1, 2)) * 2}


def settings(**given: Any) -> TrainingSettings:
    return TrainingSettings(**{"batch_size": 4, "seed": 5, "steps": 100, **given})


def test_the_first_samples_of_the_stream_are_asked_for_once(tmp_path: Path) -> None:
    teacher = Teacher()
    pairs = teacher_pairs(Numbers(), teacher, tmp_path, settings(), most=23)
    assert len(pairs) == teacher.asked == 23
    keys = [key for batch in PositionSampler(n=10, seed=5, batch_size_global=8, num_steps=3) for key in batch][:23]
    source = Numbers()
    expected = default_collate([source[key] for key in keys])["x"]
    found = default_collate([pairs[0, index] for index in range(23)])
    assert torch.equal(found["input"], expected.half().float())
    assert torch.equal(found["wanted"], (expected.sum((1, 2)) * 2).half().float())


def test_no_more_than_the_steps_take_and_the_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(teacher_pairs(Numbers(), Teacher(), tmp_path, settings(steps=3), most=100)) == 12
    monkeypatch.setattr(module, "_MOST_MB", 210 / 2**20)  # a sample has 6 + 1 values of two bytes
    assert len(teacher_pairs(Numbers(), Teacher(), tmp_path, settings(), most=100)) == 15


def test_small_memory_asks_in_small_batches_for_the_same(tmp_path: Path) -> None:
    whole, parts = (
        teacher_pairs(Numbers(), Teacher(), tmp_path, settings(micro_batch_size=size), most=9) for size in (None, 2)
    )
    assert all(torch.equal(whole[0, i]["input"], parts[0, i]["input"]) for i in range(9))


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr(module, "save_file", refuse)
    with pytest.raises(DataError, match=r"pairs\.safetensors: cannot be written .*No space left.*free some space"):
        teacher_pairs(Numbers(), Teacher(), tmp_path, settings(), most=9)


def test_no_more_than_a_share_of_the_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    # Ten seconds of thirty: the end is read off at 0, and then the clock once before each batch but the first.
    pairs = teacher_pairs(Numbers(), Teacher(), tmp_path, settings(steps=None, minutes=0.5), most=1000)
    assert len(pairs) == 11 * 8


def test_a_run_goes_on_with_what_it_has_and_another_asks_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = teacher_pairs(Numbers(), Teacher(), tmp_path, settings(), most=9)
    anew = Teacher()
    teacher_pairs(Numbers(), anew, tmp_path, settings(), most=9)
    assert anew.asked == 9, "without run.json nothing says of which settings the file is"

    (tmp_path / "run.json").write_text("{}")
    idle = Teacher()
    again = teacher_pairs(Numbers(), idle, tmp_path, settings(), most=9)
    assert idle.asked == 0
    assert all(torch.equal(first[0, i][name], again[0, i][name]) for i in range(9) for name in ("input", "wanted"))

    for other in (settings(steps=1), settings(steps=None, minutes=1.0)):  # the stored number of steps goes on
        teacher_pairs(Numbers(), idle, tmp_path, other, most=100)
        assert idle.asked == 0

    longer = Teacher()
    assert len(teacher_pairs(Numbers(), longer, tmp_path, settings(), most=12)) == longer.asked == 12

    (tmp_path / PAIRS_FILE).write_bytes(b"broken")
    repaired = Teacher()
    assert len(teacher_pairs(Numbers(), repaired, tmp_path, settings(), most=12)) == repaired.asked == 12
    assert f"{PAIRS_FILE}: is damaged" in caplog.text
