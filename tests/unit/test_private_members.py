"""Members of other libraries that they do not promise to keep: each is there, in the shape that is used.

Where one of these fails, the upper bound in pyproject.toml let a version in that has changed; the message says what of
ours breaks.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import pytest

CALLS = [
    # module, member, arguments it has to take, what breaks
    ("torch.distributed.distributed_c10d", "_get_default_store", [], "objects between ranks (agree, object_exchange)"),
    ("torch._C._distributed_c10d", "_dump_nccl_trace", [], "the record of the last collectives (flight_recorder)"),
    ("torch", "_foreach_lerp_", ["a", "b", "weight"], "moving averages (training.ema)"),
    ("torch", "_foreach_norm", ["a", "2", "dtype"], "gradient norms (distributed.part_engines)"),
    ("torch", "_foreach_copy_", ["a", "b"], "averages of a warm start (checkpoint.load)"),
    ("torch._subclasses.fake_tensor", "FakeTensorMode", ["allow_non_fake_inputs="], "memory in plans (models.trace)"),
    ("torch.utils.flop_counter", "sdpa_flop_count", ["query", "key", "value"], "time in plans (models.trace)"),
    ("torch.utils.flop_counter", "sdpa_backward_flop_count", ["gradient", "q", "k", "v"], "time in plans"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.backward", ["self", "loss", "scale_wrt_gas="], "backward, ZeRO 3"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.step", ["self"], "accumulation and steps, ZeRO 3"),
    ("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3._get_norm_groups", ["self"], "clipping, ZeRO 3"),
    (
        "deepspeed.runtime.zero.stage3",
        "DeepSpeedZeroOptimizer_Stage3._get_param_partition_rank",
        ["self", "param"],
        "checkpoints and averages, ZeRO 3",
    ),
    (
        "deepspeed.runtime.zero.stage3",
        "DeepSpeedZeroOptimizer_Stage3.get_param_id",
        ["self", "param"],
        "checkpoints and averages, ZeRO 3",
    ),
    (
        "deepspeed.runtime.zero.stage3",
        "DeepSpeedZeroOptimizer_Stage3._reassign_or_swap_out_partitioned_parameters",
        ["self", "group"],
        "resuming, ZeRO 3",
    ),
    ("submitit.core.job_environment", "JobEnvironment._requeue", ["self", "countdown"], "requeueing (launch.job)"),
    (
        "submitit.slurm.slurm",
        "SlurmExecutor._make_submission_file_text",
        ["self", "command", "uid"],
        "`msdiff launch --dry-run`, and the check before a submission",
    ),
    ("webdataset.tariterators", "group_by_keys", ["data", "keys"], "reading samples (data.tar_members)"),
    ("webdataset.filters", "shuffle", ["size"], "`msdiff data bench`"),
    ("multiprocessing.forkserver", "ensure_running", [], "starting loader workers (data.loader)"),
    ("multiprocessing.resource_tracker", "ensure_running", [], "starting loader workers (data.loader)"),
    ("diffusers.utils.torch_utils", "randn_tensor", ["shape", "generator="], "sampling (diffusion.solvers)"),
]

ASSIGNED = [
    # module, class, attributes that its methods set, what breaks
    (
        "deepspeed.runtime.zero.stage_1_and_2",
        "DeepSpeedZeroOptimizer",
        ["bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups", "optimizer"],
        "reductions, averages and checkpoints, ZeRO 1 and 2",
    ),
    (
        "deepspeed.runtime.zero.stage3",
        "DeepSpeedZeroOptimizer_Stage3",
        [
            "averaged_gradients",
            "fp32_partitioned_groups_flat",
            "fp16_groups",
            "grad_position",
            "persistent_parameters",
            "optimizer",
        ],
        "norms, averages and checkpoints, ZeRO 3",
    ),
]

PRESENT = [
    # module, member, what breaks
    ("torch.testing._internal.distributed.fake_pg", "FakeStore", "`msdiff plan --rehearse`"),
    ("torch.utils._python_dispatch", "TorchDispatchMode", "`msdiff plan --rehearse`"),
    ("torch.distributed", "ProcessGroup.unbox", "`msdiff plan --rehearse`"),
    ("torch.distributed", "Store.clone", "saves beside training (object_exchange)"),
    ("torch", "Tensor.grad_dtype", "fp32 gradients of bf16 parameters (distributed.flat_gradients)"),
    ("deepspeed.utils.groups", "mpu", "engines of several groups in one process (distributed.deepspeed_engine)"),
    ("deepspeed.ops", "__compatible_ops__", "quick starts on CPU ranks (distributed.deepspeed_engine)"),
    ("submitit.slurm.slurm", "SlurmExecutor._submitit_command_str", "`msdiff launch --dry-run`"),
    ("submitit.core.utils", "FailedJobError", "what SLURM says when it refuses a job"),
    ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline", "exported pipelines"),
    ("diffusers.pipelines.pipeline_utils", "ImagePipelineOutput", "exported pipelines"),
    ("diffusers.models.attention_processor", "Attention", "exported multi-stage models"),
    ("diffusers.models.downsampling", "Downsample2D", "exported multi-stage models"),
    ("diffusers.models.embeddings", "TimestepEmbedding", "exported multi-stage models"),
    ("diffusers.models.embeddings", "Timesteps", "exported multi-stage models"),
    ("diffusers.models.resnet", "ResnetBlock2D", "exported multi-stage models"),
    ("diffusers.models.transformers.transformer_2d", "Transformer2DModel", "exported multi-stage models"),
    ("diffusers.models.upsampling", "Upsample2D", "exported multi-stage models"),
    ("open_clip.transformer", "TextTransformer.forward_intermediates", "text encoders (models.open_clip_text)"),
    ("fairscale.nn", "checkpoint_wrapper", "activation checkpointing"),
]

PRELOADED = ["torch._dynamo", "torch._refs", "deepspeed.runtime.zero.muon.muon_optimizer"]


def member(module: str, path: str, use: str) -> Any:
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as e:
        pytest.fail(f"{use} needs {module}.{path}: {e}")
    return found


@pytest.mark.parametrize(("module", "path", "arguments", "use"), CALLS, ids=[f"{c[0]}.{c[1]}" for c in CALLS])
def test_it_can_be_called(module: str, path: str, arguments: Sequence[str], use: str) -> None:
    found = member(module, path, use)
    assert callable(found), use
    if inspect.isbuiltin(found):  # torch's own: no signature to look at
        return
    positional = [None for name in arguments if not name.endswith("=")]
    named = {name[:-1]: None for name in arguments if name.endswith("=")}
    inspect.signature(found).bind(*positional, **named)


@pytest.mark.parametrize(("module", "path", "attributes", "use"), ASSIGNED, ids=[a[1] for a in ASSIGNED])
def test_it_sets_its_attributes(module: str, path: str, attributes: Sequence[str], use: str) -> None:
    tree = ast.parse(inspect.getsource(member(module, path, use)))
    stored = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    assert not set(attributes) - stored, use


@pytest.mark.parametrize(("module", "path", "use"), PRESENT, ids=[f"{p[0]}.{p[1]}" for p in PRESENT])
def test_it_is_there(module: str, path: str, use: str) -> None:
    member(module, path, use)


def test_deepspeed_mpu_starts_as_none() -> None:
    from deepspeed.utils import groups

    assert groups.mpu is None, "engines put their own in for each call, and back"


def test_fragments_of_zero_have_addresses() -> None:
    of_module, use = "deepspeed.utils.tensor_fragment", "checkpoints and averages, ZeRO 1 and 2"
    fragment = {f.name for f in dataclasses.fields(member(of_module, "tensor_fragment", use))}
    assert {"lp_fragment_address", "hp_fragment_address", "param_group_index"} <= fragment
    assert {f.name for f in dataclasses.fields(member(of_module, "fragment_address", use))} >= {"start", "numel"}


@pytest.mark.parametrize("module", PRELOADED)
def test_what_ranks_share_can_be_imported(module: str) -> None:
    importlib.import_module(module)
