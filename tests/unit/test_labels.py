"""Classes with names, overlapping labels and ignored pixels: from files to what training sees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch

from leafseg.config import AugmentationSettings, DataSettings, PreprocessingSettings, load_settings, override_settings
from leafseg.data.dataset import SegmentationDataset
from leafseg.data.images import write_png
from leafseg.data.manifest import IGNORE, LabelMap, Manifest, load_manifest, read_labels
from leafseg.data.transforms import Augmentation, Preprocessor, augment, unpack_augmentation
from leafseg.errors import DataError

CELLS = [[0, 1, 1], [2, 2, 0]]
NAMES = {1: "cytoplasm", 2: "nucleus"}


def folder(root: Path, *masks: object) -> Path:
    for index, mask in enumerate(masks):
        write_png(root / "images" / f"s{index}.png", np.full((2, 3), index, np.uint8))
        write_png(root / "masks" / f"s{index}.png", np.array(mask, np.uint8))
    return root


def overlapping_folder(root: Path, **labels: object) -> Path:
    """One 2x3 image a mask; ``labels`` are label=[mask, ...]."""
    for label, masks in labels.items():
        for index, mask in enumerate(masks):
            write_png(root / "images" / f"s{index}.png", np.full((2, 3), index, np.uint8))
            write_png(root / "masks" / label / f"s{index}.png", np.array(mask, np.uint8))
    return root


VESSEL = [[0, 255, 255], [0, 0, 0]]
TUMOUR = [[0, 1, 0], [1, 1, 0]]
NOTHING = [[0, 0, 0], [0, 0, 0]]


def load(data: Path, **settings: object) -> Manifest:
    return load_manifest(data, settings=DataSettings(**settings))


def complaint(data: Path, **settings: object) -> str:
    with pytest.raises(DataError) as caught:
        load(data, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def truth(manifest: Manifest, index: int = 0) -> np.ndarray:
    return read_labels(manifest.samples[index], manifest.label_map, reading=manifest.reading)


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_of_classes_come_from_the_setting_else_from_the_file_beside_the_images(tmp_path: Path) -> None:
    folder(tmp_path, CELLS)
    assert load(tmp_path).label_map.names == ("background", "class 1", "class 2")
    (tmp_path / "labels.json").write_text(json.dumps({"2": "nucleus", "1": "cytoplasm"}))
    assert load(tmp_path).label_map.names == ("background", "cytoplasm", "nucleus")
    assert load(tmp_path, label_names={1: "a", 2: "b"}).label_map.names == ("background", "a", "b")
    assert truth(load(tmp_path)).tolist() == CELLS
    assert truth(load(tmp_path)).dtype == np.uint8


def test_a_csv_takes_the_names_beside_it(tmp_path: Path) -> None:
    folder(tmp_path, CELLS)
    (tmp_path / "list.csv").write_text("image,mask\nimages/s0.png,masks/s0.png\n")
    (tmp_path / "labels.json").write_text('{"1": "cytoplasm", "2": "nucleus"}')
    assert load(tmp_path / "list.csv").label_map.names == ("background", "cytoplasm", "nucleus")


def test_the_names_can_be_written_on_the_command_line_and_survive_being_stored() -> None:
    settings = load_settings("leaf-tiny", overrides=["data.label_names={1: cytoplasm, 2: cell nucleus}"])
    assert settings.data.label_names == {1: "cytoplasm", 2: "cell nucleus"}
    again = type(settings).model_validate_json(settings.model_dump_json())
    assert again.data.label_names == settings.data.label_names
    changed = override_settings(settings, ["data.label_names={1: cell}"])
    assert changed.data.label_names == {1: "cell"}  # the whole table is replaced


def test_stated_classes_keep_their_ids_where_one_is_absent(tmp_path: Path) -> None:
    label_map = load(folder(tmp_path, [[0, 2, 2], [0, 0, 0]]), label_names=NAMES).label_map
    assert label_map.names == ("background", "cytoplasm", "nucleus")
    assert label_map.apply(np.array([[0, 1, 2]])).tolist() == [[0, 1, 2]]


def test_the_name_of_a_single_foreground_replaces_the_word_foreground(tmp_path: Path) -> None:
    folder(tmp_path, [[0, 255, 255], [0, 0, 0]])
    assert load(tmp_path, label_names={255: "lesion"}).label_map.names == ("background", "lesion")
    assert load(tmp_path, label_names={0: "skin", 255: "lesion"}).label_map.names == ("skin", "lesion")
    assert load(tmp_path, label_names={255: "lesion"}, mask_threshold=99).label_map.names == ("background", "lesion")
    cells = folder(tmp_path / "cells", CELLS)
    for wanted, name in (((2,), "nucleus"), ((1, 2), "foreground")):
        label_map = load(cells, label_names=NAMES, foreground_labels=wanted).label_map
        assert label_map.names == ("background", name)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"label_names": {1: "cytoplasm"}}, r"the masks hold 2, which the label names do not list"),
        ({"label_names": {1: "a", 2: "a"}}, "twice the same"),
        ({"label_names": {1: "a", 2: " "}}, "are empty"),
        ({"label_names": {0: "background"}}, "no value beside 0"),
        ({"label_names": {1: "a", 2: "b", -3: "c"}}, "below 0"),
        ({"label_names": NAMES, "ignore_label": 2}, "which data.ignore_label leaves out"),
    ],
)
def test_names_that_do_not_fit_the_masks_are_refused(tmp_path: Path, settings: dict, words: str) -> None:
    message = complaint(folder(tmp_path, CELLS), **settings)
    assert words in message
    assert "label_names" in message


@pytest.mark.parametrize("text", ["", "[]", '{"one": "a"}', '{"1": 2}', '{"1": "a"'])
def test_a_damaged_file_of_names_is_refused_by_its_path(tmp_path: Path, text: str) -> None:
    folder(tmp_path, CELLS)
    (tmp_path / "labels.json").write_text(text)
    message = complaint(tmp_path)
    assert "labels.json: not a readable table" in message
    assert '{"1": "cytoplasm", "2": "nucleus"}' in message


# --- ignored pixels ---------------------------------------------------------------------------------------------------


def test_ignored_pixels_get_an_id_of_their_own_and_are_no_class(tmp_path: Path) -> None:
    mask = [[0, 1, 255], [2, 0, 255]]
    folder(tmp_path, mask)
    assert "--set data.ignore_label=255" in complaint(tmp_path)
    manifest = load(tmp_path, ignore_label=255)
    assert manifest.label_map.names == ("background", "class 1", "class 2")
    assert truth(manifest).tolist() == [[0, 1, IGNORE], [2, 0, IGNORE]]


def test_any_mask_value_can_be_the_ignored_one(tmp_path: Path) -> None:
    manifest = load(folder(tmp_path, [[0, 7, 200], [200, 7, 0]]), ignore_label=7)
    assert manifest.label_map.names == ("background", "foreground")
    assert truth(manifest).tolist() == [[0, IGNORE, 1], [1, IGNORE, 0]]
    soft = load(folder(tmp_path / "soft", [[0, 7, 200], [90, 7, 0]]), ignore_label=7, mask_threshold=127)
    assert truth(soft).tolist() == [[0, IGNORE, 1], [0, IGNORE, 0]]
    chosen = load(folder(tmp_path / "ids", [[0, 1, 2], [3, 7, 0]]), ignore_label=7, foreground_labels=(1, 3))
    assert truth(chosen).tolist() == [[0, 1, 0], [1, IGNORE, 0]]


def test_masks_of_nothing_but_ignored_pixels_are_refused(tmp_path: Path) -> None:
    assert "every pixel of every mask is 255" in complaint(
        folder(tmp_path, [[255, 255, 255], [255, 255, 255]]), ignore_label=255
    )


def test_training_sees_ignored_pixels_as_such(tmp_path: Path) -> None:
    manifest = load(folder(tmp_path, [[0, 1, 255], [2, 0, 255]]), ignore_label=255)
    preprocessor = Preprocessor(PreprocessingSettings(size=(16, 24)))
    sample = SegmentationDataset(manifest, preprocessor, augmentation=None, seed=0, cache_mb=1)[0, 0]
    assert sample["labels"].dtype == torch.int64
    assert (sample["labels"][:, 16:] == IGNORE).all()
    assert (sample["labels"][:8, 8:16] == 1).all()


# --- overlapping labels -----------------------------------------------------------------------------------------------


def test_a_folder_a_label_makes_overlapping_labels(tmp_path: Path) -> None:
    data = overlapping_folder(tmp_path, vessel=[VESSEL, NOTHING], tumour=[TUMOUR, TUMOUR])
    manifest = load(data)
    assert manifest.label_map == LabelMap(
        ((0, 0), (1, 1), (255, 1)), ("tumour", "vessel"), ignore=None, overlapping=True
    )
    first = manifest.samples[0]
    assert first.mask is None
    assert first.has_labels
    assert [(label, path.parent.name, path.name) for label, path in first.label_masks] == [
        ("tumour", "tumour", "s0.png"),
        ("vessel", "vessel", "s0.png"),
    ]
    assert truth(manifest).dtype == bool
    assert truth(manifest).tolist() == [(np.array(TUMOUR) > 0).tolist(), (np.array(VESSEL) > 0).tolist()]
    assert not truth(manifest, 1)[1].any()


def test_columns_of_a_csv_make_overlapping_labels_in_their_order_and_spelling(tmp_path: Path) -> None:
    overlapping_folder(tmp_path, vessel=[VESSEL], tumour=[TUMOUR])
    table = tmp_path / "list.csv"
    table.write_text("Image,Mask.Vessel,mask. Tumour \nimages/s0.png,masks/vessel/s0.png,masks/tumour/s0.png\n")
    manifest = load(table)
    assert manifest.label_map.names == ("Vessel", "Tumour")
    assert truth(manifest)[0].tolist() == (np.array(VESSEL) > 0).tolist()
    table.write_text("image,mask.a,mask.b\nimages/s0.png,masks/vessel/s0.png,\n")
    assert "1 row has no mask (line 2: images/s0.png), fill in every column 'mask.LABEL'" in complaint(table)
    table.write_text("image,mask,mask.a\nimages/s0.png,masks/vessel/s0.png,masks/vessel/s0.png\n")
    assert "give one column 'mask', or for overlapping labels" in complaint(table)


def test_a_label_mask_that_is_missing_is_an_error_and_no_absence(tmp_path: Path) -> None:
    overlapping_folder(tmp_path, vessel=[VESSEL, VESSEL], tumour=[TUMOUR])
    message = complaint(tmp_path)
    assert "1 image has no mask in masks/tumour/ (s1.png), an image without the label needs an empty mask" in message
    with pytest.raises(DataError, match="has no mask in masks/tumour/"):
        load_manifest(tmp_path, settings=DataSettings(), require_masks=False)


def test_images_without_any_label_are_accepted_where_no_masks_are_needed(tmp_path: Path) -> None:
    overlapping_folder(tmp_path, vessel=[VESSEL], tumour=[TUMOUR])
    write_png(tmp_path / "images" / "s1.png", np.zeros((2, 3), np.uint8))
    manifest = load_manifest(tmp_path, settings=DataSettings(), require_masks=False)
    assert [sample.has_labels for sample in manifest.samples] == [True, False]
    assert manifest.label_map.names == ("tumour", "vessel")


def test_files_beside_label_folders_are_refused(tmp_path: Path) -> None:
    overlapping_folder(tmp_path, vessel=[VESSEL])
    write_png(tmp_path / "masks" / "s0.png", np.array(VESSEL, np.uint8))
    assert "masks/ holds 1 files beside a folder a label (vessel)" in complaint(tmp_path)


def test_a_label_mask_of_another_size_is_named(tmp_path: Path) -> None:
    overlapping_folder(tmp_path, vessel=[VESSEL], tumour=[[[0, 1]]])
    assert "masks/tumour/s0.png is 2x1, its image is 3x2" in complaint(tmp_path)


@pytest.mark.parametrize(
    ("masks", "settings", "words"),
    [
        ([VESSEL, [[0, 128, 0], [0, 0, 0]]], {}, "label vessel hold 128, 255 beside 0"),
        ([NOTHING], {}, "all masks are empty"),
        ([VESSEL], {"foreground_labels": (1,)}, "data.foreground_labels cannot apply to"),
        ([VESSEL], {"ignore_label": 9}, "data.ignore_label cannot apply to"),
        ([VESSEL], {"label_names": NAMES}, "data.label_names (or labels.json) cannot apply to"),
    ],
)
def test_what_makes_no_sense_for_overlapping_labels_is_refused(
    tmp_path: Path, masks: list, settings: dict, words: str
) -> None:
    assert words in complaint(overlapping_folder(tmp_path, vessel=masks), **settings)


def test_a_threshold_makes_soft_label_masks_hard(tmp_path: Path) -> None:
    soft = [[0, 3, 127], [128, 250, 255]]
    manifest = load(overlapping_folder(tmp_path, vessel=[soft], bone=[NOTHING]), mask_threshold=127)
    assert truth(manifest).tolist() == [np.zeros((2, 3), bool).tolist(), (np.array(soft) > 127).tolist()]


def test_slices_of_a_volume_have_their_overlapping_labels(tmp_path: Path) -> None:
    voxels = np.zeros((3, 4, 5), np.uint8)
    for place, marked in (("images/v", ()), ("masks/a/v", (0, 1, 2)), ("masks/b/v", (2, 3, 4))):
        mask = voxels.copy()
        if marked:
            mask[marked] = 1
        path = tmp_path / f"{place}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(mask), path)
    manifest = load(tmp_path)
    where = [(index, *np.argwhere(truth(manifest, index)).tolist()) for index in range(3)]
    assert where == [(0, [0, 1, 2]), (1,), (2, [1, 3, 4])]


def test_overlapping_labels_are_moved_with_their_image(tmp_path: Path) -> None:
    data = overlapping_folder(tmp_path, vessel=[VESSEL], tumour=[TUMOUR])
    preprocessor = Preprocessor(PreprocessingSettings(size=(16, 24)))
    plain = SegmentationDataset(load(data), preprocessor, augmentation=None, seed=0, cache_mb=1)[0, 0]
    assert plain["labels"].dtype == torch.bool
    assert torch.equal(plain["labels"][:, ::8, ::8], torch.tensor([TUMOUR, VESSEL]) > 0)
    change = AugmentationSettings(vertical_flip=True, rotation_degrees=30, scale=(0.8, 1.2), translation=0.1)
    changed = SegmentationDataset(load(data), preprocessor, augmentation=change, seed=0, cache_mb=1)
    for position in range(4):
        sample = changed[position, 0]
        # Each label alone goes the way that a binary mask goes.
        drawn = unpack_augmentation(sample["augmentation"])
        alone = [augment(plain["image"], layer.long(), drawn)[1] for layer in plain["labels"]]
        assert torch.equal(sample["labels"], torch.stack(alone) > 0)


def test_padding_holds_no_label() -> None:
    preprocessor = Preprocessor(PreprocessingSettings(size=(16, 16), fit="pad"))
    labels = np.ones((2, 4, 8), bool)
    placed = preprocessor.apply_labels(labels, preprocessor.placement((4, 8)))
    assert placed.dtype == torch.bool
    assert placed[:, 4:12].all()
    assert not placed[:, :4].any()
    assert not placed[:, 12:].any()


def test_beyond_the_border_no_label_is_drawn() -> None:
    labels = torch.ones(2, 8, 8, dtype=torch.bool)
    _, moved = augment(torch.zeros(3, 8, 8), labels, Augmentation(shift_x=0.5))
    assert moved.dtype == torch.bool
    assert moved[:, :, 4:].all()
    assert not moved[:, :, :4].any()
