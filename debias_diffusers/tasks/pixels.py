"""The pixel task: images in [-1, 1], perhaps with class labels, and UNet2DModel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel
from torch import Tensor, nn

from ..config.schema.objective import needs_own_scheduler
from ..config.schema.training import TrainConfig
from ..data import images
from ..data.dataset import TrainingData
from ..data.labels import nonempty_classes, proportional_labels, row_names, shortened_list, to_config_mapping
from ..data.sources.base import Source
from ..data.sources.summary import class_counts
from ..data.validation_split import validation_seed
from ..diffusion.loss import Network
from ..diffusion.noise_schedule import is_flow, prediction_type_of, schedule_of_scheduler
from ..errors import InputError, raise_all
from ..hub.model_card import model_card
from ..pipelines.loading import require_finite
from ..pipelines.pixel_pipeline import PixelPipeline, load_pipeline
from ..pipelines.solvers import default_scheduler, exported_scheduler, make_scheduler
from ..sampling import pixel_job
from ..utils.tensor_memory import sent
from .base import ONE_FILE, Batch
from .unet import build_unet, differing_fields, unet_config

PREVIEW_STEPS = 20  # of the solver

# Fields of a UNet2DModel that neither its weights nor its computation depend on, or that training may change.
_FREE = {"dropout", "sample_size"}


def network_arguments(config: TrainConfig, channels: int, num_labels: int) -> dict[str, Any]:
    """Arguments of UNet2DModel for images of so many channels; `num_labels` counts a "none" among the labels, too."""
    assert config.data.resolution is not None
    return unet_config(config.model, config.data.resolution, channels, num_labels, config.objective.learn_sigma)


class PixelTask:
    """Images and their labels, and the UNet that learns them; a `Task`."""

    def __init__(self, config: TrainConfig, source: Source, channels: int | None = None, held_out: Source | None = None) -> None:
        """Fits a network to the data, whose images have so many channels if the configuration leaves that out.

        `held_out` are the images of the validation loss.

        Raises:
            InputError: the first image cannot be read, or the network does not fit.
        """
        self.config = config
        self.data = TrainingData(source, config.data, config.optimization.seed, channels, config.noise)
        self.held_out: TrainingData | None = None
        if held_out:
            plain = dataclasses.replace(config.data, random_flip=False, label_dropout=0.0, num_workers=0)
            seed, noise = validation_seed(config.optimization.seed), dataclasses.replace(config.noise, input_perturbation=0.0)
            self.held_out = TrainingData(held_out, plain, seed, self.data.channels, noise)
        self.class_names, self.class_counts = source.class_names, class_counts(source)
        num_labels = self.data.num_classes + (self.data.null_label is not None)
        self.arguments = network_arguments(config, self.data.channels, num_labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self.data.shape

    def prepare(self, positions: Sequence[int] | None = None) -> None:
        """Nothing: images are decoded as they are needed."""

    # ---- network -----------------------------------------------------------------------------------------------------

    def build(self) -> UNet2DModel:
        """A network with fresh weights."""
        return build_unet(self.arguments)

    def load(self, network: nn.Module, model: str) -> list[str]:
        """Puts the weights of another model into a network that `build` made.

        Returns:
            What else that model was trained for, a sentence each.

        Raises:
            InputError: its network is another one (names what differs and how to take it as it is), or has weights that are not finite.
        """
        pipeline = load_pipeline(model, self.config.optimization.allow_pickle_import)
        ours: Any = network.config
        theirs = pipeline.unet.config
        names = differing_fields(ours, theirs, _FREE)
        differ = [f"{name}: init has {theirs.get(name)}, this run {ours[name]}" for name in names]
        raise_all(differ, f"init {model} is another network ({self._advice(names, theirs, ours)})")
        require_finite(pipeline.unet.state_dict(), f"init {model}")
        network.load_state_dict(pipeline.unet.state_dict())
        found = self._trained_otherwise(pipeline.scheduler, model) + self._labelled_otherwise(pipeline.config.null_label, model)
        if pipeline.class_names and self.class_names and pipeline.class_names != self.class_names:
            found.append(
                f"classes were {shortened_list(pipeline.class_names)} in {model}, here they are {shortened_list(self.class_names)}"
            )
        return found

    def _advice(self, names: list[str], theirs: Any, ours: Any) -> str:
        """How to take a network as it is, whose configuration differs in some fields."""
        if names == ["out_channels"] and theirs.out_channels in (theirs.in_channels, 2 * theirs.in_channels):
            learned = theirs.out_channels > theirs.in_channels
            return f"its variance is {'' if learned else 'not '}learned: take --{'' if learned else 'no_'}learn_sigma"
        if names == ["num_class_embeds"] and None in (theirs.num_class_embeds, ours.num_class_embeds):
            labelled = theirs.num_class_embeds is not None
            return f"it has {'' if labelled else 'no '}class labels: {'add' if labelled else 'leave out'} --class_conditional"
        advice = "to take it as it is: --model_config with its unet/config.json"
        if (theirs.num_class_embeds or 0) + 1 == ours.num_class_embeds and self.data.null_label is not None:
            advice += '; it has no label for "none", so add --label_dropout 0'
        return advice

    def _labelled_otherwise(self, before: int | None, model: str) -> list[str]:
        """Labels that are "none" on one side and a class on the other: as many labels in all do not show it."""
        now = self.data.null_label
        meaning = {True: '"none"', False: "a class"}
        return [
            f"label {label} was {meaning[label == before]} in {model}, here it is {meaning[label == now]}"
            for label in sorted(label for label in {before, now} if label is not None)
            if before != now
        ]

    def _trained_otherwise(self, theirs: Any, model: str) -> list[str]:
        """What a model's scheduler says of its training, where this run's is another."""
        ours, found = exported_scheduler(self.config.objective), []
        targets = [prediction_type_of(own) if is_flow(own) else own.config.get("prediction_type", "unknown") for own in (theirs, ours)]
        if targets[0] != targets[1]:
            found.append(f"prediction_type was {targets[0]} in {model}, here it is {targets[1]}")
        try:
            before, now = schedule_of_scheduler(theirs).snr, schedule_of_scheduler(ours).snr
        except InputError:
            return [*found, f"the noise schedule of {model} is unknown ({type(theirs).__name__} does not tell it)"]
        if len(before) != len(now) or not torch.allclose(before, now, rtol=1e-3):
            found.append(f"the noise schedule is not that of {model}, whose SNR go from {before[0]:.3g} to {before[-1]:.3g}")
        return found

    @property
    def frozen_bytes(self) -> int:
        """None."""
        return 0

    # ---- batches -----------------------------------------------------------------------------------------------------

    def dummy_batch(self, size: int) -> Batch:
        """Black images with the label 0."""
        return {"image": torch.zeros(size, *self.shape, dtype=torch.uint8), "label": torch.zeros(size, dtype=torch.long)}

    def x_0(self, batch: Batch, device: Any) -> Tensor:
        """(B, C, H, W) float32 in [-1, 1]; the bytes travel to the device and become numbers there."""
        return sent(batch["image"], device).float() / 127.5 - 1

    def conditioned(self, model: nn.Module, batch: Batch, device: Any) -> Network:
        """The model as a function of x_t (B, C, H, W) and the timesteps (B,), with the labels of the batch."""
        labels = sent(batch["label"], device) if self.data.num_classes else None
        return lambda x_t, t: model(x_t, t, labels, return_dict=False)[0]

    # ---- what is exported and drawn ----------------------------------------------------------------------------------

    def frozen_files(self) -> Mapping[str, Path]:
        """None."""
        return {}

    def export(self, network: nn.Module, folder: Path) -> None:
        """Writes a pipeline. Where diffusers has one, it is theirs, so that nobody needs this package to use it."""
        self.pipeline(network).save_pretrained(folder, safe_serialization=True, max_shard_size=ONE_FILE)

    def pipeline(self, network: nn.Module) -> DiffusionPipeline:
        """The pipeline that is exported."""
        own = self.data.num_classes or needs_own_scheduler(self.config.objective)
        return self._by_class(network) if own else DDPMPipeline(network, exported_scheduler(self.config.objective))

    def _by_class(self, network: Any) -> PixelPipeline:
        names, counts = to_config_mapping(self.class_names), to_config_mapping(self.class_counts)
        return PixelPipeline(network, exported_scheduler(self.config.objective), self.data.null_label, names, counts)

    def model_card(self, config: TrainConfig, step: int, measured: Mapping[str, Any] | None) -> str:
        """README.md of a run at a step."""
        classes = dict(zip(self.class_names or (), self.class_counts or ()))
        return model_card(config, step, self.data.num_classes, len(self.data.source), measured, classes)

    def describe(self) -> Sequence[str]:
        """Images, channels, classes."""
        return [f"images: {len(self.data.source)}, {self.data.channels} channel(s), {self.data.num_classes} classes"]

    def picture(self, batch: Batch) -> Any:
        """The images of a batch in a grid."""
        return images.grid([images.from_array(image.numpy()) for image in batch["image"]])

    def state(self) -> dict[str, Any]:
        """Network, and the classes with their numbers of images."""
        return {"class_names": self.class_names, "class_counts": self.class_counts, "network": self.arguments}

    def conditions(self, count: int, as_in_data: bool) -> Sequence[int]:
        """Labels; none without classes."""
        counts = self.class_counts or []
        return proportional_labels(counts, count) if as_in_data else nonempty_classes(counts)

    def condition_names(self, conditions: Sequence[int]) -> Sequence[str]:
        """Class names."""
        return row_names(conditions, self.class_names)

    def draw(self, network: nn.Module, indices: Sequence[int], conditions: Sequence[int]) -> Tensor:
        """Images (len(indices), C, H, W) uint8 on the CPU, image k from the seed k and the label `conditions[k]`, in turn."""
        pipeline = self._by_class(network)
        pipeline.set_progress_bar_config(disable=True)
        own = pipeline.scheduler
        steps = min(PREVIEW_STEPS, self.config.objective.num_train_timesteps // 2)
        pipeline.scheduler = make_scheduler(default_scheduler(own), own, "linspace", steps)
        labels = [conditions[k % len(conditions)] for k in indices] if conditions else None
        return pixel_job.draw(pipeline, indices, 0, labels, num_inference_steps=steps).cpu()
