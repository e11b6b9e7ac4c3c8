"""Time of a training step (forward and backward) of our U-Net beside that of diffusers' UNet2DModel.

Both networks have the same weights, structure and multiply-adds, and compute the same function: outputs and gradients
are compared before anything is timed. Ours is set up as training sets it up: kernels, attention and memory format are
those of a run on this device. Steps of all sides alternate in one process, so that a busy machine slows all of them. On
a CPU the time is that of the process divided by the number of threads, which other processes disturb little. Ratios
below 1 mean that ours is faster.

    OMP_NUM_THREADS=1 python tools/bench_unet.py
    OMP_NUM_THREADS=1 python tools/bench_unet.py --compile
    python tools/bench_unet.py --device cuda --width 224 --size 64 --batch 48 --precision bf16
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from msdiff_dist.convert.formats.diffusers_unet import diffusers_unet_rules, stock_config
from msdiff_dist.distributed.kernels import choose_kernels
from msdiff_dist.models.compilation import compile_part
from msdiff_dist.models.ldm.config import LDMConfig
from msdiff_dist.models.multistage_unet import MultistageUNet, build_model

Step = Callable[[], Tensor]


def networks(width: int) -> tuple[MultistageUNet, Any]:
    """The LDM U-Net of CelebA-HQ with another base width, and diffusers' with the same weights."""
    from diffusers import UNet2DModel

    config = LDMConfig(encoder_channels=width, decoder_channels=(width,), num_head_channels=32)
    ours = build_model(config)
    generator = torch.Generator().manual_seed(0)
    for p in ours.parameters():  # layers that start as zero would hide what lies before them
        nn.init.normal_(p, std=0.5 / max(1, p[0].numel()) ** 0.5, generator=generator)
    description = stock_config(config)
    assert isinstance(description, dict)
    theirs: Any = UNet2DModel(**{name: value for name, value in description.items() if name != "_class_name"})
    tensors = dict(ours.named_parameters())
    state = {
        name: t.detach().clone()
        for rule in diffusers_unet_rules(config)
        for name, t in zip(rule.theirs, rule.layout.to_theirs(tensors[rule.ours]), strict=True)
    }
    theirs.load_state_dict(state)
    return ours, theirs


def training_step(network: Callable[[Tensor, Tensor], Tensor], parameters: list[Tensor], batch: list[Tensor]) -> Step:
    """A function that computes the gradients of the mean squared error and returns the network's output."""
    x_BCHW, t_B, target_BCHW = batch

    def step() -> Tensor:
        for p in parameters:
            p.grad = None
        output = network(x_BCHW, t_B)
        (output.float() - target_BCHW).square().mean().backward()
        return output.detach()

    return step


def multiply_adds(step: Step) -> int:
    """Of one step's matrix products and convolutions."""
    # Of attention the counter sees the products that it is made of, not the fused kernels of every device.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return int(counter.get_total_flops()) // 2


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def timed(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every side's steps, taken in turns; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            start = now(device)
            step()
            if i:
                seconds[name].append(now(device) - start)
    return seconds


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    # Threads of a parallel region spin while they wait, so the process's time counts each of them for the whole step.
    return time.process_time() / torch.get_num_threads()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true", help="compile both sides by torch.compile")
    parser.add_argument("--channels-last", action="store_true", help="on both sides; ours has it on GPUs anyway")
    parser.add_argument("--width", type=int, default=64, help="base width, a multiple of 32; CelebA-HQ's is 224")
    parser.add_argument("--size", type=int, default=32, help="height and width of the input; CelebA-HQ's is 64")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    ours, theirs = (network.to(device, dtype) for network in networks(args.width))
    their_format = torch.channels_last if args.channels_last else torch.contiguous_format
    for p in theirs.parameters():
        p.data = p.data.to(memory_format=their_format) if p.ndim == 4 else p.data
    generator = torch.Generator().manual_seed(1)
    x_BCHW, target_BCHW = (torch.randn(args.batch, 3, args.size, args.size, generator=generator) for _ in range(2))
    t_B = torch.randint(0, 1000, (args.batch,), generator=generator).to(device)
    x_BCHW, target_BCHW = x_BCHW.to(device, dtype), target_BCHW.to(device)
    forward: Any = theirs.forward
    if args.compile:
        compile_part(ours.shared)
        compile_part(ours.stages[0])
        forward = torch.compile(forward, dynamic=False)
    our_format = torch.channels_last if device.type == "cuda" else their_format
    steps = {
        "diffusers": training_step(
            lambda x, t: forward(x, t).sample,
            list(theirs.parameters()),
            [x_BCHW.contiguous(memory_format=their_format), t_B, target_BCHW],
        ),
        "ours": with_our_kernels(
            training_step(
                lambda x, t: ours.stages[0](*ours.shared(x, t)),
                list(ours.parameters()),
                [x_BCHW.contiguous(memory_format=our_format), t_B, target_BCHW],
            ),
            device,
        ),
    }
    compare(steps, ours, theirs, exact=dtype == torch.float32)
    report(steps, timed(steps, args.rounds, device), vars(args))


def with_our_kernels(step: Step, device: torch.device) -> Step:
    """The step under the settings of a run, which are put back after it."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32

    def configured() -> Tensor:
        choose_kernels(device, tf32=False)
        output = step()
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before[1:]
        return output

    return configured


def compare(steps: dict[str, Step], ours: nn.Module, theirs: nn.Module, exact: bool) -> None:
    """Take one step of each side and print how far apart outputs and gradients are."""
    starts = time.perf_counter()
    outputs = {}
    for name, step in steps.items():
        outputs[name] = step()
        print(f"{name}: first step in {time.perf_counter() - starts:.1f} s")
        starts = time.perf_counter()
    output = difference(outputs["ours"], outputs["diffusers"])
    norms = [sum(float(p.grad.double().square().sum()) for p in n.parameters() if p.grad is not None) ** 0.5
             for n in (ours, theirs)]  # fmt: skip
    print(f"outputs differ by {output:.1e}, norms of the gradients by {abs(norms[0] / norms[1] - 1):.1e}")
    assert not exact or output < 1e-5, "the two sides do not compute the same function"


def report(steps: dict[str, Step], seconds: dict[str, list[float]], settings: dict[str, Any]) -> None:
    """Print a table of all sides."""
    macs = {name: multiply_adds(step) for name, step in steps.items()} if not settings["compile"] else {}
    title = ", ".join(f"{name} {value}" for name, value in settings.items())
    table = Table("", "GMAC", "min, ms", "median, ms", "ratio of min", "ratio of median", title=title)
    base = seconds["diffusers"]
    for name, values in seconds.items():
        least, middle = min(values), statistics.median(values)
        table.add_row(
            name, f"{macs[name] / 1e9:.3f}" if macs else "", f"{1e3 * least:.1f}", f"{1e3 * middle:.1f}",
            f"{least / min(base):.3f}", f"{middle / statistics.median(base):.3f}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
