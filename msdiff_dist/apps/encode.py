"""`msdiff data encode`: a recipe's images and captions -> shards of latents and embeddings, on several processes.

The folder's `.encode` holds one record for each finished shard. So the same command resumes, several processes can each
encode a part, and who ends last writes `manifest.json` with the scale factor measured over all shards.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from msdiff_dist.config import to_mapping
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.fingerprint import fingerprint_shards
from msdiff_dist.data.index import Shard
from msdiff_dist.data.loader import load_index
from msdiff_dist.data.make.encoding import Networks, ShardEncoder, ShardRecord, measured_scale
from msdiff_dist.data.make.manifest import MANIFEST, NULL_CONTEXT, Manifest, ManifestFile, NetworkIdentity, stored_file
from msdiff_dist.data.make.shard_writer import write_index
from msdiff_dist.data.worker_processes import end_with_parent
from msdiff_dist.distributed.cores import cores, threads_of
from msdiff_dist.errors import ConfigError, DataError, MsdiffError
from msdiff_dist.files.atomic import atomic_write, remove_partials
from msdiff_dist.files.folder_claim import FolderClaim
from msdiff_dist.files.work_share import Part, alone
from msdiff_dist.models.autoencoder import LatentCodec
from msdiff_dist.models.text_encoder import open_text_encoder
from msdiff_dist.recipe import Recipe, recipe_from, recipe_mapping
from msdiff_dist.terminal import LongWork

_RECORDS = ".encode"


def encode(recipe: Recipe, out: Path, nproc: int, part: Part | None = None) -> Manifest | None:
    """Encode what is not encoded yet of the recipe's images, or of this part of their shards, into the folder `out`.

    Args:
        nproc: processes on this machine; they share its GPUs, if there are any.

    Returns:
        The manifest; None while shards of other parts are missing.

    Raises:
        ConfigError: the recipe has no images to encode. DataError: too many are corrupt, or `out` holds something else.
        MsdiffError: an encoding process died.
    """
    source, shards = _source(recipe), source_shards(recipe)
    (fingerprints,) = fingerprint_shards([shards])
    tools = _Tools(recipe, torch.device("cpu"))
    part = part or Part()
    claim = FolderClaim(
        folder=out, record=out / _RECORDS / "settings.json", locks=out / _RECORDS, content="latents", error=DataError
    )
    with claim.held(_settings(recipe, tools, fingerprints), part):
        mine = part.share(range(len(fingerprints)))
        remove_partials(out, [_shard_name(i) for i in mine])
        missing = [i for i in mine if not _finished(out, i, fingerprints[i])]
        _encode_shards(recipe, tools, shards, fingerprints, missing, out, nproc)
        # One process at a time: whichever part ends last finds the records of all shards.
        with alone(out / _RECORDS):
            found = [_finished(out, i, fingerprint) for i, fingerprint in enumerate(fingerprints)]
            records = [record for record in found if record]
            _check_corruption(records, source.max_bad)
            if len(records) < len(fingerprints):
                return None
            manifest = _manifest(recipe, tools, records, tuple(fingerprints), out)
            write_index(out, recipe.name, {record.file.name: record.file.samples for record in records})
            atomic_write(out / MANIFEST, manifest.dump())
    return manifest


class _Tools:
    """The recipe's frozen networks on one device."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.codec = LatentCodec(recipe.autoencoder, True, device)
        self.text = open_text_encoder(recipe.text_encoder, device) if recipe.text_encoder else None
        posterior = recipe.autoencoder.kind == "kl"
        self.encode_shard = ShardEncoder(
            recipe.encode, _source(recipe), Networks(self.codec.encode, posterior, self.text)
        )


def source_shards(recipe: Recipe) -> list[Shard]:
    """The shards of the images to encode.

    Raises:
        ConfigError: the recipe has no images to encode. DataError: the shards are missing or corrupt.
    """
    (shards,) = load_index(_source(recipe))
    return shards


def _source(recipe: Recipe) -> DataConfig:
    """The images to encode: `encode.data`, or else the recipe's `data`."""
    source = recipe.encode.data or recipe.data
    if source.kind != "image":
        raise ConfigError("encode.data", None, "the recipe names no images to encode", "Give encode.data.shards.")
    if len(source.mixed) > 1:
        raise ConfigError("encode.data.sources", len(source.sources), "only one can be encoded", "Encode one by one.")
    if recipe.encode.store == "moments" and recipe.autoencoder.kind != "kl":
        problem = f"a {recipe.autoencoder.kind} autoencoder has no posterior"
        raise ConfigError("encode.store", "moments", problem, "Use samples.")
    return source


def _settings(recipe: Recipe, tools: _Tools, fingerprints: list[str]) -> dict[str, Any]:
    """What must be the same when an encoding is resumed."""
    # Where the shards lie and how they are read may change; their fingerprints may not.
    source = {**to_mapping(_source(recipe)), "shards": None, "sources": None}
    for free in ("lanes", "workers", "shuffle", "retries", "allow_pipe", "max_bad", "accept_changes"):
        source.pop(free)
    chosen = {**to_mapping(recipe.encode), "data": source, "batch_size": None}
    identities = [tools.codec.identity, tools.text.identity if tools.text else None]
    return {"encode": chosen, "networks": identities, "source": fingerprints}


def _shard_name(number: int) -> str:
    return f"{number:05d}.tar"


