"""The image processor of a checkpoint, loaded through transformers without torchvision, and read as rules.

Images are then prepared by these rules, in `rtx.runtime.image_rules`. What the rules cannot say is refused here: an
image that is prepared a little differently shows in nothing but worse vectors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import transformers
from PIL import Image
from transformers import Qwen2VLImageProcessorPil
from transformers.image_processing_backends import PilBackend

from rtx.runtime.errors import CheckpointError, UsageError, nearest
from rtx.runtime.image_rules import CHANNELS, ImageRules, Resample

_SUPPORTED = "the image processors of Qwen2-VL to Qwen3-VL, CLIP, SigLIP, DINOv2 and ViT"
# What transformers says of a class, whatever else it says.
_FOR_TORCHVISION = re.compile(r"(\w+) requires the Torchvision library")
# The steps of a processor. A class that has its own does something else than its settings say.
_STEPS = (
    "preprocess",
    "_standardize_kwargs",
    "_preprocess_image_like_inputs",
    "process_image",
    "_preprocess",
    "resize",
    "center_crop",
    "rescale",
    "normalize",
    "patchify",
)


def load_image_processor(
    name: str, *, subfolder: str = "", revision: str | None = None, trust_remote_code: bool = False, **settings: Any
) -> Any:
    """The image processor that transformers makes of `preprocessor_config.json` or `processor_config.json`.

    It is the one that works with Pillow. `AutoProcessor` would need torchvision for Qwen3-VL, whose processor has a
    part for videos; the image processor by itself does not.

    Args:
        name: a folder, or a repository on the Hugging Face hub.
        subfolder: where the file lies in it.
        revision: branch, tag or commit, on the hub.
        trust_remote_code: run Python code that the checkpoint brings.
        settings: in place of the checkpoint's, such as `max_pixels` or `size`; what the processor does not know is
            ignored, as settings of a tokenizer may be among them (see `check_settings`).

    Raises:
        CheckpointError: there is none, or transformers cannot load it.
    """
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    # It would say for each processor that torchvision is missing.
    logging.set_verbosity_error()
    location = {"subfolder": subfolder, "revision": revision, "trust_remote_code": trust_remote_code}
    try:
        return transformers.AutoImageProcessor.from_pretrained(name, **{**settings, **location, "backend": "pil"})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as broken:
        where = "/".join(part for part in (name.rstrip("/"), subfolder) if part)
        reason = " ".join(str(broken).split())[:400]
        if needs_torchvision := _FOR_TORCHVISION.match(reason):
            raise CheckpointError(
                f"{where}: {needs_torchvision[1]}: works with torchvision alone; supported are {_SUPPORTED}"
            ) from broken
        raise CheckpointError(f"{where}: no image processor that transformers can load: {reason}") from broken
    finally:
        logging.set_verbosity(verbosity)


def check_settings(processor: Any, names: Iterable[str], where: str) -> None:
    """Refuse settings that an image processor would ignore: `max_pixels` means nothing to CLIP's.

    Raises:
        UsageError: lists them.
    """
    known = set(type(processor).valid_kwargs.__annotations__)
    unknown = [f"'{name}' ({nearest(name, known)})" for name in names if name not in known]
    if unknown:
        raise UsageError(f"{where}: {type(processor).__name__} has no setting {', '.join(unknown)}")


def image_rules(processor: Any, where: str) -> ImageRules:
    """What an image processor of transformers does, as data.

    Args:
        processor: one that works with Pillow.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: it does what the rules cannot say; all of that is listed.
    """
    source = f"{where}: {type(processor).__name__}"
    parent = Qwen2VLImageProcessorPil if isinstance(processor, Qwen2VLImageProcessorPil) else PilBackend
    if not isinstance(processor, PilBackend):
        raise CheckpointError(f"{source}: does not work with Pillow; expected one loaded with backend='pil'")
    if any(getattr(type(processor), step, None) is not getattr(parent, step, None) for step in _STEPS):
        hint = ""
        if type(processor).__name__.startswith("Siglip2"):
            hint = "; of SigLIP 2, the checkpoints with a fixed resolution can be used"
        raise CheckpointError(f"{source}: prepares images in a way of its own; supported are {_SUPPORTED}{hint}")
    problems: list[str] = []
    patches = parent is Qwen2VLImageProcessorPil
    values = _arithmetic(processor, problems) | (_in_patches if patches else _as_pixels)(processor, problems)
    if problems:
        raise CheckpointError(f"{source}: {'; '.join(problems)}")
    try:
        return ImageRules(**values)
    except (ValueError, TypeError) as wrong:
        raise CheckpointError(f"{source}: {wrong}") from wrong


def _arithmetic(processor: Any, problems: list[str]) -> dict[str, Any]:
    """Filter, factor and normalisation."""
    if not processor.do_resize:
        problems.append("do_resize: expected true, as images of any size cannot be joined")
    if processor.do_pad:
        problems.append("do_pad: padded images are not supported")
    rescale = processor.rescale_factor if processor.do_rescale else 1.0
    if not isinstance(rescale, float | int):
        problems.append(f"rescale_factor: expected a number, got {rescale!r}")
    return {
        "resample": _filter(processor.resample, problems),
        "rescale": rescale,
        "mean": _colours(processor, "image_mean", 0.0, problems),
        "std": _colours(processor, "image_std", 1.0, problems),
    }


def _filter(resample: object, problems: list[str]) -> str:
    for name in get_args(Resample):
        if Image.Resampling[name.upper()] == resample:
            return str(name)
    known = ", ".join(f"{Image.Resampling[name.upper()].value} ({name})" for name in get_args(Resample))
    problems.append(f"resample: expected one of {known}, got {resample!r}")
    return ""


def _colours(processor: Any, name: str, without: float, problems: list[str]) -> tuple[float, ...]:
    values = getattr(processor, name) if processor.do_normalize else without
    if isinstance(values, float | int):
        return (float(values),) * CHANNELS
    if not isinstance(values, list | tuple) or len(values) != CHANNELS:
        problems.append(f"{name}: expected {CHANNELS} numbers, got {values!r}")
        return ()
    return tuple(float(value) for value in values)


def _as_pixels(processor: Any, problems: list[str]) -> dict[str, Any]:
    size = dict(processor.size or {})
    crop = dict(processor.crop_size or {}) if processor.do_center_crop else None
    if crop is not None and set(crop) != {"height", "width"}:
        problems.append(f"crop_size: expected height and width, got {crop}")
    if set(size) == {"shortest_edge"}:
        if crop is None:
            problems.append("do_center_crop: expected true with size.shortest_edge, as images would differ in size")
        return {"layout": "pixels", "resize": "shortest_edge", **_whole(size, "size", problems), **(crop or {})}
    if set(size) != {"height", "width"}:
        problems.append(f"size: expected either height and width or shortest_edge, got {size}")
    elif crop is not None and crop != size:
        problems.append(f"crop_size: a crop from an image resized to {size} is not supported, got {crop}")
    return {"layout": "pixels", "resize": "exact", **_whole(size, "size", problems)}


def _in_patches(processor: Any, problems: list[str]) -> dict[str, Any]:
    size = dict(processor.size or {})
    if set(size) != {"shortest_edge", "longest_edge"}:
        problems.append(f"size: expected shortest_edge and longest_edge (numbers of pixels), got {size}")
    limits = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    geometry = {name: getattr(processor, name) for name in ("patch_size", "temporal_patch_size", "merge_size")}
    return {"layout": "patches", "resize": "multiple", **_whole({**geometry, **limits}, "settings", problems)}


def _whole(values: Mapping[str, Any], where: str, problems: list[str]) -> Mapping[str, Any]:
    problems += [
        f"{where}: {name}: expected a whole number, got {value!r}"
        for name, value in values.items()
        if not isinstance(value, int) or isinstance(value, bool)
    ]
    return values
