"""DICOM Segmentation objects, through highdicom, and the coded names of their segments.

Patient and study are copied from the source by highdicom, as the standard asks; nothing of them is looked at here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from leafseg.data.dicom import frame_order, read_grid, series_at
from leafseg.errors import ConfigError, DataError, LeafsegError, MissingExtraError
from leafseg.files import atomic_path, read_json
from leafseg.outputs.result import Labelled

NOTICE = "Research use only, not a medical device"  # a LO element: at most 64 characters
_LABEL = "LEAFSEG"  # a CS element: at most 16 capitals
# DICOM leaves these empty where they are unknown, but anonymised files often lack them altogether.
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime"),
)
# The standard's own lists of what may be segmented (CID 7191...), each with the category that it belongs to (CID 7150).
_TYPES_OF_CATEGORY = {
    "AnatomicalStructure": "cid7192",
    "Tissue": "cid7191",
    "MorphologicallyAbnormalStructure": "cid7194",
    "BodySubstance": "cid7197",
    "PhysicalObject": "cid7193",
    "Substance": "cid7198",
}
# Usual names of labels that those lists know under another one.
_ALIASES = {
    "tumor": "neoplasm",
    "tumour": "neoplasm",
    "lesions": "lesion",
    "vessel": "bloodvessel",
    "vessels": "bloodvessel",
    "lungs": "lung",
    "kidneys": "kidney",
    "haemorrhage": "hemorrhage",
    "oedema": "edema",
}


@dataclass(frozen=True)
class CodedName:
    """A coded concept: ``value`` in the coding ``scheme`` (``SCT``, ``DCM``, ``99LOCAL``...), and its ``meaning``."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True)
class SegmentCodes:
    """What DICOM wants to know about a label.

    Attributes:
        category: for example (91723000, SCT, "Anatomical Structure").
        type: for example (10200004, SCT, "Liver").
        algorithm: name of what made it.
    """

    category: CodedName
    type: CodedName
    algorithm: str = "leafseg"


_TISSUE = CodedName("85756007", "SCT", "Tissue")
GENERIC = SegmentCodes(_TISSUE, _TISSUE)


def require_dicom_packages() -> None:
    """Find out before hours of work.

    Raises:
        MissingExtraError: if highdicom is not installed.
    """
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            'DICOM segmentations need a package that is not installed (highdicom): pip install "leafseg[dicom]"'
        ) from error


def read_segment_codes(path: Path, names: Sequence[str]) -> dict[str, SegmentCodes]:
    """The codes in a JSON file: ``{"liver": {"category": {...}, "type": {...}, "algorithm": "..."}}``.

    ``category`` and ``type`` hold ``value``, ``scheme`` and ``meaning``; ``category`` may be left out for an anatomical
    structure, ``algorithm`` for leafseg.

    Args:
        path: the file.
        names: the model's labels, without the background.

    Raises:
        DataError: if the file cannot be read.
        ConfigError: for a label that the model does not have, or an entry of another form.
    """
    codes: dict[str, SegmentCodes] = {}
    for name, entry in read_json(path).items():
        if name not in names:
            raise ConfigError(f"{path}: describes {name!r}, which is no label of the model; it has {', '.join(names)}")
        unknown = sorted(set(entry) - {"category", "type", "algorithm"}) if isinstance(entry, dict) else ["its form"]
        if unknown or "type" not in entry or not isinstance(entry.get("algorithm", ""), str):
            what = f"not known is {', '.join(unknown)}" if unknown else "type is missing, or algorithm is no text"
            raise ConfigError(f"{path}: {name!r} must hold type, and may hold category and algorithm; {what}")
        anatomy = {"value": "91723000", "scheme": "SCT", "meaning": "Anatomical Structure"}
        codes[name] = SegmentCodes(
            category=_coded(path, f"{name}.category", entry.get("category", anatomy)),
            type=_coded(path, f"{name}.type", entry["type"]),
            algorithm=entry.get("algorithm", "leafseg"),
        )
    return codes


