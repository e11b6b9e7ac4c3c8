"""What the libraries themselves say, asked in a process of its own: one of them may fail, crash or hang when imported.

`python -m msdiff_dist.apps.doctor.probe` prints a line of JSON before and after each question, so that the last line
names the question at which the process ended.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MODULES = (
    "numpy", "torch", "torchvision", "triton", "deepspeed", "fairscale.nn", "diffusers", "diffusers.models.attention",
    "open_clip", "transformers", "webdataset", "submitit", "safetensors", "tensorboard", "sklearn",
)  # fmt: skip
"""Imported one after the other; xformers comes before, since diffusers imports it."""
_SECONDS = 180


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the process said.

    Attributes:
        known: answer by question; questions that raised an exception are missing.
        errors: the exception, or how the process ended, by question.
    """

    known: dict[str, Any]
    errors: dict[str, str]

    def about(self, question: str) -> dict[str, Any]:
        """The answer to a question that answers with several named values; empty if there is none."""
        answer = self.known.get(question)
        return answer if isinstance(answer, dict) else {}


def probe() -> Answers:
    """Ask in a new process of this Python."""
    command = [sys.executable, "-W", "ignore", "-m", "msdiff_dist.apps.doctor.probe"]
    ending = ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        output = done.stdout
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            ending = f"the process ended with status {done.returncode} {last}".strip()
    except subprocess.TimeoutExpired as e:
        output = e.stdout.decode() if isinstance(e.stdout, bytes) else e.stdout or ""
        ending = f"no answer in {_SECONDS} s"
    known, errors, asked = {}, {}, "start"
    for line in output.splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # libraries print lines of their own
            said = json.loads(line)
            if not isinstance(said, dict):
                continue
            if "question" in said:
                asked = said["question"]
            elif "answer" in said:
                known[asked] = said["answer"]
            elif "error" in said:
                errors[asked] = said["error"]
    if ending:
        errors[asked] = ending
    return Answers(known=known, errors=errors)


def main() -> None:
    """Ask every question, and print the answers."""
    warnings.simplefilter("ignore")
    for question, answer in _questions().items():
        print(json.dumps({"question": question}), flush=True)
        try:
            print(json.dumps({"answer": answer()}), flush=True)
        except Exception as e:  # a library that is broken may raise anything
            print(json.dumps({"error": f"{type(e).__name__}: {e}"}), flush=True)


def _questions() -> dict[str, Callable[[], Any]]:
    imports = {f"import {module}": lambda module=module: _imported(module) for module in ("xformers.ops", *MODULES)}
    return {**imports, "xformers": _xformers, "torch": _torch, "bf16": _bf16, "cores": _cores, "devices": _devices}


def _imported(module: str) -> None:
    importlib.import_module(module)


def _xformers() -> str | None:
    from msdiff_dist.models.xformers_attention import extension_problem

    return extension_problem()


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": list(torch.cuda.nccl.version()) if torch.distributed.is_nccl_available() else None,
        "architectures": torch.cuda.get_arch_list(),
        "available": torch.cuda.is_available(),
    }


def _bf16() -> dict[str, str]:
    import torch

    from msdiff_dist.distributed.precision import bf16_support

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return {str(device): str(bf16_support(device)) for device in devices}


def _cores() -> dict[str, Any]:
    from msdiff_dist.distributed.cores import cores

    own = cores()
    return {"count": len(own.numbers), "quota": own.quota}


def _devices() -> list[dict[str, Any]]:
    """The GPUs that torch sees, each after a sum on it."""
    import torch

    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        total = float(torch.ones(8, device=f"cuda:{i}").sum())
        free, size = torch.cuda.mem_get_info(i)
        found.append(
            {
                "name": properties.name,
                "capability": list(torch.cuda.get_device_capability(i)),
                "bytes": size,
                "free": free,
                "computes": total == 8.0,
            }
        )
    return found


if __name__ == "__main__":
    main()
