"""lm-eval's generation settings as the engine's: what a task asks for, what the checkpoint brings, and what neither engine nor user chose."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from steered_lm.config import content_hash
from steered_lm.engine import GenerationRow, Sampling
from steered_lm.seeds import repeat_seed, row_seed
from steered_lm.steering.spec import SteeringSpec

# What transformers takes when neither the task nor the checkpoint says: its sampling is restricted to 50 tokens.
_DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
_TAKEN = {*_DEFAULTS, "do_sample", "use_cache", "num_beams", "num_return_sequences"}
# What changes scores in ways that the engine does not know, with the values that mean "off".
_OTHER: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "sequence_bias": (None,),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "penalty_alpha": (None, 0.0),
    "prompt_lookup_num_tokens": (None,),
    "dola_layers": (None,),
}
_OTHER_SAMPLED: dict[str, tuple[Any, ...]] = {"typical_p": (None, 1.0), "epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0), "top_h": (None,)}


class Settings(NamedTuple):
    """How one request is generated.

    Attributes:
        until: its stop strings, lm-eval's end-of-text string left out.
        max_new_tokens: most tokens to generate.
        sampling: how tokens are chosen; the seed is the row's own.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling

    def row(self, prompt: tuple[int, ...], spec: SteeringSpec | None, seed: int, *, without: str) -> GenerationRow:
        """Return the request as a row; the stop string ``without`` is left to the end tokens."""
        stop = tuple(text for text in self.until if text and text != without)
        return GenerationRow(prompt, self.max_new_tokens, spec, self.sampling._replace(seed=seed), stop)


def group_requests(requests: Sequence[Instance], default_length: int, checkpoint: Any) -> list[Settings | str]:
    """Return each request's settings, or why the engine cannot generate it.

    Args:
        requests: whose second argument holds the task's ``generation_kwargs``.
        default_length: most tokens when the task does not say.
        checkpoint: the model's ``GenerationConfig``.
    """
    known: dict[str, Settings | str] = {}
    found: list[Settings | str] = []
    for request in requests:
        given = request.args[1]
        key = content_hash(given)
        if key not in known:
            known[key] = settings(given, default_length, checkpoint)
        found.append(known[key])
    return found


def settings(given: Mapping[str, Any], default_length: int, checkpoint: Any) -> Settings | str:
    """Return what ``generation_kwargs`` and the checkpoint ask for, or why the engine cannot do it."""
    kwargs = dict(normalize_gen_kwargs(dict(given), default_length))
    until, length = handle_stop_sequences(kwargs.pop("until"), eos=None), int(kwargs.pop("max_gen_toks"))
    sampled = bool(kwargs.get("do_sample"))
    unknown = sorted(set(kwargs) - _TAKEN)
    if unknown:
        return f"generation_kwargs hold {', '.join(unknown)}, which the engine does not know"
    for name, off in {**_OTHER, **(_OTHER_SAMPLED if sampled else {})}.items():
        value = kwargs.get(name, getattr(checkpoint, name, None))
        if value not in off:
            return f"{name}={value!r} changes scores in a way that the engine does not know"

    def chosen(name: str) -> Any:
        value = kwargs.get(name)
        value = getattr(checkpoint, name, None) if value is None else value
        return _DEFAULTS[name] if value is None else value

    penalty = float(chosen("repetition_penalty"))
    if not sampled:
        return Settings(tuple(until), length, Sampling(repetition_penalty=penalty))
    temperature = float(chosen("temperature"))
    if temperature <= 0:
        return "do_sample=True needs a temperature above 0"
    values = Sampling(temperature, int(chosen("top_k")), float(chosen("top_p")), float(chosen("min_p")), penalty)
    return Settings(tuple(until), length, values)


def row_seeds(rows: Sequence[tuple[tuple[int, ...], str | None]]) -> list[int]:
    """Return a seed for each row (prompt tokens, candidate): from what ``torch.manual_seed`` was last given, which is lm-eval's ``--seed``.

    It depends on the row alone and on how often the same row came before (``repeats``), not on the other rows of the run.
    """
    base, seen = torch.initial_seed(), Counter[tuple[tuple[int, ...], str | None]]()
    seeds = []
    for row in rows:
        seeds.append(row_seed(repeat_seed(base, seen[row]), *row))
        seen[row] += 1
    return seeds
