"""Sequences of tasks made from labelled image data sets.

Shapes: N samples, C channels, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from paradepth.data.images import ImageData, ImageSplit, load_images
from paradepth.data.seeds import generator

Setting = Literal["class", "task", "domain"]
_SPLITS = ("train", "validation", "test")

# Name: data sets, and tasks that the classes of a single one are cut into.
SCENARIOS: dict[str, tuple[tuple[str, ...], int]] = {
    "split_cifar100": (("cifar100",), 10),
    "split_cifar10": (("cifar10",), 5),
    "split_fashion_mnist": (("fashion_mnist",), 5),
    "split_mnist": (("mnist",), 5),
    "split_digits": (("digits",), 5),
    "clothes_digits": (("fashion_mnist", "digits"), 0),
    "clothes_digits_photos": (("fashion_mnist", "digits", "cifar10"), 0),
}
_GREY_SIZE = 28  # of the images of several data sets, unless told otherwise


@dataclass(frozen=True)
class Experience:
    """One task of a sequence.

    Attributes:
        name: of the task.
        classes: the numbers of its classes within the scenario.
        data: its samples; labels are numbers within the scenario.
    """

    name: str
    classes: range
    data: ImageData


@dataclass(frozen=True)
class Scenario:
    """Tasks in the order in which they are learned.

    Attributes:
        name: of the sequence.
        setting: "class", every task brings classes, and a sample may be of any class so far; "task", the same, but it
            is known which task a sample is of; "domain", every task has the same classes and other images.
        class_names: of all tasks, in the order in which they come.
        tasks: one after another.

    Source of the three settings: van de Ven and Tolias, Three scenarios for continual learning (arXiv 1904.07734).
    """

    name: str
    setting: Setting
    class_names: tuple[str, ...]
    tasks: tuple[Experience, ...]

    def seen(self, task: int) -> int:
        """Number of classes of the tasks up to number `task`, counted from 0."""
        return self.tasks[task].classes.stop

    def to(self, device: torch.device | str) -> Scenario:
        """The same tasks with their samples on another device."""
        return replace(self, tasks=tuple(replace(task, data=task.data.to(device)) for task in self.tasks))


def class_order(count: int, *, seed: int) -> list[int]:
    """The order in which classes come, drawn by the seed.

    >>> sorted(class_order(5, seed=1)) == list(range(5)), class_order(5, seed=1) == class_order(5, seed=1)
    (True, True)
    """
    return torch.randperm(count, generator=generator(seed, "order of classes")).tolist()


def split_classes(data: ImageData, count: int, *, setting: Setting, seed: int, name: str = "") -> Scenario:
    """Cuts the classes of a data set into tasks of equally many, in an order that the seed draws.

    Args:
        data: the data set.
        count: number of tasks.
        setting: "class" or "task".
        seed: of the order.
        name: of the scenario; that of the data by default.

    Raises:
        ValueError: classes that cannot be cut into so many equal parts of at least two, or another setting.
    """
    if setting == "domain":
        raise ValueError("setting is 'domain', but tasks of one data set bring classes of their own: 'class' or 'task'")
    classes = data.num_classes
    if count < 2 or classes % count or classes // count < 2:
        raise ValueError(
            f"{classes} classes cannot be cut into {count} tasks: there must be at least two tasks, all of equally "
            "many classes, at least two"
        )
    order = class_order(classes, seed=seed)
    names = tuple(data.class_names[number] for number in order)
    renamed = data.with_class_names(names)
    size = classes // count
    tasks = []
    for index in range(count):
        own = range(index * size, (index + 1) * size)
        splits = {split: _of_classes(getattr(renamed, split), own) for split in _SPLITS}
        tasks.append(Experience(f"task {index + 1}", own, replace(renamed, **splits)))
    return Scenario(name or data.name, setting, names, tuple(tasks))


def domains(sets: Sequence[ImageData], *, name: str = "domains") -> Scenario:
    """Data sets one after another, whose classes share the outputs of a model by their numbers.

    Args:
        sets: of images of the same size and channels and equally many classes. The names of the first one's classes
            are the scenario's.

    Raises:
        ValueError: fewer than two, or sets that differ in shape.
    """
    if len(sets) < 2:
        raise ValueError(f"{len(sets)} data set is no sequence of domains; there must be at least two")
    first = sets[0]
    for data in sets[1:]:
        for what in ("channels", "image_size", "num_classes"):
            mine, theirs = getattr(data, what), getattr(first, what)
            if mine != theirs:
                raise ValueError(f"{data.name} has {what} {mine} and {first.name} {theirs}; they must be equal")
    own = range(first.num_classes)
    tasks = (Experience(data.name, own, replace(data, class_names=first.class_names)) for data in sets)
    return Scenario(name, "domain", first.class_names, tuple(tasks))


def load_scenario(
    name: str,
    setting: Setting,
    *,
    seed: int,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    validation_fraction: float = 0.1,
    train_fraction: float = 1.0,
    channels: int | None = None,
) -> Scenario:
    """A scenario by name, with its data.

    Args:
        name: split_cifar100 (10 tasks of 10 classes), split_fashion_mnist, split_cifar10, split_mnist, split_digits
            (5 of 2), or, of domains, clothes_digits (Fashion-MNIST, then the embedded digits) and
            clothes_digits_photos (then CIFAR-10, in grey).
        setting: "class" or "task" for the splits, "domain" for the others.
        seed: of the order of classes and of the validation splits.
        data_dir: where the data lie, each set in a folder of its name; None fetches from the Hub.
        image_size: resize to this height and width; several sets are resized to 28 where nothing else is said.
        validation_fraction: part of the training samples held out.
        train_fraction: part of the others that is learned from.
        channels: 1 makes colours grey, 3 repeats grey values; several sets are made grey where nothing else is said.

    Raises:
        ValueError: unknown name, a setting that it does not have, or no data.

    >>> scenario = load_scenario("split_digits", "class", seed=0)
    >>> len(scenario.tasks), scenario.tasks[1].classes, scenario.seen(1), len(scenario.tasks[1].data.test)
    (5, range(2, 4), 4, 72)
    """
    check_scenario(name, setting)
    sets, count = SCENARIOS[name]
    several = len(sets) > 1
    loaded = [
        load_images(
            data,
            data_dir=None if data == "digits" else data_dir,
            image_size=image_size or (_GREY_SIZE if several else None),
            validation_fraction=validation_fraction,
            train_fraction=train_fraction,
            channels=channels or (1 if several else None),
            seed=seed,
        )
        for data in sets
    ]
    if several:
        return domains(loaded, name=name)
    return split_classes(loaded[0], count, setting=setting, seed=seed, name=name)


def check_scenario(name: str, setting: str) -> None:
    """Refuses an unknown scenario, or a setting that it does not have.

    Raises:
        ValueError: naming what is allowed.
    """
    if name not in SCENARIOS:
        raise ValueError(f"unknown scenario {name!r}; known are {', '.join(SCENARIOS)}")
    allowed = ("domain",) if len(SCENARIOS[name][0]) > 1 else ("class", "task")
    if setting not in allowed:
        known = f"; settings are {', '.join(get_args(Setting))}" if setting not in get_args(Setting) else ""
        raise ValueError(f"setting is {setting!r}; {name} takes {' or '.join(allowed)}{known}")


def _of_classes(split: ImageSplit, classes: range) -> ImageSplit:
    chosen_N = (split.labels_N >= classes.start) & (split.labels_N < classes.stop)
    return ImageSplit(split.images_NCHW[chosen_N], split.labels_N[chosen_N])


def join_splits(splits: Sequence[ImageSplit]) -> ImageSplit:
    """Samples of several splits as one."""
    return ImageSplit(torch.cat([s.images_NCHW for s in splits]), torch.cat([s.labels_N for s in splits]))
