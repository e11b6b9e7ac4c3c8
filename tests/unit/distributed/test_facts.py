"""Which ranks may train together, and what is said of those that may not."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest
import torch

from msdiff_dist.distributed.facts import (
    AskedGpus,
    Facts,
    compare,
    driver_version,
    facts_of_this_rank,
    ranks_text,
    refused_gpus,
)

CPU = Facts(package="0.1.0", python="3.11.7", torch="2.14.1", cuda="13.0", nccl="2.30.7")
GPU = replace(CPU, driver="580.65.06", gpu="NVIDIA H100 80GB HBM3")

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here a GPU is visible")


def ranks(*facts: Facts, per_host: int = 2) -> list[Facts]:
    """Facts of ranks, numbered, `per_host` on each host; GPUs differ."""
    return [
        replace(own, rank=i, host=f"node{i // per_host}", gpu_uuid=f"GPU-{i}" if own.gpu != "none" else "")
        for i, own in enumerate(facts)
    ]


def refusal(facts: list[Facts]) -> str:
    error, _ = compare(facts)
    assert error is not None
    return str(error)


def test_equal_ranks_may_train_on_cpus_and_on_gpus() -> None:
    assert compare(ranks(CPU, CPU, CPU)) == (None, [])
    assert compare(ranks(GPU, GPU, GPU)) == (None, [])


def test_gpus_on_some_ranks_only() -> None:
    message = refusal(ranks(GPU, GPU, GPU, CPU))
    assert "a GPU on ranks 0-2 (node0, node1), none on rank 3 (node1)" in message
    assert "some ranks have a GPU and others none" in message


def test_two_ranks_on_one_gpu_of_a_host() -> None:
    shared = [replace(own, gpu_uuid="GPU-7") for own in ranks(GPU, GPU)]
    message = refusal(shared)
    assert "GPU-7" in message
    assert "ranks 0 and 1 on node0 use the same NVIDIA H100" in message
    two_hosts = [replace(own, gpu_uuid="") for own in ranks(GPU, GPU)]
    assert compare(two_hosts)[0] is None, "a GPU without an identity is not compared"


@pytest.mark.parametrize(
    ("field", "other", "name"),
    [
        ("torch", "2.13.0", "torch"),
        ("cuda", "12.8", "CUDA"),
        ("nccl", "2.28.3", "nccl"),
        ("package", "0.0.9", "msdiff"),
    ],
)
def test_different_versions_are_refused(field: str, other: str, name: str) -> None:
    message = refusal(ranks(GPU, GPU, replace(GPU, **{field: other})))
    assert message.startswith(name)
    assert f"{other} on rank 2 (node1)" in message


def test_different_gpus_and_drivers_are_worth_a_warning() -> None:
    error, warnings = compare(ranks(GPU, replace(GPU, gpu="NVIDIA H200", driver="570.1.1")))
    assert error is None
    assert any("NVIDIA H200 on rank 1 (node0)" in warning for warning in warnings)
    assert any("580.65.06 on rank 0" in warning for warning in warnings)


def test_the_first_rank_that_cannot_train_by_itself_is_quoted() -> None:
    refused = replace(CPU, refusal=("LOCAL_RANK", 2, "host node1 shows 1 GPU", "Start one rank per GPU."))
    assert refusal(ranks(GPU, refused, CPU)) == "LOCAL_RANK = 2: host node1 shows 1 GPU. Start one rank per GPU."


def test_facts_of_another_version_may_have_more_fields_or_fewer() -> None:
    assert Facts.load({"rank": 3, "colour": "red"}) == Facts(rank=3)


@without_gpu
def test_asked_for_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused_gpus(AskedGpus(2, "gpus_per_node"), "node7")
    assert error is not None
    message = str(error)
    assert message.startswith("gpus_per_node = 2: host node7 shows no GPU: ")
    assert torch.__version__ in message
    if driver_version() is None and torch.version.cuda:
        assert "there is no NVIDIA driver" in message
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if torch.version.cuda:
        assert "CUDA_VISIBLE_DEVICES is ''" in str(refused_gpus(AskedGpus(2, "gpus_per_node"), "node7"))
    assert refused_gpus(None, "node7") is None


@pytest.mark.parametrize("variable", ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"])
def test_an_interface_that_is_not_there(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = socket.if_nameindex()[0][1]
    monkeypatch.setenv(variable, "ib77")
    found = facts_of_this_rank(0, 0, None).refusal
    assert found is not None
    assert found[:2] == (variable, "ib77")
    assert here in found[2]
    for accepted in (here, f"ib77,{here}", *([f"={here}", here[:-1], "^ib77"] if variable.startswith("NCCL") else [])):
        monkeypatch.setenv(variable, accepted)
        assert facts_of_this_rank(0, 0, None).refusal is None, accepted
    if variable.startswith("NCCL"):
        monkeypatch.setenv(variable, f"={here[:-1]}")
        assert facts_of_this_rank(0, 0, None).refusal is not None


def test_ranks_in_words() -> None:
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
