"""Samples by position, and the order in which positions are asked for."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from leafseg.config import AugmentationSettings, DataSettings, PreprocessingSettings
from leafseg.data.dataset import PositionSampler, SegmentationDataset
from leafseg.data.images import write_png
from leafseg.data.manifest import Manifest, load_manifest
from leafseg.data.transforms import Augmentation, Preprocessor, augment, unpack_augmentation
from leafseg.errors import DataError

CHANGE = AugmentationSettings(rotation_degrees=20, scale=(0.9, 1.2), brightness=0.1)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for index in range(5):
        write_png(root / "images" / f"{index}.png", generator.integers(0, 256, (20, 24, 3)).astype(np.uint8))
        write_png(root / "masks" / f"{index}.png", (generator.random((20, 24)) > 0.5).astype(np.uint8) * 255)
    return load_manifest(root, settings=DataSettings())


def dataset(manifest: Manifest, **options: object) -> SegmentationDataset:
    values = {"augmentation": CHANGE, "seed": 1, "cache_mb": 16, **options}
    return SegmentationDataset(manifest, Preprocessor(PreprocessingSettings(size=(16, 16))), **values)


def equal(first: dict, second: dict) -> bool:
    return all(torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key])) for key in first)


def test_a_sample_has_the_documented_shapes_and_ranges(manifest: Manifest) -> None:
    sample = dataset(manifest)[7, 3]
    assert set(sample) == {"image", "labels", "augmentation", "index", "position"}
    assert sample["image"].shape == (3, 16, 16)
    assert sample["image"].dtype == torch.float32
    assert 0 <= sample["image"].min() <= sample["image"].max() <= 1
    assert sample["labels"].shape == (16, 16)
    assert sample["labels"].dtype == torch.int64
    assert set(sample["labels"].unique().tolist()) == {0, 1}
    assert (sample["position"], sample["index"]) == (7, 3)
    assert len(dataset(manifest)) == 5


def test_the_cache_and_the_order_of_asking_change_no_value(manifest: Manifest) -> None:
    keys = [(position, position % 5) for position in range(12)]
    cached, uncached = dataset(manifest), dataset(manifest, cache_mb=0)
    first = {key: cached[key] for key in keys}
    assert all(equal(uncached[key], first[key]) for key in keys)
    assert all(equal(cached[key], first[key]) for key in reversed(keys))


def test_a_cached_sample_is_not_read_again_and_an_uncached_one_is(manifest: Manifest, tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        for path in (manifest.root / kind).iterdir():
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / path.name).write_bytes(path.read_bytes())
    copy = load_manifest(tmp_path, settings=DataSettings())
    cached, uncached = dataset(copy), dataset(copy, cache_mb=0)
    before = cached[0, 2]
    uncached[0, 2]
    (tmp_path / "images" / "2.png").unlink()
    assert equal(cached[0, 2], before)
    with pytest.raises(DataError, match=r"2\.png: no such file"):
        uncached[0, 2]


def test_the_position_decides_the_augmentation_and_the_vector_tells_it(manifest: Manifest) -> None:
    plain, changed = dataset(manifest, augmentation=None), dataset(manifest)
    still = plain[0, 2]
    assert unpack_augmentation(still["augmentation"]) == Augmentation()
    assert equal({**plain[9, 2], "position": 0}, still)
    drawn = set()
    for position in range(4):
        sample = changed[position, 2]
        image, labels = augment(still["image"], still["labels"], unpack_augmentation(sample["augmentation"]))
        assert torch.equal(sample["image"], image)
        assert torch.equal(sample["labels"], labels)
        drawn.add(unpack_augmentation(sample["augmentation"]))
    assert len(drawn) == 4


def test_a_mixed_sample_holds_a_rectangle_of_another_one_labels_included(manifest: Manifest) -> None:
    flips = AugmentationSettings(horizontal_flip=True, vertical_flip=True)
    mixed = dataset(manifest, augmentation=flips.model_copy(update={"mix": 1.0}))
    plain, still = dataset(manifest, augmentation=flips), dataset(manifest, augmentation=None)
    boxes, turned = set(), set()
    for position in range(12):
        sample, own = mixed[position, 2], plain[position, 2]
        assert sample["mix_index"] != 2
        lender = still[0, sample["mix_index"]]
        change = unpack_augmentation(sample["mix_augmentation"])
        image, labels = augment(lender["image"], lender["labels"], change)
        top, left, bottom, right = sample["mix_box"].tolist()
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(sample["image"], torch.where(inside, image, own["image"]))
        assert torch.equal(sample["labels"], torch.where(inside, labels, own["labels"]))
        assert torch.equal(sample["augmentation"], own["augmentation"])
        boxes.add((top, left, bottom, right))
        turned.add(change)
    assert len(boxes) > 6
    assert len(turned) == 4, "the other sample is flipped by draws of its own"


def test_without_mixing_nothing_is_pasted_and_a_share_leaves_the_others_alone(manifest: Manifest) -> None:
    some = dataset(manifest, augmentation=CHANGE.model_copy(update={"mix": 0.5}))
    plain = dataset(manifest)
    untouched = 0
    for position in range(40):
        sample = some[position, 1]
        if not sample["mix_box"].any():
            untouched += 1
            assert equal(plain[position, 1], sample)
    assert 8 < untouched < 32


def test_another_seed_draws_another_augmentation(manifest: Manifest) -> None:
    first, second = (dataset(manifest, seed=seed)[0, 0]["augmentation"] for seed in (1, 2))
    assert not torch.equal(first, second)


def test_a_copy_for_another_process_leaves_the_cache_behind(manifest: Manifest) -> None:
    original = dataset(manifest)
    expected = original[3, 1]
    copy = pickle.loads(pickle.dumps(original))
    assert len(pickle.dumps(original)) < 20_000
    assert equal(copy[3, 1], expected)


def test_spawned_workers_give_the_same_batches(manifest: Manifest) -> None:
    def batches(workers: int) -> list[dict]:
        sampler = PositionSampler(n=5, seed=1, batch_size_global=4, num_steps=2)
        spawn = multiprocessing.get_context("spawn") if workers else None
        loader = DataLoader(
            dataset(manifest), batch_sampler=sampler, num_workers=workers, multiprocessing_context=spawn
        )
        return list(loader)

    here, there = batches(0), batches(1)
    assert len(here) == len(there) == 2
    assert all(equal(first, second) for first, second in zip(here, there, strict=True))


def test_samples_without_a_mask_are_refused(manifest: Manifest) -> None:
    samples = (manifest.samples[0], dataclasses.replace(manifest.samples[1], mask=None))
    bare = dataclasses.replace(manifest, samples=samples)
    with pytest.raises(DataError, match="1 samples have no mask"):
        dataset(bare)


def keys(**options: int) -> list[list[tuple[int, int]]]:
    return list(PositionSampler(**{"n": 7, "seed": 3, "num_steps": 6, **options}))


def test_every_epoch_visits_every_sample_once_in_another_order() -> None:
    order = [index for batch in keys(batch_size_global=7) for _, index in batch]
    epochs = [order[begin : begin + 7] for begin in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 4), st.integers(1, 5))
@settings(deadline=None)
def test_processes_and_micro_batches_share_the_same_positions(n: int, share: int, world: int, micro: int) -> None:
    together = {"n": n, "seed": 3, "batch_size_global": share * world, "num_steps": 3}
    whole = list(itertools.chain(*PositionSampler(**together)))
    assert [position for position, _ in whole] == list(range(3 * share * world))
    ranks = [list(PositionSampler(**together, rank=rank, world_size=world, micro_batch=micro)) for rank in range(world)]
    for batches in ranks:
        assert all(len(batch) <= micro for batch in batches)
        assert len(batches) == len(PositionSampler(**together, world_size=world, micro_batch=micro))
    per_step = len(ranks[0]) // 3
    merged = []
    for step in range(3):
        for batches in ranks:
            merged += itertools.chain(*batches[step * per_step : (step + 1) * per_step])
    assert merged == whole


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 5))
@settings(deadline=None)
def test_going_on_from_a_position_continues_the_same_stream(n: int, batch: int, done: int) -> None:
    options = {"n": n, "seed": 5, "batch_size_global": batch}
    whole = list(PositionSampler(**options, num_steps=6))
    assert list(PositionSampler(**options, start_position=done * batch, num_steps=6 - done)) == whole[done:]


def test_without_a_number_of_steps_the_stream_does_not_end_and_has_no_length() -> None:
    sampler = PositionSampler(n=2, seed=0, batch_size_global=3)
    assert len(list(itertools.islice(sampler, 50))) == 50
    with pytest.raises(TypeError, match="endless"):
        len(sampler)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size_global": 3, "world_size": 2}, "batch size is 3"),
        ({"batch_size_global": 0}, "batch size is 0"),
        ({"batch_size_global": 2, "rank": 1}, "rank is 1"),
        ({"batch_size_global": 2, "micro_batch": 0}, "micro batch is 0"),
        ({"batch_size_global": 2, "start_position": -1}, "start position is -1"),
    ],
)
def test_impossible_layouts_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PositionSampler(n=4, seed=0, **options)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="no training samples"):
        PositionSampler(n=0, seed=0, batch_size_global=1)
