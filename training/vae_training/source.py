"""What a run trains on: the examples, their parts, and the batches made of them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vae_runtime.errors import InputError

from .config import TrainConfig
from .crops import CropFeed
from .data import Dataset, is_folder_of_pictures, load_dataset
from .feed import Feed
from .photographs import Photographs, load_photographs
from .split import ORDER, SPLIT, Parts, leave_out, split_before, split_indices


class Source(NamedTuple):
    """photographs: where training examples are crops drawn anew each time; `data` then holds the fixed grids.

    split, order: that the parts were made by; None where the data decided, their files or strips of few pictures.
    """

    data: Dataset
    parts: Parts
    photographs: Photographs | None = None
    split: str | None = None
    order: str | None = None

    def resolve(self, config: TrainConfig) -> TrainConfig:
        """`config` with every None that depends on the data filled in; see `TrainConfig.resolve`."""
        config = replace(config, split=self.split, order=self.order)
        return config.resolve(self.data.spec, self.train_examples, crops=self.photographs is not None)

    @property
    def train_examples(self) -> int:
        """In one epoch."""
        return len(self.parts.train) if self.photographs is None else self.photographs.epoch_crops

    def digest(self) -> str:
        """SHA-256 of the examples, in their order, and of how they are divided: by it a run that goes on knows that its
        test part is still what was never trained on."""
        found = hashlib.sha256()
        whole = (self.data.examples,) if self.photographs is None else self.photographs.pictures
        for array in (*whole, self.parts.train, self.parts.validation, self.parts.test):
            found.update(f"{array.dtype} {array.shape}".encode())
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    def make_feed(self, config: TrainConfig, rank: int, processes: int) -> Feed | CropFeed:
        """The batches of a resolved configuration."""
        if self.photographs is not None:
            flip = config.flip is not False
            return CropFeed(self.photographs, config.batch_size, config.seed, config.binarize, flip, rank, processes)
        return Feed(
            self.data, self.parts.train, config.batch_size, config.seed, config.binarize, config.shift, rank, processes
        )


def open_source(config: TrainConfig) -> Source:
    """Read the data of `config` and divide them.

    A folder of pictures is a source of crops where `crop` is given, and for the resnet family unless `size` or `resize`
    asks for pictures of one size. Data with a test part of their own keep it unless `split` or `order` is given.

    Raises:
        InputError: nothing there, it is damaged or of the wrong form, or settings that do not go with it.
    """
    pictures = is_folder_of_pictures(config.data)
    if config.exclude_label and pictures:
        raise InputError(f"exclude_label is for data with labels; {config.data} is a folder of pictures, without any")
    if config.crop is not None and not pictures:
        raise InputError(f"crop is for folders of pictures; {config.data} has examples of one size")
    if pictures and (config.crop is not None or (config.family == "resnet" and not (config.size or config.resize))):
        return _open_photographs(config)
    size = (config.size[0], config.size[1]) if config.size else None
    data = load_dataset(config.data, size, config.resize, config.colour)
    source = _divide(data, config)
    return _exclude(source, config) if config.exclude_label else source


def _divide(data: Dataset, config: TrainConfig) -> Source:
    if data.test_begins is not None and config.split is None and config.order is None:
        facts = {**data.facts, "order": "seeded", "split_by": "files"}
        return Source(replace(data, facts=facts), split_before(data.test_begins, len(data), config.seed))
    split, order = _split_of(config), config.order or ORDER
    return Source(data, split_indices(len(data), split, order, config.seed), None, split, order)


def _split_of(config: TrainConfig) -> str:
    return SPLIT if config.split is None else config.split


def _exclude(source: Source, config: TrainConfig) -> Source:
    """Without the examples of the labels that are left out, which the data set's facts then say."""
    data, labels = source.data, source.data.labels
    if labels is None:
        raise InputError(
            f"exclude_label is for data with labels; {config.data} has none (IDX files have theirs beside them, an "
            ".npz has an array 'labels' or 'y', a whole number per example)"
        )
    facts = {**data.facts, "excluded_labels": sorted(set(config.exclude_label))}
    return source._replace(data=replace(data, facts=facts), parts=leave_out(source.parts, labels, config.exclude_label))


def _open_photographs(config: TrainConfig) -> Source:
    if config.size is not None:
        raise InputError("size makes all pictures one size, crop leaves them as they are; pass one of them")
    crop = (config.crop[0], config.crop[1]) if config.crop else None
    split = _split_of(config)
    photographs = load_photographs(
        Path(config.data), crop, config.colour or "rgb", config.resize or "exact", split, config.order, config.seed,
        config.crop_multiple,
    )  # fmt: skip
    order = None if photographs.split_by == "regions" else config.order or ORDER
    return Source(*photographs.to_dataset(), photographs, split, order)
