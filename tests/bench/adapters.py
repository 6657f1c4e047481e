"""Rows with LoRA adapters of their own in one batch, against one adapter after the other and against PEFT's own mixed batches.

A: for each adapter ``set_adapter``, then the engine on its rows. A': the same with the adapter merged into the weights meanwhile.
B: all rows in one Hugging Face ``generate`` with PEFT's ``adapter_names``. C: the engine, all rows at once. C': the same with PEFT's own layer code.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import comparison
import console
import peft
import shapes
import torch

from steered_lm.engine import Engine, GenerationRow
from steered_lm.engine import adapters as engine_adapters
from steered_lm.steering.hooks import Steerer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
A, MERGED, B, C, LISTS = "A one by one", "A' merged meanwhile", "B PEFT, one generate", "C engine, together", "C' with PEFT's layer code"


def with_adapters(model: Any, count: int, rank: int) -> Any:
    """Return the model with ``count`` adapters on all linear layers of its blocks; they change what it writes from the first token on."""
    settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEAR, init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, settings, adapter_name="a0")
        for number in range(1, count):
            adapted.add_adapter(f"a{number}", settings)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.02)
    return adapted.eval()


class _Lists(engine_adapters._Product):
    """PEFT's own forward method for mixed batches, which indexes by lists."""

    def __call__(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        names = [engine_adapters.BASE] * len(input)
        for name, entries in self._adapters.groups(len(input)):
            for entry in range(len(input)) if entries is None else entries.tolist():
                names[entry] = name
        return self._layer._mixed_batch_forward(input, *args, adapter_names=names, **kwargs)


class Workload:
    """Adapters x prompts, and the designs that run them."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        bare = shapes.random_llama(arguments.size, getattr(torch, arguments.dtype))
        tokenizer = shapes.train_tokenizer(shapes.SHAPES[arguments.size].vocabulary)
        self.prompts = shapes.prompts(tokenizer, arguments.prompts)
        layer = shapes.SHAPES[arguments.size].layer
        spec = shapes.random_steering(bare, self.prompts[0], layer, 1, arguments.positions, folder).specs[0] if arguments.positions else None
        self.model = with_adapters(bare, arguments.adapters, arguments.rank)
        self.names = [f"a{number}" for number in range(arguments.adapters)]
        self.engine = Engine(Steerer(self.model, allow_foreign=True), tokenizer, gemm=arguments.gemm)
        self.rows = [GenerationRow(prompt, arguments.tokens, spec, adapter=name) for name in self.names for prompt in self.prompts]

    def designs(self) -> dict[str, Callable[[int], Any]]:
        """Return the designs by name; Hugging Face's knows no steering."""
        found: dict[str, Callable[[int], Any]] = {A: self.one_by_one, MERGED: self.merged, B: self.peft, C: self.together, LISTS: self.lists}
        if self.arguments.positions:
            del found[B]
        return found

    def one_by_one(self, number: int, *, merge: bool = False) -> list[tuple[int, ...]]:
        found = []
        for name in self.names:
            self.model.set_adapter(name)
            if merge:
                self.model.merge_adapter()
            try:
                mine = [row._replace(adapter=None) for row in self.rows if row.adapter == name]
                found += [generated.tokens for generated in self.engine.generate(mine)]
            finally:
                if merge:
                    self.model.unmerge_adapter()
        return found

    def merged(self, number: int) -> list[tuple[int, ...]]:
        return self.one_by_one(number, merge=True)

    def peft(self, number: int) -> list[tuple[int, ...]]:
        width = max(map(len, self.prompts))
        ids = torch.tensor([[0] * (width - len(row.tokens)) + list(row.tokens) for row in self.rows])
        mask = torch.tensor([[0] * (width - len(row.tokens)) + [1] * len(row.tokens) for row in self.rows])
        names = [row.adapter for row in self.rows]
        with torch.inference_mode():
            written = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=self.arguments.tokens, do_sample=False, adapter_names=names
            )
        return [tuple(row) for row in written[:, width:].tolist()]

    def together(self, number: int) -> list[tuple[int, ...]]:
        return [generated.tokens for generated in self.engine.generate(self.rows)]

    def lists(self, number: int) -> list[tuple[int, ...]]:
        with mock.patch.object(engine_adapters, "_Product", _Lists):
            return self.together(number)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one setting, print its table, and return it."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Workload(arguments, Path(folder))
        clock = "cpu" if arguments.threads == 1 else "wall"
        designs = work.designs()
        work.engine.generate([row._replace(max_new_tokens=2) for row in work.rows])
        runs = comparison.interleaved(designs, arguments.rounds)
    facts = {
        name: {
            "seconds": run.seconds(clock),
            "C over it": comparison.ratio(run, runs[C], clock),
            "by round": [getattr(cost, clock) for cost in run.costs],
            "equal rows": comparison.agreement(runs[A].output, run.output).equal,
        }
        for name, run in runs.items()
    }
    title = (
        f"{arguments.size}, {arguments.dtype}, {arguments.adapters} adapters of rank {arguments.rank} x {arguments.prompts} prompts x "
        f"{arguments.tokens} tokens, steered: {arguments.positions or 'no'}, {arguments.gemm}, {arguments.threads} thread(s)"
    )
    table = [[name, f"{fact['seconds']:.2f}", f"{fact['C over it']:.2f}", str(fact["equal rows"])] for name, fact in facts.items()]
    console.show(title, ["design", "seconds", "C over it", f"rows of {len(work.rows)} equal to A"], table)
    settings = {name: value for name, value in vars(arguments).items() if isinstance(value, (str, int))}
    return {"settings": settings, "machine": console.machine(arguments.threads), "designs": facts}


FULL: list[dict[str, Any]] = [
    {"rank": 8},
    {"rank": 32},
    {"rank": 8, "positions": "response"},
    {"rank": 8, "positions": "all"},
    {"rank": 8, "gemm": "onednn"},
]


def main() -> None:
    parser = console.options(__doc__, "adapters.json")
    parser.add_argument("--size", choices=list(shapes.SHAPES), default="s")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--positions", choices=["all", "response"], help="steer these positions too, by one spec")
    parser.add_argument("--gemm", choices=["torch", "onednn"], default="torch")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft's own use of transformers
    settings = FULL if arguments.full else [{}]
    console.write(arguments.json, [measure(argparse.Namespace(**{**vars(arguments), **setting})) for setting in settings])


if __name__ == "__main__":
    main()
