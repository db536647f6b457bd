"""What is done about forgetting."""

from __future__ import annotations

from dataclasses import dataclass

from paradepth.models import TrunkModel


@dataclass(frozen=True)
class Strategy:
    """How a model goes on from one task to the next.

    Attributes:
        about: one line.
        grows: every task after the first gets a branch of its own; stem and older branches are frozen.
        replays: half of every batch is drawn from a memory of samples of earlier tasks.
        joint: trains on all samples of all tasks so far; what other strategies cannot have.
    """

    about: str
    grows: bool = False
    replays: bool = False
    joint: bool = False

    def frozen(self, model: TrunkModel, *, branches: int, classes: int) -> tuple[str, ...]:
        """What does not learn, as `freeze` names it.

        A memory lets the whole head learn. Without one the rows of older classes would only ever be pushed down, so
        they are frozen as well, and what was known of an older task stays as it was in the prefix that knew it.

        Args:
            model: as it is to learn the task.
            branches, classes: what it had before; 0 branches before the first task.
        """
        if not self.grows or branches == 0:
            return ()
        parts = list(model.parts())
        old = tuple(parts[: 1 + branches])
        if self.replays:
            return old
        grown = getattr(model.config, "num_classes", 0) > classes
        return (*old, f"head:{classes}" if grown else "head")


STRATEGIES: dict[str, Strategy] = {
    "finetune": Strategy("train everything on the new task"),
    "replay": Strategy("train everything on the new task and a memory of earlier ones", replays=True),
    "grow": Strategy("a new branch for every task; stem, older branches and older classes are frozen", grows=True),
    "grow_replay": Strategy("a new branch and the head learn from the task and a memory", grows=True, replays=True),
    "joint": Strategy("train everything on all tasks so far: the ceiling", joint=True),
}
