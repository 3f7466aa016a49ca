"""The feature cache, with a tiny real teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from leafseg.errors import ConfigError
from leafseg.model.feature_cache import FeatureCache, cached_tokens
from leafseg.model.teachers import TransformersTeacher

pytest.importorskip("transformers")
from transformers import Dinov2Config, Dinov2Model

GRID = (2, 3)
KIB_180 = (240, 384)  # tokens of 180 KiB in half precision


class CountingTeacher(TransformersTeacher):
    """Counts the images that it encodes."""

    seen = 0

    def tokens(self, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        self.seen += len(images)
        return super().tokens(images, grid)


@pytest.fixture
def teacher() -> CountingTeacher:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
    return CountingTeacher(Dinov2Model(config), name="tiny", weights_sha256="0" * 64, mean=(0.5,) * 3, std=(0.5,) * 3)


def cache_for(teacher: CountingTeacher, directory: Path, max_mb: int = 1) -> FeatureCache:
    return FeatureCache(directory, teacher_fingerprint=teacher.fingerprint, grid=GRID, embed_dim=16, max_mb=max_mb)


def big_cache(directory: Path, fingerprint: str = "a" * 64) -> FeatureCache:
    return FeatureCache(directory, teacher_fingerprint=fingerprint, grid=(12, 20), embed_dim=384, max_mb=1)


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_what_was_put_comes_back_to_half_precision_also_in_a_new_cache(
    teacher: CountingTeacher, tmp_path: Path
) -> None:
    tokens = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    assert cache_for(teacher, tmp_path).put("abc|flip", tokens)
    again = cache_for(teacher, tmp_path)
    found = again.get("abc|flip")
    assert found is not None
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, tokens, rtol=2**-11, atol=1e-7)  # half has 11 bits of mantissa
    assert again.get("abc|plain") is None
    with pytest.raises(ValueError, match="holds"):
        again.put("abc", torch.zeros(5, 16))


def test_only_missing_images_are_encoded_and_values_do_not_depend_on_the_cache(
    teacher: CountingTeacher, tmp_path: Path
) -> None:
    images = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    cache = cache_for(teacher, tmp_path)
    first = cached_tokens(teacher, cache, ["a", "b", "c"], images, GRID)
    assert teacher.seen == 3
    assert torch.equal(cached_tokens(teacher, cache, ["a", "b", "c"], images, GRID), first)
    assert teacher.seen == 3
    mixed = cached_tokens(teacher, cache, ["c", "new", "a"], images[[2, 1, 0]], GRID)
    assert teacher.seen == 4
    torch.testing.assert_close(mixed, first[[2, 1, 0]])
    assert not first.requires_grad
    torch.testing.assert_close(first, teacher.tokens(images, GRID), rtol=2**-11, atol=1e-6)


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "zeros", "other shape", "nan", "pickle"])
def test_a_damaged_entry_counts_as_missing_and_is_replaced(
    damage: str, teacher: CountingTeacher, tmp_path: Path
) -> None:
    import numpy as np

    cache = cache_for(teacher, tmp_path)
    images = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    first = cached_tokens(teacher, cache, ["a"], images, GRID)
    (path,) = tmp_path.rglob("*.npy")
    data = path.read_bytes()
    if damage == "other shape":
        np.save(path, np.zeros((6, 15), np.float16))
    elif damage == "nan":
        np.save(path, np.full((6, 16), np.nan, np.float16))
    elif damage == "pickle":
        np.save(path, np.array([{"a": 1}], dtype=object))
    else:
        path.write_bytes({"cut": data[:-9], "empty": b"", "noise": b"\xff" * 99, "zeros": bytes(len(data))}[damage])
    assert cache.get("a") is None
    assert torch.equal(cached_tokens(teacher, cache, ["a"], images, GRID), first)
    assert teacher.seen == 2
    assert cache.get("a") is not None


def test_a_full_cache_keeps_what_it_has_and_stops_storing(tmp_path: Path) -> None:
    cache = big_cache(tmp_path)
    stored = [cache.put(str(index), torch.full(KIB_180, float(index))) for index in range(8)]
    assert stored == [True] * 5 + [False] * 3  # 1024 / 180.1 = 5.7
    assert size_of(tmp_path) <= 2**20
    assert [cache.get(str(index)) is not None for index in range(8)] == stored
    assert not big_cache(tmp_path).put("8", torch.zeros(KIB_180))  # what lay there counts in a new process too


def test_files_of_another_teacher_make_room(tmp_path: Path) -> None:
    old, new = big_cache(tmp_path, "a" * 64), big_cache(tmp_path, "b" * 64)
    for index in range(5):
        old.put(str(index), torch.zeros(KIB_180))
    new = big_cache(tmp_path, "b" * 64)
    assert all(new.put(str(index), torch.zeros(KIB_180)) for index in range(5))
    assert size_of(tmp_path) <= 2**20
    assert old.get("0") is None
    assert new.get("0") is not None


def test_putting_a_key_again_does_not_use_up_the_limit(tmp_path: Path) -> None:
    cache = big_cache(tmp_path)
    assert all(cache.put("same", torch.full(KIB_180, float(index))) for index in range(20))
    found = cache.get("same")
    assert found is not None
    assert found[0, 0] == 19


def test_values_beyond_half_precision_are_not_stored(teacher: CountingTeacher, tmp_path: Path) -> None:
    cache = cache_for(teacher, tmp_path)
    for value in (1e6, float("nan"), float("inf")):
        assert not cache.put("a", torch.full((6, 16), value))
    assert cache.get("a") is None


def test_teachers_and_grids_do_not_mix(teacher: CountingTeacher, tmp_path: Path) -> None:
    cache = cache_for(teacher, tmp_path)
    cache.put("a", torch.zeros(6, 16))
    turned = FeatureCache(tmp_path, teacher_fingerprint=teacher.fingerprint, grid=(3, 2), embed_dim=16, max_mb=1)
    assert turned.get("a") is None
    images = torch.rand(1, 3, 20, 20)
    with pytest.raises(ValueError, match="another"):
        cached_tokens(teacher, cache, ["a"], images, (3, 2))
    with pytest.raises(ValueError, match="2 keys for 1 images"):
        cached_tokens(teacher, cache, ["a", "b"], images, GRID)


def test_a_disk_that_refuses_ends_caching_but_not_the_run(teacher: CountingTeacher, tmp_path: Path) -> None:
    cache = cache_for(teacher, tmp_path)
    images = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    (folder,) = tmp_path.iterdir()
    folder.rmdir()
    folder.write_text("a file where the folder was")
    cached_tokens(teacher, cache, ["a"], images, GRID)
    cached_tokens(teacher, cache, ["a"], images, GRID)
    assert teacher.seen == 2


def test_a_folder_that_cannot_be_made_names_the_setting(teacher: CountingTeacher, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"teacher\.cache_dir"):
        cache_for(teacher, tmp_path / "file" / "cache")
