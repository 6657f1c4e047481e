"""Small LaMP folders in the official shape, written for tests."""

import json
from pathlib import Path
from typing import Any

AUTHOR = {
    "LaMP_1": [
        {"id": "p0", "title": "Canal locks", "abstract": "Locks and keepers."},
        {"id": "p1", "title": "Tide tables", "abstract": "Tides by hand."},
    ],
    "LaMP_2": [{"id": "p0", "description": "A crew sleeps.", "tag": "sci-fi"}, {"id": "p1", "description": "Two bakers meet.", "tag": "romance"}],
    "LaMP_3": [{"id": "p0", "text": "Broke in a day.", "score": "1"}, {"id": "p1", "text": "The kettle sings.", "score": "5"}],
    "LaMP_4": [{"id": "p0", "title": "Bridge Opens", "text": "It opened today."}, {"id": "p1", "title": "Mill Turns", "text": "The wheel turns."}],
    "LaMP_5": [{"id": "p0", "title": "On locks", "abstract": "We list locks."}, {"id": "p1", "title": "On tides", "abstract": "We list tides."}],
    "LaMP_6": [{"id": "p0", "title": "Lunch", "text": "Soup at noon?"}, {"id": "p1", "title": "Keys", "text": "They are on the desk."}],
    "LaMP_7": [{"id": "p0", "text": "so tired lol"}, {"id": "p1", "text": "kettle is ON!!"}],
}
INPUT = {
    "LaMP_1": 'For an author who has written the paper with the title "Locks", which reference is related? [1]: "Canal boats" [2]: "Old tides"',
    "LaMP_2": "Which tag does this movie relate to? description: Two bakers open a shop.",
    "LaMP_3": "What is the score of the following review on a scale of 1 to 5? review: The kettle is loud.",
    "LaMP_4": "Generate a headline for the following article: The wheel broke.",
    "LaMP_5": "Generate a title for the following abstract of a paper: We list ferries and tides.",
    "LaMP_6": "Generate a subject for the following email: The keys are gone.",
    "LaMP_7": "Paraphrase the following tweet without any explanation before or after it: The kettle is boiling.",
}
OUTPUT = {
    "LaMP_1": "[1]", "LaMP_2": "romance", "LaMP_3": "2", "LaMP_4": "Wheel Breaks", "LaMP_5": "On ferries", "LaMP_6": "Lost keys",
    "LaMP_7": "kettle's boiling!!",
}  # fmt: skip


def write_lamp(folder: Path, task: str, *, rows: Any = None, golds: Any = None, split: str = "dev", named: str | None = None) -> Path:
    """Write a task's two files below a folder, by default with one row of id 10, and return that folder."""
    place = folder / task
    place.mkdir(parents=True, exist_ok=True)
    asked = [{"id": "10", "input": INPUT[task], "profile": AUTHOR[task]}] if rows is None else rows
    answers = [{"id": row["id"], "output": OUTPUT[task]} for row in asked] if golds is None else golds
    (place / f"{split}_questions.json").write_text(json.dumps(asked), encoding="utf-8")
    (place / f"{split}_outputs.json").write_text(json.dumps({"task": named or task, "golds": answers}), encoding="utf-8")
    return folder
