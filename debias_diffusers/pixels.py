"""The pixel task: what the training loop, which knows nothing of pixels, needs to know of them."""

from __future__ import annotations

from typing import Any

from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel
from torch import Tensor, nn

from .config import TrainConfig
from .data import TrainingData
from .loss import Network
from .model import build_unet, unet_config
from .pipeline import PixelPipeline
from .schedulers import exported_scheduler
from .sources import Source


class PixelTask:
    """Clean images in [-1, 1] and their labels, and UNets that learn them."""

    def __init__(self, config: TrainConfig, source: Source) -> None:
        """Fits a network to the data.

        Raises:
            InputError: the first image cannot be read, or the network does not fit.
        """
        self.config = config
        self.data = TrainingData(source, config.data, config.optimization.seed)
        num_labels = self.data.num_classes + (self.data.null_label is not None)
        learn_sigma = config.objective.learn_sigma
        self.arguments = unet_config(config.model, self.data.resolution, self.data.channels, num_labels, learn_sigma)

    def build(self) -> UNet2DModel:
        """A network with fresh weights."""
        return build_unet(self.arguments)

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
        if self.data.num_classes:
            return PixelPipeline(unet, scheduler, null_label=self.data.null_label)
        return DDPMPipeline(unet, scheduler)

    def preview(self, unet: UNet2DModel) -> tuple[PixelPipeline, list[int] | None]:
        """A pipeline to draw samples with while training, and all classes in turn as labels."""
        classes = self.data.num_classes
        pipeline = PixelPipeline(unet, exported_scheduler(self.config.objective), null_label=self.data.null_label)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline, list(range(classes)) or None
