"""Evaluates two tasks of ours on two processes, as lm-eval does on several GPUs; started by ``accelerate launch``, not collected by pytest.

lm-eval shares work among processes only where there are GPUs, so the model is told here what it would find out there.
"""

import json
import sys
from pathlib import Path

from accelerate import Accelerator
from lm_eval.evaluator import evaluate

from steered_lm.harness.chat_task import load_tasks
from steered_lm.harness.model import SteeredHFLM


def main(vectors: str, out: str) -> None:
    accelerator = Accelerator(cpu=True)
    inline = {"vectors": vectors, "weights": "formality:1", "alpha": 0.4, "layer": 3}
    lm = SteeredHFLM("steered-lm/tiny-chat", device="cpu", batch_size="auto", gemm="torch", **inline)
    lm.accelerator, lm._rank, lm._world_size = accelerator, accelerator.process_index, accelerator.num_processes
    tasks = load_tasks(["persona_judge", "tiny_truth"], {"persona": "edmund", "split": "tune"})
    found = evaluate(lm, {"tasks": {task.task_name: task for task in tasks}}, bootstrap_iters=0, log_samples=True)
    if lm.rank == 0:
        samples = {name: {s["doc_id"]: s["resps"] for s in found["samples"][name]} for name in found["samples"]}
        content = {"results": found["results"], "samples": samples, "rows": lm.engine.report.row_steps, "processes": lm.world_size}
        Path(out).write_text(json.dumps(content, default=str), encoding="utf-8")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # a process group that is still there at exit now and then aborts the process


if __name__ == "__main__":
    main(*sys.argv[1:])
