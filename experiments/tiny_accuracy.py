"""Train leaf-tiny on one data set, evaluate its test part, and append the result to docs/results/runs.jsonl.

    .venv/bin/python experiments/tiny_accuracy.py DATA/isic2018 --config configs/isic2018-tiny.yaml --out runs/isic2018

Resumable: called again it continues the training, and a finished run is evaluated and recorded once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

RECORDS = Path(__file__).resolve().parents[1] / "docs" / "results" / "runs.jsonl"


def leafseg(*arguments: str) -> str:
    """Run the command line as a user would; its output, which is also shown."""
    process = subprocess.run([sys.executable, "-m", "leafseg", *arguments], stdout=subprocess.PIPE, text=True)
    print(process.stdout, end="")
    if process.returncode:
        sys.exit(process.returncode)
    return process.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--note", default="", help="what a reader must know about the circumstances")
    arguments = parser.parse_args()
    known = [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.is_file() else []
    name = {"experiment": "tiny_accuracy", "data": arguments.data.name, "seed": arguments.seed}
    if any(all(row.get(k) == v for k, v in name.items()) for row in known):
        print(f"{name} is recorded already in {RECORDS}")
        return

    shared = ["--preset", "leaf-tiny", "--config", str(arguments.config), "--seed", str(arguments.seed)]
    began = time.time()
    printed = leafseg("train", "--data", str(arguments.data), *shared, "--out", str(arguments.out), "--resume", "auto")
    seconds = time.time() - began
    leafseg("evaluate", str(arguments.out), "--data", str(arguments.data), "--split", "test")

    run = json.loads((arguments.out / "run.json").read_text())
    summary = json.loads((arguments.out / "evaluation-test" / "summary.json").read_text())
    lines = [json.loads(line) for line in (arguments.out / "metrics.jsonl").read_text().splitlines()]
    validation = {line["step"]: line["validation/score"] for line in lines if "validation/score" in line}
    record = {
        **name,
        "command": f"leafseg train --data DATA/{arguments.data.name} {' '.join(shared)} --out RUN",
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "evaluate": f"leafseg evaluate RUN --data DATA/{arguments.data.name} --split test",
        "steps": run["total_steps"],
        "best_step": max(validation, key=validation.get) if validation else None,
        "validation_score": max(validation.values()) if validation else None,
        "wall_seconds": round(seconds, 1),
        "printed": [line for line in printed.splitlines() if "samples/s" in line],
        "calibration": run["record"].get("calibration"),
        "samples": run["record"]["samples"],
        "split_sha256": run["record"]["split_sha256"],
        "teacher": run["record"]["teacher"],
        "versions": run["record"]["versions"],
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "note": arguments.note,
        "test": summary["classes"],
        "distance_unit": summary["distance_unit"],
        "settings": run["record"]["settings"],
    }
    RECORDS.parent.mkdir(parents=True, exist_ok=True)
    with RECORDS.open("a") as stream:
        stream.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
