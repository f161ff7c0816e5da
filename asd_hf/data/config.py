"""The `data` section of a configuration: which images, and what is done to them before a model sees them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from ..errors import UserError


@dataclass
class DataConfig:
    """See the help of each field, which `--help` prints."""

    source: str = field(
        default="shapes",
        metadata={
            "help": "a COCO folder, a data set saved on disk, a folder of Parquet or WebDataset shards, a Hub id, or "
            "'shapes' for the generated one ('shapes?num_train=2000&num_val=400&image_size=128&seed=0')"
        },
    )
    train_split: str | None = field(
        default="train", metadata={"help": "split to train on; null: train on data.unlabelled alone"}
    )
    eval_split: str = field(default="val", metadata={"help": "split to evaluate on"})
    unlabelled: str | None = field(
        default=None,
        metadata={
            "help": "images without annotations, which train from the teacher alone: a folder of images, searched "
            "with its subfolders, or a data set as in data.source; '#split' behind it names another split than "
            "'train' ('data/coco#unlabeled2017'); its annotations, if any, are not read"
        },
    )
    box_format: str | None = field(
        default=None,
        metadata={
            "help": "how the source writes a box, 'xywh' or 'xyxy', in absolute pixels; null takes what the layout "
            "states or what its first boxes prove, and stops if they prove nothing",
            "choices": ["xywh", "xyxy"],
        },
    )
    resize: str = field(
        default="multiscale",
        metadata={
            "help": "'multiscale': keep the aspect ratio, the shorter side as train_sizes and eval_size say, the "
            "longer one at most max_size; 'fixed': every image to fixed_size",
            "choices": ["multiscale", "fixed"],
        },
    )
    train_sizes: list[int] = field(
        default_factory=lambda: list(range(480, 801, 32)),
        metadata={"help": "shorter sides in pixels, one drawn for each training image"},
    )
    eval_size: int = field(default=800, metadata={"help": "shorter side in pixels in evaluation"})
    max_size: int = field(
        default=1333, metadata={"help": "cap of the longer side in pixels, whatever the shorter one"}
    )
    fixed_size: list[int] | None = field(
        default=None, metadata={"help": "[height, width] in pixels of every image under resize: fixed"}
    )
    teacher_size: int | list[int] | None = field(
        default=None,
        metadata={
            "help": "resolution at which the teacher sees the same augmented image: its shorter side in pixels, the "
            "longer one capped in proportion (max_size * teacher_size / eval_size); or [height, width]; null: the "
            "teacher sees what the student sees"
        },
    )
    augmentation: str = field(
        default="detr",
        metadata={
            "help": "of training images. 'detr': flip, and for half of the images a crop before the resize (of 384 to "
            "600 pixels where the shorter side counts 400, 500 or 600, all scaled by the largest training size over "
            "800); "
            "'flip': flip and resize; 'none': resize",
            "choices": ["detr", "flip", "none"],
        },
    )
    shuffle_buffer: int = field(
        default=1000,
        metadata={
            "help": "rows that a loader worker holds, still encoded, to shuffle among them (after shuffling shards)"
        },
    )
    num_eval_images: int | None = field(
        default=None, metadata={"help": "evaluate on this many images, the first of the split; null: on all"}
    )
    max_boxes: int = field(
        default=1000,
        metadata={
            "help": "most boxes of a training image; one with more cannot be used (no detector has so many queries, "
            "and the denoising of RT-DETR and its kin makes two more of each box: the memory grows with the square)"
        },
    )
    bad_rows: str = field(
        default="raise",
        metadata={
            "help": "what an image or annotation that cannot be used does to training. 'raise': stops it, with a line "
            "that names it; 'skip': all images are read once before training and the bad ones are left out, listed in "
            "skipped_rows.jsonl of training.output_dir. Evaluation leaves nothing out: it stops",
            "choices": ["raise", "skip"],
        },
    )
    max_bad_share: float = field(
        default=0.01, metadata={"help": "largest share of the rows that bad_rows: skip leaves out; it stops above"}
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, choices = getattr(self, spec.name), spec.metadata.get("choices")
            if choices and value not in choices and value != spec.default:
                raise UserError(f"data.{spec.name} is {value!r}: it must be one of {', '.join(choices)}")
        if not self.train_sizes or min(*self.train_sizes, self.eval_size, self.max_size) < 1:
            raise UserError("data.train_sizes, data.eval_size and data.max_size must be positive numbers of pixels")
        if self.resize == "fixed" and (
            self.fixed_size is None or len(self.fixed_size) != 2 or min(self.fixed_size) < 1
        ):
            raise UserError(f"data.fixed_size is {self.fixed_size}: resize: fixed needs [height, width] in pixels")
        if self.teacher_size is not None:
            pair = isinstance(self.teacher_size, list)
            sizes = self.teacher_size if pair else [self.teacher_size]
            if (pair and len(sizes) != 2) or min(sizes) < 1:
                raise UserError(
                    f"data.teacher_size is {self.teacher_size}: it must be the shorter side in pixels or "
                    "[height, width], positive, or null for the student's view"
                )
        if self.train_split is None and self.unlabelled is None:
            raise UserError("data.train_split is null: without a split to train on data.unlabelled must be set")
        if self.max_boxes < 1:
            raise UserError(f"data.max_boxes is {self.max_boxes}: at least 1 is needed")
        if not 0 <= self.max_bad_share < 1:
            raise UserError(f"data.max_bad_share is {self.max_bad_share}: it must be in [0, 1)")
        if self.shuffle_buffer < 1:
            raise UserError(f"data.shuffle_buffer is {self.shuffle_buffer}: at least 1 is needed")
        if self.num_eval_images is not None and self.num_eval_images < 1:
            raise UserError(f"data.num_eval_images is {self.num_eval_images}: at least 1 is needed, or null for all")


def teacher_view(config: DataConfig) -> DataConfig:
    """The data section with which the teacher is evaluated: resized as `teacher_size` says, else as `config`."""
    size = config.teacher_size
    if size is None:
        return config
    if isinstance(size, list):
        return replace(config, resize="fixed", fixed_size=size, teacher_size=None)
    cap = max(1, round(config.max_size * size / config.eval_size))
    return replace(config, resize="multiscale", eval_size=size, max_size=cap, teacher_size=None)