def _finished(out: Path, number: int, fingerprint: str) -> ShardRecord | None:
    """The record of shard `number`, if it was encoded to its end from the source shard of this fingerprint."""
    record = ShardRecord.load(out / _RECORDS / f"{number:05d}.json")
    if record is None or record.mark != fingerprint:
        return None
    shard = out / record.file.name
    return record if shard.exists() and shard.stat().st_size == record.file.bytes else None


def _encode_shards(
    recipe: Recipe,
    tools: _Tools,
    shards: list[Shard],
    fingerprints: list[str],
    missing: list[int],
    out: Path,
    nproc: int,
) -> None:
    """Encode the shards whose numbers are `missing`, and show how far that is."""
    with LongWork("encoding", sum(shards[i].num_samples for i in missing), "images") as work:
        if nproc == 1 and not torch.cuda.is_available():
            tools.encode_shard.encoded = work.advance
            for i in missing:
                _encode_one(tools, i, shards[i], fingerprints[i], out)
            return
        # Not fork: CUDA does not work in a fork of a process that has used it.
        context = multiprocessing.get_context("forkserver")
        devices: SimpleQueue[str] = context.SimpleQueue()  # each process takes one
        for i in range(nproc):
            devices.put(f"cuda:{i % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu")
        own, encoded = cores(), context.Value("q", 0)
        start = (recipe_mapping(recipe), devices, threads_of(own, [own] * nproc), encoded)
        with ProcessPoolExecutor(nproc, context, _start_process, start) as pool:
            pending = {pool.submit(_encode_here, i, shards[i], fingerprints[i], out) for i in missing}
            done = shown = 0
            try:
                while pending:
                    ended, pending = wait(pending, 1.0, FIRST_COMPLETED)
                    for future in ended:
                        future.result()
                        done += 1
                    now = encoded.value
                    work.advance(now - shown)
                    shown = now
            except BrokenProcessPool:
                problem = f"an encoding process died; {done} shards were finished"
                raise MsdiffError(f"{problem}. Give the same command again to resume") from None
            finally:
                pool.shutdown(cancel_futures=True)


_process_tools: _Tools | None = None  # of this encoding process, made when it starts


def _start_process(recipe: dict[str, Any], devices: SimpleQueue[str], threads: int, encoded: Synchronized[int]) -> None:
    """Body of an encoding process's start. `encoded` counts the images of all processes."""
    global _process_tools
    # The process ends with the command; finished shards stay, and the unfinished one is encoded again.
    end_with_parent()
    torch.set_num_threads(threads)
    _process_tools = _Tools(recipe_from(recipe), torch.device(devices.get()))

    def count(images: int) -> None:
        with encoded.get_lock():
            encoded.value += images

    _process_tools.encode_shard.encoded = count


def _encode_here(number: int, shard: Shard, fingerprint: str, out: Path) -> None:
    assert _process_tools
    _encode_one(_process_tools, number, shard, fingerprint, out)


def _encode_one(tools: _Tools, number: int, shard: Shard, fingerprint: str, out: Path) -> None:
    # The record comes after the shard, so a record without its shard cannot be left by a kill.
    record = tools.encode_shard(number, shard, fingerprint, out / _shard_name(number))
    atomic_write(out / _RECORDS / f"{number:05d}.json", record.dump())


def _check_corruption(records: list[ShardRecord], max_bad: int) -> None:
    left_out = [corruption for record in records for corruption in record.left_out]
    if len(left_out) > max_bad:
        problem = f"{len(left_out)} corrupt shards or samples were skipped, the last: {left_out[-1]}"
        raise DataError("data.max_bad", max_bad, problem, "Repair or remove them, or raise max_bad.")


def _manifest(
    recipe: Recipe, tools: _Tools, records: list[ShardRecord], fingerprints: tuple[str, ...], out: Path
) -> Manifest:
    """The manifest of all shards. The embedding of the empty caption, which it names, is written here."""
    shape = next((record.shape for record in records if record.shape), None)
    if shape is None:
        raise DataError("encode.data.shards", len(records), "hold no sample that can be used", "Check them.")
    null_context: ManifestFile | None = None
    if tools.text:
        context, mask = tools.text([""])
        stored = {"context": context[0].to(getattr(torch, recipe.encode.dtype)), "mask": mask[0]}
        atomic_write(out / NULL_CONTEXT, save(stored))
        null_context = stored_file(out / NULL_CONTEXT)
    measure, autoencoder, text_encoder = recipe.encode.measure_scale, recipe.autoencoder, recipe.text_encoder
    C, H, W = shape
    return Manifest(
        samples=sum(record.file.samples for record in records),
        shape=(C, H, W),
        dtype=recipe.encode.dtype,
        moments=recipe.encode.store == "moments",
        flip=recipe.encode.flip,
        scale_factor=measured_scale(records) if measure else autoencoder.scale_factor,
        scale_measured=measure,
        autoencoder=NetworkIdentity(autoencoder.path or autoencoder.kind, tools.codec.identity),
        text_encoder=NetworkIdentity(text_encoder.name, tools.text.identity) if text_encoder and tools.text else None,
        context_shape=tools.text.context_shape if tools.text else None,
        null_context=null_context,
        source=fingerprints,
        left_out=tuple(corruption for record in records for corruption in record.left_out),
        shards=tuple(record.file for record in records),
    )
