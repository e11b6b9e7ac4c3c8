"""What lies at a path in the place of a checkpoint, as a clause for an error, and what to name instead."""

from __future__ import annotations

from pathlib import Path

from msdiff_dist.data.foreign import what_it_is

_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".pkl", ".npz")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp")
_CONVERT = "Convert it first: `msdiff convert SRC DST --from FORMAT --to msdiff`."


def what_is(path: Path) -> tuple[str, str]:
    """The clause, and a remedy for where a checkpoint, an export or a run folder is needed."""
    if not path.exists():
        return "no such file or folder", "Correct the path."
    return _folder(path) if path.is_dir() else _file(path)


def _folder(folder: Path) -> tuple[str, str]:
    names = sorted(p.name for p in folder.iterdir())
    suffixes = {Path(name).suffix for name in names}
    if not names:
        return "is an empty folder", "Correct the path."
    if "checkpoint.json" in names:
        return "is a checkpoint of a run", "Use --from msdiff."
    if any((folder / "checkpoints").glob("step_*")):
        return "is a run folder", "Use --from msdiff."
    if (folder / "checkpoints").is_dir() or {"recipe.yaml", "metrics.jsonl"} <= {*names}:
        return "is a run folder that holds no complete checkpoint", "Train it first, or name another run."
    if "model_index.json" in names:
        return "is a diffusers pipeline", "Use --from diffusers with `msdiff convert`."
    if "config.json" in names and "model.safetensors" in names:
        return "is an export, which holds weights and no state of the training", "Name a run folder or a checkpoint."
    if "config.json" in names:
        return "is the folder of a model of another program", "Use --from diffusers with `msdiff convert`."
    if "latest" in names or any(name.endswith("_model_states.pt") for name in names):
        return "is a DeepSpeed checkpoint folder", "Use --from deepspeed with `msdiff convert`."
    if ".tar" in suffixes:
        return "is a folder of shards", "Shards are data: a recipe names them in data.shards."
    runs = [name for name in names if (folder / name / "checkpoints").is_dir()]
    if runs:
        return f"is a folder of {len(runs)} runs", f"Name one of them: {', '.join(runs[:5])}."
    weights = [name for name in names if Path(name).suffix in _WEIGHTS]
    if weights:
        return f"is a folder of files of weights ({', '.join(weights[:5])})", "Name one file, and convert it."
    if suffixes & {*_IMAGES}:
        return "is a folder of images", "Correct the path."
    if suffixes & {".yaml", ".yml"}:
        return "is a folder of recipes", "Name the run folder that one of them made."
    return f"holds no checkpoint, but {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}", "Correct the path."


def _file(file: Path) -> tuple[str, str]:
    if file.suffix in (".yaml", ".yml"):
        return "is a recipe or another YAML file", "Name the run folder that the recipe made, or a checkpoint in it."
    if file.suffix == ".tar":
        return "is a shard", "Shards are data: a recipe names them in data.shards."
    if file.suffix in _WEIGHTS:
        return "is a file of weights of another program", _CONVERT
    with file.open("rb") as opened:
        what = what_it_is(opened.read(512))
    return what or "is no checkpoint", "Name a run folder, a checkpoint or an export."
