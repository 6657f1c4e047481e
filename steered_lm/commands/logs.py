"""What was saved by either harness, or as plain JSONL, for the commands that read it back."""

from pathlib import Path

from steered_lm.judges.samples import SavedSample, is_log, read_samples, sample_format
from steered_lm.measure.examples import Example, of_sample, read_examples


def saved_samples(path: Path, prompt_field: str | None = None) -> list[SavedSample]:
    """Return the samples of a file.

    Raises:
        JudgeError: when it cannot be read as such.
    """
    if sample_format(path) == "inspect":
        from steered_lm.inspect_plugin.logs import read_log

        return read_log(path, prompt_field=prompt_field)
    return read_samples(path, prompt_field=prompt_field)


def saved_examples(path: Path) -> list[Example]:
    """Return the conversations of a file, which may also be JSONL with messages.

    Raises:
        UserError: when it cannot be read as such.
    """
    return [of_sample(sample) for sample in saved_samples(path)] if is_log(path) else read_examples(path)
