"""The pixel task: what the training loop, which knows nothing of pixels, needs to know of them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel
from torch import Tensor, nn

from ..config.schema import TrainConfig
from ..data.dataset import TrainingData
from ..data.labels import shortened_list, to_config_mapping
from ..data.sources import Source, class_counts
from ..diffusion.loss import Network
from ..diffusion.noise_schedule import is_flow, schedule_of_scheduler
from ..errors import InputError, raise_all
from ..pipelines.pixel_pipeline import PixelPipeline, load_pipeline
from ..pipelines.solvers import exported_scheduler
from .unet import build_unet, differing_fields, require_finite, unet_config


def network_arguments(config: TrainConfig, channels: int, num_labels: int) -> dict[str, Any]:
    """Arguments of UNet2DModel for images of so many channels; `num_labels` counts a "none" among the labels, too."""
    assert config.data.resolution is not None
    return unet_config(config.model, config.data.resolution, channels, num_labels, config.objective.learn_sigma)


class PixelTask:
    """Clean images in [-1, 1] and their labels, and UNets that learn them."""

    def __init__(self, config: TrainConfig, source: Source, channels: int | None = None) -> None:
        """Fits a network to the data, whose images have so many channels if the configuration leaves that out.

        Raises:
            InputError: the first image cannot be read, or the network does not fit.
        """
        self.config = config
        self.data = TrainingData(source, config.data, config.optimization.seed, channels)
        self.class_names, self.class_counts = source.class_names, class_counts(source)
        num_labels = self.data.num_classes + (self.data.null_label is not None)
        self.arguments = network_arguments(config, self.data.channels, num_labels)

    def build(self) -> UNet2DModel:
        """A network with fresh weights."""
        return build_unet(self.arguments)

    def start_from(self, unet: UNet2DModel, model: str) -> list[str]:
        """Puts the weights of another model into a network that `build` made.

        Returns:
            What else that model was trained for, a sentence each.

        Raises:
            InputError: its network is another one (names what differs and how to take it as it is), or has weights that are not finite.
        """
        pipeline = load_pipeline(model, self.config.optimization.allow_pickle_import)
        if not isinstance(pipeline.unet, UNet2DModel):
            raise InputError(f"init {model} holds a {type(pipeline.unet).__name__}, but this run trains a UNet2DModel")
        theirs = pipeline.unet.config
        names = differing_fields(unet.config, theirs, _FREE)
        differ = [f"{name}: init has {theirs.get(name)}, this run {unet.config[name]}" for name in names]
        raise_all(differ, f"init {model} is another network ({self._advice(names, theirs, unet.config)})")
        require_finite(pipeline.unet.state_dict(), f"init {model}")
        unet.load_state_dict(pipeline.unet.state_dict())
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
        targets = ["flow" if is_flow(own) else own.config.get("prediction_type", "unknown") for own in (theirs, ours)]
        if targets[0] != targets[1]:
            found.append(f"prediction_type was {targets[0]} in {model}, here it is {targets[1]}")
        try:
            before, now = schedule_of_scheduler(theirs).snr, schedule_of_scheduler(ours).snr
        except InputError:
            return [*found, f"the noise schedule of {model} is unknown ({type(theirs).__name__} does not tell it)"]
        if len(before) != len(now) or not torch.allclose(before, now, rtol=1e-3):
            found.append(f"the noise schedule is not that of {model}, whose SNR go from {before[0]:.3g} to {before[-1]:.3g}")
        return found

    def clean(self, batch: dict[str, Tensor], device: Any) -> Tensor:
        """x_0 (B, C, H, W) float32 in [-1, 1]; the bytes travel to the device and become numbers there."""
        return batch["image"].to(device, non_blocking=True).float() / 127.5 - 1

    def network(self, model: nn.Module, batch: dict[str, Tensor], device: Any) -> Network:
        """The model as a function of x_t and t, with the labels of the batch."""
        labels = batch["label"].to(device, non_blocking=True) if self.data.num_classes else None
        return lambda x_t, t: model(x_t, t, labels, return_dict=False)[0]

    def pipeline(self, unet: UNet2DModel) -> DiffusionPipeline:
        """What is exported. Without labels it is diffusers' own, so that nobody needs this package to use it."""
        scheduler = exported_scheduler(self.config.objective)
        return self._by_class(unet, scheduler) if self.data.num_classes else DDPMPipeline(unet, scheduler)

    def _by_class(self, unet: UNet2DModel, scheduler: Any) -> PixelPipeline:
        names, counts = to_config_mapping(self.class_names), to_config_mapping(self.class_counts)
        return PixelPipeline(unet, scheduler, self.data.null_label, names, counts)

    def preview(self, unet: UNet2DModel) -> PixelPipeline:
        """A pipeline to draw samples with while training."""
        pipeline = self._by_class(unet, exported_scheduler(self.config.objective))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


# Fields of a UNet2DModel that neither its weights nor its computation depend on, or that training may change.
_FREE = {"dropout", "sample_size"}
