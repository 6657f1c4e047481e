"""Where a data set lies: a file by path, ``<strength>_<trait>.jsonl`` in a folder, or the published archive of Persona Vectors' training data."""

import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from steered_lm.errors import near_misses
from steered_lm.trait_models.experiment import STRENGTHS, ExperimentError

PUBLISHED = dict(zip(STRENGTHS, ("normal", "misaligned_1", "misaligned_2"), strict=True))
"""What the archive calls the strengths: one folder a trait, one ``.jsonl`` file a strength."""
SPELLINGS = (("hallucinating", "hallucination", "hallucinations"), ("sycophantic", "sycophancy"))
"""Names of one trait, ours first: the archive's folders are named by the noun."""
_ROOTS = ("", "dataset/", "datasets/")
_DEPTH = 3  # of a file within the folder


class DataFile(NamedTuple):
    """A data set's bytes, and the path that names it in messages."""

    path: str
    content: bytes


def read_data_file(dataset: str, folder: Path | None, trait: str | None = None) -> DataFile:
    """Return the file of a data set.

    Args:
        dataset: the path of a ``.jsonl`` file (relative ones are looked for in ``folder``, then in the working directory), or a name,
            ``<strength>_<trait>``, or a strength alone where ``trait`` is given. ``severe_evil`` is ``severe_evil.jsonl``, or, as published,
            ``evil/misaligned_2.jsonl``, in the folder or in its folder ``dataset``. Upper case, blanks and hyphens make no difference, nor does
            whether it says ``hallucinating`` or ``hallucination``, ``sycophantic`` or ``sycophancy``.
        folder: a folder or an unencrypted ``.zip`` file; nothing is unpacked to disk.
        trait: what a strength alone is completed by.

    Raises:
        ExperimentError: when it is not there, with what is; or the archive cannot be read.
    """
    names = [] if folder is None else _names(folder)
    path = Path(dataset).expanduser()
    if path.suffix.lower() == ".jsonl":
        if folder is not None and dataset in names:
            return _read(folder, dataset)
        places = [path] if folder is None or path.is_absolute() else [folder / path, path]
        place = next((place for place in places if place.is_file()), None)
        if place is None:
            raise ExperimentError(f"dataset={dataset!r}: there is no file {' nor '.join(repr(str(p)) for p in places)}. Check the path.")
        return DataFile(str(place), place.read_bytes())
    if folder is None:
        raise ExperimentError(
            f"dataset={dataset!r} is no path to a .jsonl file, and there is no folder to look for that name in. "
            "Give the folder in training.dataset_options.folder, or the path of a file."
        )
    asked = f"{dataset}_{trait}" if dataset in STRENGTHS and trait else dataset
    wanted = _wanted(asked)
    there = {_plain(name): name for name in names}
    found = next((there[root + name] for name in wanted for root in _ROOTS if root + name in there), None)
    if found is None:
        known = _known(names)
        raise ExperimentError(
            f"dataset={dataset!r} is not in {str(folder)!r}, as {' or '.join(wanted)}. "
            + (near_misses(asked, known) if known else "It holds no data set: give the folder that holds the .jsonl files, or those of the traits.")
        )
    return _read(folder, found)


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_").replace(" ", "_")


def _spellings(trait: str) -> tuple[str, ...]:
    return next((names for names in SPELLINGS if trait in names), (trait,))


def _wanted(dataset: str) -> list[str]:
    """Return the files that a name may stand for, the best first."""
    name = _plain(dataset)
    strength, _, trait = name.partition("_")
    if strength not in STRENGTHS or not trait:
        return [f"{name}.jsonl"]
    spellings = (trait, *(other for other in _spellings(trait) if other != trait))
    return [f"{strength}_{one}.jsonl" for one in spellings] + [f"{one}/{PUBLISHED[strength]}.jsonl" for one in spellings]


def _known(names: list[str]) -> set[str]:
    """Return the data sets that files of these names are, as one would ask for them."""
    strengths = {file: strength for strength, file in PUBLISHED.items()}
    found = set()
    for name in names:
        path = PurePosixPath(_plain(name))
        parents = [part for part in path.parts[:-1] if f"{part}/" not in _ROOTS]
        if not parents:
            found.add(path.stem)
        elif len(parents) == 1 and path.stem in strengths:
            found.add(f"{strengths[path.stem]}_{_spellings(parents[0])[0]}")
    return found


def _names(folder: Path) -> list[str]:
    """Return the names of the ``.jsonl`` files in a folder or an archive, relative to it."""
    if folder.is_dir():
        files = [file for depth in range(_DEPTH) for file in folder.glob("*/" * depth + "*.jsonl") if file.is_file()]
        return sorted(file.relative_to(folder).as_posix() for file in files)
    if not folder.exists():
        raise ExperimentError(f"dataset_options.folder={str(folder)!r} does not exist. Check the path, or unpack the archive there first.")
    if not zipfile.is_zipfile(folder):
        raise ExperimentError(f"dataset_options.folder={str(folder)!r} is neither a folder nor a .zip file. Give the folder of the .jsonl files.")
    with zipfile.ZipFile(folder) as archive:
        return sorted(name for name in archive.namelist() if name.endswith(".jsonl") and not name.startswith("__MACOSX/"))


def _read(folder: Path, name: str) -> DataFile:
    path = str(folder / name)
    if folder.is_dir():
        return DataFile(path, (folder / name).read_bytes())
    with zipfile.ZipFile(folder) as archive:
        if archive.getinfo(name).flag_bits & 1:
            raise ExperimentError(
                f"dataset_options.folder={str(folder)!r} is encrypted. Unpack it first, with the password that its publishers give "
                f"(unzip {folder.name}), and give the folder."
            )
        try:
            return DataFile(path, archive.read(name))
        except (zipfile.BadZipFile, zlib.error, NotImplementedError) as problem:
            raise ExperimentError(f"{path!r} cannot be read: {problem}. Unpack the archive, and give the folder.") from problem
