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


def choice_row(number: int) -> dict[str, Any]:
    truths, myths = [f"Yes, {number} is a number.", "It is."], [f"No, {number} is a bird.", "Nobody may say.", f"{number} is a sort of tea."]
    return {
        "question": f"Is {number} a number?",
        "mc1_targets": {"choices": [truths[0], *myths], "labels": [1, 0, 0, 0]},
        "mc2_targets": {"choices": [*truths, *myths], "labels": [1, 1, 0, 0, 0]},
    }


def free_row(number: int) -> dict[str, Any]:
    return {
        "type": "Adversarial",
        "category": "Numbers",
        "question": f"Is {number} a number?",
        "best_answer": "Yes, it is",
        "correct_answers": ["Yes, it is", f"{number} is a number"],
        "incorrect_answers": [f"No, {number} is a bird", "It is a sort of tea."],
        "source": "made up",
    }


def subject_row(subject: str, number: int) -> dict[str, Any]:
    question = f"In {subject.replace('_', ' ')}, what follows {number}?"
    return {"question": question, "subject": subject, "choices": [str(number + step) for step in (3, 1, 2, 4)], "answer": number % 4}


def save_small_data(folder: Path, subjects: tuple[str, ...] = ("astronomy", "virology"), rows: int = 6) -> Path:
    """Write a local data folder with a few made-up rows."""
    write_lines(folder / "truthfulqa" / "multiple_choice.jsonl", [choice_row(number) for number in range(rows)])
    write_lines(folder / "truthfulqa" / "generation.jsonl", [free_row(number) for number in range(rows)])
    for split, count, start in (("test", rows, 0), ("dev", 5, 100)):
        made = [subject_row(subject, start + number) for subject in subjects for number in range(count)]
        write_lines(folder / "mmlu" / f"{split}.jsonl", made)
    return folder
