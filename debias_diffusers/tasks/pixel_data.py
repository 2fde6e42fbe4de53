"""The images of a run: opened in the order of the run, and looked at before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator

from ..config.schema.data import EMBEDDED
from ..config.schema.training import TrainConfig
from ..data.dataset import shard_starts
from ..data.shards.order import ShardOrder
from ..data.sources.base import Source
from ..data.sources.checks import check_images, require_skippable
from ..data.sources.opening import open_source, reopen_source
from ..data.sources.subset import SourceSubset
from ..data.sources.summary import summary, training_summary
from ..data.validation_split import HELD_OUT
from ..errors import InputError
from ..runs.checkpoints import Checkpoint
from ..utils import seeding
from ..utils.console import say
from ..utils.distributed import broadcast_from_first, gather_from_all, told_by_the_first

MANY_IMAGES, SAMPLE = 100_000, 1000  # from how many images on only a sample is checked, and how many these are


def open_data(config: TrainConfig, found: Checkpoint | None, first: bool) -> Source:
    """The data, its labels in the order of the run; a run that did not write down its class names has the plain one.

    What they have is printed for pixel models; for the others when their captions are known.
    """
    data = config.data
    known = {name: value for name, value in found.state["data"].items() if name not in ("captions", HELD_OUT)} if found else {}
    source = reopen_source(data, found.state.get("class_names") or "plain", known) if found else open_source(data)
    if first and data.task != "text_to_image":
        for sentence in (summary if found else training_summary)(source, data.dataset):
            say(sentence)
    return source


def readable(
    config: TrainConfig, source: Source, found: Checkpoint | None, typed: int | None, accelerator: Accelerator
) -> tuple[Source, int | None]:
    """The source less its unreadable images, and the channels that are learned.

    The processes share the look at the images, unless a checkpoint says what was seen before. The channels are None where none is looked
    at, of which the first image says them, too.

    Args:
        config: of the run.
        source: as of `open_data`.
        found: the checkpoint that is resumed.
        typed: `channels` as it was typed.
        accelerator: of the processes.
    """
    first = accelerator.is_main_process
    known = broadcast_from_first(lambda: _known_to_be_skipped(config, source, found), accelerator)
    channels = found.state["network"]["in_channels"] if found else typed
    if known is None:
        known, coloured, count = _look(config, source, accelerator)
        if channels == 1 and typed is None and coloured:
            raise InputError(
                f"dataset {config.data.dataset}: {coloured} of {count} images have colours, but this run learns grey ones; "
                f"add --channels 1, which converts them to grey"
            )
        if count:
            channels = channels or channels_of(coloured, count, say if first else None)
    return SourceSubset(source, known) if known else source, channels


def _known_to_be_skipped(config: TrainConfig, source: Source, found: Checkpoint | None) -> list[int] | None:
    """Indices of unreadable images; None where the images are still to be looked at."""
    if found:
        before = {name: value for name, value in found.state["data"].items() if name != HELD_OUT}
        known: list[int] = before.get("skipped", [])
        if before == SourceSubset(source, known).fingerprint():
            return known
        _require_same_data(config, before, source.fingerprint())
    return [] if config.data.dataset in EMBEDDED else None  # they come with the package, and its tests read them


def _require_same_data(config: TrainConfig, before: dict[str, Any], now: dict[str, Any]) -> None:
    if before == now:
        return
    change = f"dataset {config.data.dataset} is not the one this run began with ({before['images']} images then, {now['images']} now)"
    if "dataset" not in config.run.allow_change:
        raise InputError(f"{change}; put it back, or go on with --allow_change dataset (or --accept_changed_data, which is the same)")
    say(f"warning: {change}; positions of the run now mean other images")


def _look(config: TrainConfig, source: Source, accelerator: Accelerator) -> tuple[list[int], int, int]:
    """The images that are skipped in every epoch, how many of the others that were looked at have colours, and how many these are."""
    looked_at = _looked_at(config, source)
    mine = looked_at[accelerator.process_index :: accelerator.num_processes]
    with told_by_the_first():
        parts = gather_from_all(lambda: [check_images(source, mine)], accelerator.num_processes)
        bad = dict(sorted(item for part, _ in parts for item in part.items()))
        require_skippable(bad, str(config.data.dataset), len(looked_at), config.data.skip_bad)
    all_of_them = len(looked_at) == len(source)
    if accelerator.is_main_process:
        if not all_of_them and looked_at:
            say(f"{len(looked_at)} of {len(source)} images were checked; --check_images all checks all before the first step")
        for sentence in bad.values():
            say(f"skipped: {sentence}")
    # Those of a sample are skipped when their positions come, as those that it has not found.
    return list(bad) if all_of_them else [], sum(coloured for _, coloured in parts), len(looked_at) - len(bad)


def _looked_at(config: TrainConfig, source: Source) -> Sequence[int]:
    """The indices of the images that are decoded before the first step."""
    how = config.data.check_images or ("all" if len(source) < MANY_IMAGES else "sample")
    if how == "none":
        return ()
    if how == "sample" and config.data.shuffle_window:  # of the first shards that are trained, for the others may have to be fetched
        order = ShardOrder(shard_starts(source, config.data), config.data.shuffle_window, config.optimization.seed)
        return sorted(order.index(0, place) for place in range(min(SAMPLE, len(source))))
    return seeding.subset(config.optimization.seed, len(source), len(source) if how == "all" else SAMPLE)


def channels_of(coloured: int, count: int, tell: Callable[[str], None] | None) -> int:
    """3 as soon as one image of `count` has colours, into which grey fits, too; that they are mixed is told."""
    if tell and 0 < coloured < count:
        tell(f"{coloured} of {count} images have colours, so the model learns 3 channels; --channels 1 converts them to grey")
    return 3 if coloured else 1
