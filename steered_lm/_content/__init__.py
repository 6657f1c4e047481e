"""Content folders as import paths: ``steered_lm._content.tasks`` is what the ``lm_eval.tasks`` entry point names.

A wheel holds the folders in here. In a checkout they lie beside the package, so its parent joins this package's search path.
"""

from pathlib import Path

if not Path(__file__).with_name("tasks").is_dir():
    __path__.append(str(Path(__file__).resolve().parents[2]))
