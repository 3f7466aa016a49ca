"""Facts about the known data sets: sizes, terms, archives, groups, and the split that the paper used."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from leafseg.errors import DataError

SEE_SOURCE = "see the source"

# First and last frame of the 29 video sequences of CVC-ClinicDB; neighbouring frames show the same polyp.
CVC_SEQUENCES = (
    *((1, 25), (26, 50), (51, 67), (68, 78), (79, 103), (104, 126), (127, 151), (152, 177), (178, 199), (200, 205)),
    *((206, 227), (228, 252), (253, 277), (278, 297), (298, 317), (318, 342), (343, 363), (364, 383), (384, 408)),
    *((409, 428), (429, 447), (448, 466), (467, 478), (479, 503), (504, 528), (529, 546), (547, 571), (572, 591)),
    (592, 612),
)


@dataclass(frozen=True)
class PaperSplit:
    """How the LEAF paper divided a set.

    Attributes:
        sizes: images of each part, drawn at random from the folder ``train`` (or from everything, where the set has no
            folders); None: the set's own folders are the parts.
        folders: the set's own folders that the split uses; all others stay out.
        remark: what a reader of the numbers has to know.
    """

    sizes: dict[str, int] | None
    folders: tuple[str, ...]
    remark: str


@dataclass(frozen=True)
class KnownSet:
    """One data set as its owners publish it.

    Attributes:
        name: what ``--dataset`` takes.
        images: pairs of image and mask by the set's own folder (``train``, ``validation``, ``test``; ``""`` where it
            has none).
        archives: what to download, and from whom.
        expects: the folders that the unpacked archives hold.
        groups: what must not be torn apart, and where that is known from.
        targets: what a mask can mean; the first is the default. Empty: only one thing.
        paper: None if the paper did not use the set.
    """

    name: str
    title: str
    shows: str
    images: dict[str, int]
    terms: str
    archives: str
    expects: str
    groups: str
    targets: tuple[str, ...] = ()
    paper: PaperSplit | None = None

    @property
    def protocols(self) -> tuple[str, ...]:
        return ("clean", "paper") if self.paper is not None else ("clean",)

    @property
    def total(self) -> int:
        return sum(self.images.values())


_RELEASED_ORDER = "the released code cuts an unsorted directory listing, so that its own split cannot be reproduced"
_CONTENT = "patients are not published; equal pictures stay together"

KNOWN_SETS = (
    KnownSet(
        name="refuge2",
        title="REFUGE2",
        shows="optic cup (or disc) in colour fundus photographs, cropped around the disc",
        images={"train": 400, "validation": 400, "test": 400},
        terms=SEE_SOURCE + " (registration with the challenge)",
        archives="Annotation-Training400, REFUGE-Training400, REFUGE-Validation400, REFUGE-Validation400-GT, "
        "REFUGE-Test400 and REFUGE-Test-GT from the REFUGE challenge (refuge.grand-challenge.org)",
        expects="REFUGE2/train/images and REFUGE2/train/mask (val and test alike), or the challenge's archives "
        "unpacked side by side (Training400, Annotation-Training400/Disc_Cup_Masks ...)",
        groups=_CONTENT,
        targets=("cup", "disc"),
        paper=PaperSplit(
            sizes=None,
            folders=("train", "validation", "test"),
            remark="the set's own folders; the paper does not say whether the validation images were trained on too, "
            "as other work does",
        ),
    ),
    KnownSet(
        name="cvc_clinicdb",
        title="CVC-ClinicDB",
        shows="polyps in colonoscopy frames",
        images={"": 612},
        terms="research and education only, no commercial use",
        archives="CVC-ClinicDB from its owners (polyp.grand-challenge.org/CVCClinicDB)",
        expects="CVC-ClinicDB/Original and CVC-ClinicDB/Ground Truth, directly or under PNG/ or TIF/",
        groups="29 video sequences, by frame number",
        paper=PaperSplit(
            sizes={"train": 490, "validation": 62, "test": 60},
            folders=("",),
            remark=f"490/62/60 by frame; {_RELEASED_ORDER}: a sorted listing is shuffled with a stored seed instead",
        ),
    ),
    KnownSet(
        name="qata_cov19",
        title="QaTa-COV19-v2",
        shows="COVID-19 infected regions in chest X-rays",
        images={"train": 7145, "test": 2113},
        terms=SEE_SOURCE,
        archives="QaTa-COV19 (version 2) from Qatar University and Tampere University, published on Kaggle as "
        "aysendegerli/qatacov19-dataset",
        expects="QaTa-COV19-v2/Train Set/Images, QaTa-COV19-v2/Train Set/Ground-truths, and Test Set alike",
        groups="patients of the files named sub-S...; the others' are not published; equal pictures stay together",
        paper=PaperSplit(sizes=None, folders=("train", "test"), remark="the set's own Train Set and Test Set"),
    ),
    KnownSet(
        name="isic2018",
        title="ISIC 2018 task 1",
        shows="skin lesions in dermoscopy",
        images={"train": 2594, "validation": 100, "test": 1000},
        terms=SEE_SOURCE,
        archives="ISIC2018_Task1-2_Training_Input and ISIC2018_Task1_Training_GroundTruth (and those of Validation and "
        "Test) from the ISIC challenge (challenge.isic-archive.com/data)",
        expects="ISIC2018_Task1-2_Training_Input and ISIC2018_Task1_Training_GroundTruth side by side",
        groups=_CONTENT,
        paper=PaperSplit(
            sizes={"train": 1815, "validation": 0, "test": 779},
            folders=("train",),
            remark=f"1815/779 of the 2594 training images; {_RELEASED_ORDER}: a sorted listing is shuffled with a "
            "stored seed instead",
        ),
    ),
    KnownSet(
        name="busi",
        title="BUSI (breast ultrasound images)",
        shows="breast tumours in ultrasound; normal images have an empty mask",
        images={"": 780},
        terms=SEE_SOURCE,
        archives="Dataset_BUSI_with_GT from Cairo University (Al-Dhabyani et al. 2020)",
        expects="Dataset_BUSI_with_GT/benign, malignant and normal",
        groups="patients are not published and are known to recur; only equal pictures stay together",
    ),
    KnownSet(
        name="kvasir_seg",
        title="Kvasir-SEG",
        shows="polyps in colonoscopy images",
        images={"": 1000},
        terms="research and education; " + SEE_SOURCE,
        archives="Kvasir-SEG from Simula (datasets.simula.no/kvasir-seg)",
        expects="Kvasir-SEG/images, Kvasir-SEG/masks and kavsir_bboxes.json",
        groups=_CONTENT,
    ),
    KnownSet(
        name="dsb2018",
        title="Data Science Bowl 2018 (stage1_train)",
        shows="cell nuclei in microscopy; the masks of all nuclei are united",
        images={"": 670},
        terms="CC0 (BBBC038v1)",
        archives="stage1_train of the 2018 Data Science Bowl (BBBC038v1, Broad Bioimage Benchmark Collection)",
        expects="stage1_train/<id>/images and stage1_train/<id>/masks",
        groups="slides are not published; equal pictures stay together",
    ),
    KnownSet(
        name="ph2",
        title="PH2",
        shows="skin lesions in dermoscopy",
        images={"": 200},
        terms="research and education; " + SEE_SOURCE,
        archives="PH2Dataset from Hospital Pedro Hispano and the University of Porto (ADDI project)",
        expects="PH2Dataset/PH2 Dataset images/IMD003/IMD003_Dermoscopic_Image and IMD003_lesion",
        groups=_CONTENT,
    ),
    KnownSet(
        name="montgomery",
        title="Montgomery County chest X-rays",
        shows="both lungs in chest X-rays (the left and the right mask are united)",
        images={"": 138},
        terms=SEE_SOURCE,
        archives="MontgomerySet from the US National Library of Medicine",
        expects="MontgomerySet/CXR_png, MontgomerySet/ManualMask/leftMask and rightMask",
        groups="one image a patient; equal pictures stay together",
    ),
    KnownSet(
        name="shenzhen",
        title="Shenzhen Hospital chest X-rays",
        shows="both lungs in chest X-rays; 566 of the 662 images have a mask",
        images={"": 566},
        terms="images: see the source; masks: CC BY-NC-SA 4.0",
        archives="ChinaSet_AllFiles from the US National Library of Medicine, and the lung masks of Stirenko et al. "
        "2018 (archive mask, published on Kaggle as yoctoman/shcxr-lung-mask)",
        expects="ChinaSet_AllFiles/CXR_png, and mask/ with CHNCXR_0001_0_mask.png beside ChinaSet_AllFiles",
        groups="one image a patient; equal pictures stay together",
    ),
)


def known_set(name: str) -> KnownSet:
    """The set of that name.

    Raises:
        DataError: for an unknown name, with the nearest one.
    """
    names = [known.name for known in KNOWN_SETS]
    if name in names:
        return KNOWN_SETS[names.index(name)]
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(f"data set is {name!r}; known are {', '.join(names)}{hint}")
