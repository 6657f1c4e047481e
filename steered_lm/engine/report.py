"""What the engine ran, how long it took, and how much memory it planned and used."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from steered_lm.engine.generate import GenerationCost
from steered_lm.engine.score import ScoreCost


@dataclass
class EngineReport:
    """Totals over all calls; times in seconds, sizes in bytes.

    Attributes:
        prompt_seconds, decode_seconds, score_seconds: where the time went.
        prompt_passes, steps, row_steps: passes over prompts, steps of the whole batch, and rows in them.
        score_passes, lower_tokens, upper_tokens: passes over trees, and tokens through the blocks up to the first steered one and after it.
        planned_bytes: largest plan, weights aside.
        cache_bytes: largest cache of keys and values.
        peak_bytes: most memory in use on a CUDA device, weights aside; on a CPU the largest growth of the process.
    """

    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    score_seconds: float = 0.0
    prompt_passes: int = 0
    steps: int = 0
    row_steps: int = 0
    score_passes: int = 0
    lower_tokens: int = 0
    upper_tokens: int = 0
    planned_bytes: int = 0
    cache_bytes: int = 0
    peak_bytes: int = 0

    def add_generation(self, cost: GenerationCost) -> None:
        """Add one run over rows."""
        self.prompt_seconds += cost.prompt_seconds
        self.decode_seconds += cost.decode_seconds
        self.prompt_passes += cost.prompt_passes
        self.steps += cost.steps
        self.row_steps += cost.row_steps
        self.cache_bytes = max(self.cache_bytes, cost.cache_bytes)

    def add_scoring(self, cost: ScoreCost) -> None:
        """Add one run over requests."""
        self.score_passes += cost.passes
        self.lower_tokens += cost.lower_tokens
        self.upper_tokens += cost.upper_tokens
        self.cache_bytes = max(self.cache_bytes, cost.cache_bytes)

    @contextmanager
    def peak(self, device: torch.device, planned: int) -> Iterator[None]:
        """Note how much memory what runs inside takes, and how much was planned for it."""
        self.planned_bytes = max(self.planned_bytes, planned)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            yield
            used = torch.cuda.max_memory_allocated(device) - before
        else:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            yield
            used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        self.peak_bytes = max(self.peak_bytes, used)

    def facts(self) -> dict[str, float | int]:
        """Return everything by name."""
        return asdict(self)
