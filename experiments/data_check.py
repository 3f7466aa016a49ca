"""What `leafseg data check` finds in every set of a folder, and how many files a second it opens.

    .venv/bin/python experiments/data_check.py DATA

Writes docs/results/data_check.json and docs/results/data_check.md. Each set is checked by the command line, as a user
does, in a process of its own; the time is that which the check states: opening, comparing and judging, without the
start of the interpreter. Names of files are left out of the record, but for exact duplicates.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from leafseg.data.validate import SEVERITIES
from leafseg.files import read_json, write_json_atomic, write_text_atomic
from leafseg.progress import progress_bar

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
EXACT = ("duplicate", "duplicate-across-parts")
THREADS = 4


def check(data: Path) -> dict[str, Any]:
    """The JSON of one check; its exit code says what the JSON says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "leafseg", "data", "check", str(data), "--out", folder]
        command += ["--workers", str(THREADS)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode not in (0, 2):
            sys.exit(done.stderr)
        result = read_json(Path(folder) / "data_check.json")
        if not (Path(folder) / "data_check.html").is_file() or result["ok"] != (done.returncode == 0):
            sys.exit(f"{data.name}: exit code {done.returncode}, and the check says ok={result['ok']}")
    return result


def short(finding: dict[str, Any], data: Path) -> dict[str, Any]:
    """A finding without the names of files: its sentence without the listing in parentheses."""
    text = str(finding["message"]).replace(str(data), f"DATA/{data.name}")
    if finding["items"]:
        text = re.sub(r" \(.*\)(?=, )", "", text)
    entry = {"severity": finding["severity"], "id": finding["id"], "cases": len(finding["items"]), "text": text}
    if finding["id"] in EXACT:
        entry["files"] = [{"files": item["files"], "masks": item["text"]} for item in finding["items"]]
    return entry


def measure(data: Path, repeats: int) -> dict[str, Any]:
    results = [check(data) for _ in range(repeats)]
    seconds = [result["seconds"] for result in results]
    first = results[0]
    if any(result["findings"] != first["findings"] for result in results):
        sys.exit(f"{data.name}: two checks of the same data differ")
    return {
        "ok": first["ok"],
        "images": first["images"],
        "files": first["files"],
        "parts": first["parts"],
        "split_sha256": first["split_sha256"],
        "seconds": seconds,
        "files_per_second": round(first["files"] / statistics.median(seconds), 1),
        "findings": [short(finding, data) for finding in first["findings"]],
    }


def rows(sets: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| data | images | files | may train | "
        + " | ".join(f"{name}s" for name in SEVERITIES)
        + " | seconds: median (lowest to highest) | files/s |",
        "|---|" + "---|" * (5 + len(SEVERITIES)),
    ]
    for name, one in sets.items():
        found = [sum(f["severity"] == severity for f in one["findings"]) for severity in SEVERITIES]
        seconds = one["seconds"]
        lines.append(
            f"| {name} | {one['images']} | {one['files']} | {'yes' if one['ok'] else 'no'} | "
            + " | ".join(map(str, found))
            + f" | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | "
            f"{one['files_per_second']:.0f} |"
        )
    return lines


def duplicates(sets: dict[str, dict[str, Any]]) -> list[str]:
    """A sentence a set: what is recorded, found or not."""
    lines = []
    for name, one in sets.items():
        groups = [group for finding in one["findings"] for group in finding.get("files", [])]
        if not groups:
            lines.append(f"- {name}: none.")
        for group in groups:
            masks = f"; {group['masks']}" if group["masks"] else ""
            lines.append(f"- **{name}**: {' = '.join(f'`{file}`' for file in group['files'])}{masks}.")
    return lines


def page(record: dict[str, Any]) -> str:
    sets = record["sets"]
    lines = [
        "# Data check: what it finds in public sets, and how fast",
        "",
        "Each set as it was obtained, with leafseg's default split, checked by",
        "",
        "```",
        *(f"leafseg data check DATA/{name} --out DIR --workers {record['threads']}" for name in sets),
        "```",
        "",
        "and all of it, record and page, by",
        "",
        "```",
        record["command"],
        "```",
        "",
        f"Commit {record['commit'][:7]}; {record['hardware']}; "
        + ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        + ".",
        f"{record['repeats']} checks a set, each in a process of its own, {record['threads']} files at a time. Files",
        "are images and masks; every one is opened, decoded and compared with the others. The interpreter's start is",
        "left out.",
        record["note"],
        "",
        *rows(sets),
        "",
        "## Exact duplicates",
        "",
        "Images whose pixels are equal, whatever their names and compression, and whether their masks agree:",
        "",
        *duplicates(sets),
        "",
        "## Findings",
        "",
        "The sentences of the check without the files that it lists; all cases stand on its page and in its JSON file.",
        "",
        "| data | severity | finding | cases | what and what to do |",
        "|---|---|---|---|---|",
    ]
    for name, one in sets.items():
        for finding in one["findings"]:
            cases = finding["cases"] or ""
            text = finding["text"].replace("|", "\\|")
            lines.append(f"| {name} | {finding['severity']} | {finding['id']} | {cases} | {text} |")
        if not one["findings"]:
            lines.append(f"| {name} | - | nothing found | | |")
    lines += [
        "",
        "Look-alikes are candidates: similar images of different people are among them, and somebody has to look.",
        "Nobody corrected any set afterwards: results elsewhere on these pages were obtained with what stands here.",
        "",
        "Research software, not a medical device.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="a folder of data sets")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--note", default="", help="what a reader must know about the circumstances")
    arguments = parser.parse_args()
    folders = sorted(path for path in arguments.data.iterdir() if (path / "images").is_dir())
    if not folders:
        sys.exit(f"{arguments.data}: holds no data sets; each has a folder with images/ and masks/")
    sets = {}
    with progress_bar("data check", total=len(folders)) as bar:
        for folder in folders:
            sets[folder.name] = measure(folder, arguments.repeats)
            bar.advance()
    record = {
        "command": ".venv/bin/python experiments/data_check.py DATA",
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "versions": {
            "Python": platform.python_version(),
            **{name: version(name) for name in ("leafseg", "numpy", "pillow", "scipy")},
        },
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "repeats": arguments.repeats,
        "threads": THREADS,
        "note": arguments.note,
        "sets": sets,
    }
    write_json_atomic(arguments.out / "data_check.json", record)
    write_text_atomic(arguments.out / "data_check.md", page(record))
    print(page(record))


if __name__ == "__main__":
    main()
