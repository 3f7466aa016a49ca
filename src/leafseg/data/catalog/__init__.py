"""Known data sets: what they are, how their archives look once unpacked, and how they are split.

``sets`` holds the facts, ``layouts`` recognises a folder and pairs its files, ``protocols`` decides the parts, and
``preparation`` writes the manifest that every run reads.
"""

from leafseg.data.catalog.layouts import CATALOG_FILE, Found, recognise
from leafseg.data.catalog.preparation import MANIFEST_FILE, Prepared, is_prepared, prepare
from leafseg.data.catalog.sets import KNOWN_SETS, KnownSet, known_set

__all__ = [
    "CATALOG_FILE",
    "KNOWN_SETS",
    "MANIFEST_FILE",
    "Found",
    "KnownSet",
    "Prepared",
    "is_prepared",
    "known_set",
    "prepare",
    "recognise",
]