def _coded(path: Path, where: str, entry: Any) -> CodedName:
    keys = ("value", "scheme", "meaning")
    texts = isinstance(entry, dict) and all(isinstance(text, str) and text for text in entry.values())
    if not texts or set(entry) != set(keys):
        raise ConfigError(f"{path}: {where} must hold the texts {', '.join(keys)}, and nothing else")
    for key, limit in (("value", 16), ("scheme", 16), ("meaning", 64)):  # SH, SH and LO elements
        if len(entry[key]) > limit:
            raise ConfigError(f"{path}: {where}.{key} has {len(entry[key])} characters; DICOM takes at most {limit}")
    return CodedName(**entry)


def default_codes(name: str) -> SegmentCodes:
    """Codes by a label's name, where the standard's lists of segmentable things have it ("liver", "white matter").

    Anything else is coded as tissue: the label itself stays readable as the segment's label.

    Raises:
        MissingExtraError: if pydicom is not installed.
    """
    require_dicom_packages()
    from pydicom.sr.codedict import codes

    wanted = "".join(c for c in name.lower() if c.isalnum()).replace("grey", "gray")
    wanted = _ALIASES.get(wanted, wanted)
    for category, context in _TYPES_OF_CATEGORY.items():
        group = getattr(codes, context)
        for keyword in group.dir():
            if keyword.lower() == wanted:
                found, kind = getattr(group, keyword), getattr(codes.cid7150, category)
                return SegmentCodes(
                    CodedName(kind.value, kind.scheme_designator, kind.meaning),
                    CodedName(found.value, found.scheme_designator, found.meaning),
                )
    return GENERIC


def write_dicom_seg(
    path: Path, source: Path, labelled: Labelled, *, codes: Mapping[str, SegmentCodes], probability: bool = False
) -> None:
    """Write a segmentation of DICOM images; one segment a label, on the source's own frames.

    Frames without any label are left out, as is usual; if no frame has one, all are written, empty.

    Args:
        path: the new file.
        source: a DICOM file, or a folder with one series.
        labelled: frames in the order in which the source is read as a volume.
        codes: coded names of the labels that have them; the others get :func:`default_codes`.
        probability: write the probabilities as a FRACTIONAL segmentation (8 bits, 255 is 1) instead of the labels.

    Raises:
        DataError: if the source lacks what a segmentation must copy, or the system refuses to write.
        MissingExtraError: if highdicom is not installed.
    """
    require_dicom_packages()
    import highdicom
    import pydicom

    try:
        # Sloppy values in the source are not ours to mend, and whoever is told of them would be told of a patient.
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            datasets = [pydicom.dcmread(file, stop_before_pixels=True) for file in series_at(source).files]
            slice_mm = read_grid(source).geometry.spacing_mm[2]
            for dataset in datasets:
                _complete(dataset, source, slice_mm=slice_mm)
            segmentation = highdicom.seg.Segmentation(
                source_images=datasets,
                pixel_array=_pixels(labelled, probability=probability)[np.argsort(frame_order(source))],
                segmentation_type="FRACTIONAL" if probability else "BINARY",
                segment_descriptions=_descriptions(labelled.names, codes),
                series_instance_uid=highdicom.UID(),
                series_number=1000 + int(datasets[0].get("SeriesNumber") or 0) % 1000,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="leafseg",
                manufacturer_model_name="leafseg",
                software_versions=metadata.version("leafseg"),
                device_serial_number="leafseg",
                content_label=_LABEL,
                content_description=NOTICE,
                series_description="leafseg probability" if probability else "leafseg segmentation",
                omit_empty_frames=True,
                **_character_set(labelled.names, codes),
            )
            for _ in segmentation.iterall():  # decodes what was copied nested, in the source's own character set
                pass
            shared = segmentation.SharedFunctionalGroupsSequence[0]
            measures = (shared.get("PixelMeasuresSequence") or [None])[0]
            if measures is not None and not {"PixelSpacing", "SliceThickness"} <= set(measures.dir()):
                del shared.PixelMeasuresSequence  # of flat images; highdicom would refuse to read half of it
            with atomic_path(path) as temporary:
                segmentation.save_as(temporary)
    except LeafsegError:
        raise
    except Exception as error:  # pydicom and highdicom raise nearly anything on headers that break the standard
        # The text of other errors may quote values of the header.
        reason = str(error) if isinstance(error, AttributeError) else type(error).__name__
        raise DataError(
            f"{source}: no DICOM segmentation can be made for it ({reason}); its header breaks the standard, mend it "
            "or choose another --format"
        ) from error


