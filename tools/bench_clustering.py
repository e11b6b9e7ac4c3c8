"""Measure the time of a data set's optimal denoiser in three ways: streamed in blocks, as this package computes it; in
a loop over draws on data in memory; and in a loop in which each draw reads the images twice through a DataLoader, as
the paper's published scripts do.

    python tools/bench_clustering.py --images /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

from msdiff_dist.diffusion.clock import clock_times
from msdiff_dist.diffusion.processes.vp import VPConfig, VPProcess
from msdiff_dist.pixels import unit
from msdiff_dist.stage_division.image_blocks import DataBlocks, image_sources
from msdiff_dist.stage_division.methods import float_blocks
from msdiff_dist.stage_division.optimal_denoiser import Draws, draw_samples, limit_similarities, optimal_noise

ETA = 2 / 256


class Images(Dataset[Tensor]):
    """Square images [d], converted one by one as an image data set converts them."""

    def __init__(self, pixels_Nd: np.ndarray) -> None:
        side = round(pixels_Nd.shape[1] ** 0.5)
        self._pixels = pixels_Nd.reshape(-1, side, side)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, i: int) -> Tensor:
        out: Tensor = to_tensor(Image.fromarray(self._pixels[i])).flatten()
        return out


def by_data_loader(pixels_Nd: np.ndarray, u_d: Tensor, sigma: float, workers: int) -> Tensor:
    """The optimal noise estimate [d] for one noisy sample: a pass for the largest exponent, another for the sums."""
    loader = DataLoader(Images(pixels_Nd), batch_size=4096, shuffle=True, num_workers=workers)

    def exponents(batch: Tensor) -> Tensor:
        return -(u_d - batch).square().sum(1).double() / (2 * sigma**2)

    highest = max(float(exponents(batch).max()) for batch in loader)
    total, weighted = 0.0, torch.zeros_like(u_d, dtype=torch.float64)
    for batch in loader:
        weights = torch.exp(exponents(batch) - highest)
        total += float(weights.sum())
        weighted += (weights[:, None] * batch).sum(0)
    return (u_d - weighted / total) / sigma


def by_memory(data_Nd: Tensor, u_d: Tensor, sigma: float) -> Tensor:
    """The optimal noise estimate [d] for one noisy sample, from all data in memory at once."""
    weights = torch.softmax(-(u_d - data_Nd).square().sum(1).double() / (2 * sigma**2), 0)
    return (u_d - (weights[:, None] * data_Nd).sum(0)) / sigma


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of square grey images, or IDX file")
    parser.add_argument("--samples", type=int, default=2000, help="draws of the streamed way")
    parser.add_argument("--loop-samples", type=int, default=5, help="draws of the loop in memory")
    parser.add_argument("--loader-samples", type=int, default=2, help="draws of the loop over a DataLoader")
    parser.add_argument("--workers", type=int, default=8, help="workers of the DataLoader")
    args = parser.parse_args()

    process, sources = VPProcess(VPConfig()), image_sources(args.images)
    pixels = np.concatenate([rows for _, rows in DataBlocks(sources)])
    blocks = float_blocks(sources, "01", torch.device("cpu"))

    start = time.perf_counter()
    draws = draw_samples(blocks, len(pixels), args.samples, seed=0)
    found = limit_similarities(process, blocks, draws, ETA, seed=0)
    streamed = (time.perf_counter() - start) / args.samples
    print(f"{len(pixels)} x {pixels.shape[1]}, {args.samples} draws, {torch.get_num_threads()} threads")
    print(f"streamed in blocks      {streamed * 1e3:9.2f} ms a draw, {streamed * args.samples:.1f} s in all")

    sigmas = process.sigma_of(clock_times(process, found.clock_M))
    # The slow ways take a few of the draws only, spread over all times.
    picks = np.linspace(0, args.samples - 1, args.loop_samples).round().astype(int)
    noisy = draws.sample_Md + torch.from_numpy(sigmas)[:, None] * draws.noise_Md
    data = unit(torch.from_numpy(pixels).float())
    start = time.perf_counter()
    looped = [by_memory(data, noisy[i].float(), sigmas[i]) for i in picks]
    memory = (time.perf_counter() - start) / len(picks)
    print(f"loop over data in memory {memory * 1e3:8.2f} ms a draw: {memory / streamed:.0f} times as long")

    start = time.perf_counter()
    loaded = [by_data_loader(pixels, noisy[i].float(), sigmas[i], args.workers) for i in picks[: args.loader_samples]]
    loader = (time.perf_counter() - start) / len(loaded)
    print(f"loop over a DataLoader  {loader * 1e3:9.2f} ms a draw: {loader / streamed:.0f} times as long")

    some = Draws(draws.sample_Md[picks], draws.noise_Md[picks], draws.mean_d)
    ours = optimal_noise(blocks, some.sample_Md, some.noise_Md, torch.from_numpy(sigmas[picks]))
    in_float64 = unit(torch.from_numpy(pixels).double())
    exact = [by_memory(in_float64, noisy[i], sigmas[i]) for i in picks]
    print(f"largest difference from the loop in float64: {largest(list(ours), exact):.1e}")
    print(f"and of the float32 loops from it: {max(largest(looped, exact), largest(loaded, exact)):.1e}")


def largest(found: list[Tensor], exact: list[Tensor]) -> float:
    """Largest difference between entries; the shorter list decides how many are compared."""
    return max((a - b).abs().max().item() for a, b in zip(found, exact, strict=False))


if __name__ == "__main__":
    main()
