"""A checkpoint's image processor: read as rules, and written back as the files that transformers reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtx.runtime.image_rules import ImageRules
from rtx.trainer.backbone import Source
from rtx.trainer.image_processor import check_settings, image_rules, load_image_processor
from rtx.trainer.json_files import read_object, write_json

_FILE = "preprocessor_config.json"
_JOINT_FILE = "processor_config.json"
_VIDEO_FILE = "video_preprocessor_config.json"
_CLASS_KEY = "processor_class"


class ImageProcessing:
    """How a model's images are prepared.

    Args:
        processor: an image processor of transformers.
        rules: the same as data, which is what is run.
        video: the settings of its processor of videos, if it has one. No video is prepared here, but transformers does
            not open the checkpoint without them.
        joint_class: the class of transformers that joins it with a tokenizer, if the checkpoint names it. A folder of
            adapters, which has no config.json, has nothing else that tells.
    """

    def __init__(
        self,
        processor: Any,
        rules: ImageRules,
        video: Mapping[str, Any] | None = None,
        joint_class: str | None = None,
    ) -> None:
        self.processor = processor
        self.rules = rules
        self._video = video
        self._joint_class = joint_class

    @classmethod
    def load(
        cls, source: Source, folder: str, options: Mapping[str, Any], *, settings: Mapping[str, Any] | None = None
    ) -> ImageProcessing:
        """Read the image processor of a checkpoint.

        Args:
            source: the checkpoint.
            folder: where the processor's files lie in it; "" for its root.
            options: of the checkpoint's own, in place of what the files say; those that mean nothing to an image
                processor are passed over, since they may be a tokenizer's.
            settings: of the caller, in place of all of them.

        Raises:
            CheckpointError: it is missing, or prepares images in a way that is not supported.
            UsageError: the processor has no such setting.
        """
        where = "/".join(part for part in (source.name.rstrip("/"), folder) if part)
        settings = settings or {}
        chosen = {**options, **settings}
        processor = load_image_processor(source.name, subfolder=folder, revision=source.revision, **chosen)
        check_settings(processor, settings, where)
        combined, own, video = (
            read_object(source.folder / folder / name) or {} for name in (_JOINT_FILE, _FILE, _VIDEO_FILE)
        )
        return cls(
            processor,
            image_rules(processor, where),
            video or combined.get("video_processor"),
            combined.get(_CLASS_KEY) or own.get(_CLASS_KEY),
        )

    def save(self, folder: Path, *, alone: bool = False) -> None:
        """Write the processor's files into a folder that exists; `alone` if there is no tokenizer in it."""
        self.processor.save_pretrained(folder)
        if self._joint_class is not None and not alone:
            settings = read_object(folder / _FILE) or {}
            write_json(folder / _FILE, {**settings, _CLASS_KEY: self._joint_class}, indent=2, sort_keys=True)
        if self._video is not None:
            write_json(folder / _VIDEO_FILE, dict(self._video), indent=2, sort_keys=True)