def _complete(dataset: Any, source: Path, *, slice_mm: float) -> None:
    """Change a header in memory to what highdicom asks for: elements that may be empty, and shared functional groups.

    Args:
        dataset: the header.
        source: to be named in the error.
        slice_mm: distance of the slices, taken for their thickness where the header states none.

    Raises:
        DataError: if it lacks what cannot be made up.
    """
    from pydicom import Dataset
    from pydicom.valuerep import DA, TM

    placed = "ImagePositionPatient" in dataset or int(dataset.get("NumberOfFrames") or 1) > 1
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", *(("FrameOfReferenceUID",) if placed else ())):
        if not dataset.get(keyword):
            raise DataError(
                f"{source}: no DICOM segmentation can be made for it ({keyword} is missing); mend its header or choose "
                "another --format"
            )
    for keyword in _MAY_BE_EMPTY:
        if keyword not in dataset:
            setattr(dataset, keyword, None)
    for keyword, kind in (("PatientBirthDate", DA), ("StudyDate", DA), ("StudyTime", TM)):
        try:
            kind(dataset.get(keyword))
        except ValueError:
            setattr(dataset, keyword, None)
    if "NumberOfFrames" in dataset:
        # What reading has found to be equal for all frames may be stated for each of them; a single frame of
        # ultrasound has no groups at all.
        if not dataset.get("SharedFunctionalGroupsSequence"):
            dataset.SharedFunctionalGroupsSequence = [Dataset()]
        shared = dataset.SharedFunctionalGroupsSequence[0]
        frames = dataset.get("PerFrameFunctionalGroupsSequence") or [Dataset()]
        for keyword in ("PixelMeasuresSequence", "PlaneOrientationSequence"):
            if keyword not in shared:
                setattr(shared, keyword, frames[0].get(keyword) or [Dataset()])
        measures = shared.PixelMeasuresSequence[0]
    else:
        measures = dataset
    if placed and not measures.get("SliceThickness"):
        measures.SliceThickness = slice_mm


def _character_set(names: Sequence[str], codes: Mapping[str, SegmentCodes]) -> dict[str, Any]:
    """UTF-8 where texts of ours need it: in the source's character set they could become question marks."""
    ours = [*names]
    for code in codes.values():
        ours += [code.category.meaning, code.type.meaning, code.algorithm]
    return {} if all(text.isascii() for text in ours) else {"specific_character_set": "ISO_IR 192"}


def _descriptions(names: Sequence[str], codes: Mapping[str, SegmentCodes]) -> list[Any]:
    import highdicom
    from pydicom.sr.codedict import codes as dictionary

    descriptions = []
    for number, name in enumerate(names, start=1):
        code = codes.get(name) or default_codes(name)
        algorithm = highdicom.AlgorithmIdentificationSequence(
            name=code.algorithm, family=dictionary.DCM.ArtificialIntelligence, version=metadata.version("leafseg")
        )
        descriptions.append(
            highdicom.seg.SegmentDescription(
                segment_number=number,
                segment_label=name[:64],  # a LO element
                segmented_property_category=_concept(code.category),
                segmented_property_type=_concept(code.type),
                algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
            )
        )
    return descriptions


def _pixels(labelled: Labelled, *, probability: bool) -> Any:
    """What highdicom takes: ``[N, H, W]`` segment numbers, or ``[N, H, W, L]`` of 0 and 1 or of probabilities."""
    if probability:
        if labelled.probability is None:
            raise ValueError("no probabilities were kept")
        return np.stack(labelled.probability).transpose(0, 2, 3, 1)
    planes = np.stack(labelled.planes)  # [N, P, H, W]
    return planes.transpose(0, 2, 3, 1) if labelled.overlapping else planes[:, 0]


def _concept(name: CodedName) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(value=name.value, scheme_designator=name.scheme, meaning=name.meaning)
