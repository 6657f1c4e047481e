"""TruthfulQA and MMLU in folders that lm-eval's own tasks load as if they came from the hub, and small sets of rows of our own."""

import json
from pathlib import Path
from typing import Any

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def save_as_hub(data: Path, folder: Path) -> Path:
    """Write the files of a local data folder as repositories of the hub, with READMEs that declare configs; run in ``folder`` to load them."""
    parts = {part: read_lines(data / "truthfulqa" / f"{part}.jsonl") for part in ("multiple_choice", "generation")}
    for part, rows in parts.items():
        write_lines(folder / "truthfulqa" / "truthful_qa" / part / "validation.jsonl", rows)
    _readme(folder / "truthfulqa" / "truthful_qa", dict.fromkeys(parts, ("validation",)))
    splits = {split: read_lines(data / "mmlu" / f"{split}.jsonl") for split in ("test", "dev")}
    subjects = sorted({row["subject"] for row in splits["test"]})
    for subject in subjects:
        for split, rows in splits.items():
            write_lines(folder / "cais" / "mmlu" / subject / f"{split}.jsonl", [row for row in rows if row["subject"] == subject])
    _readme(folder / "cais" / "mmlu", dict.fromkeys(subjects, ("test", "dev")))
    return folder


def _readme(folder: Path, configs: dict[str, tuple[str, ...]]) -> None:
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [line for split in splits for line in (f"  - split: {split}", f"    path: {name}/{split}.jsonl")]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")
