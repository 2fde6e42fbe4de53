"""The pixel task: what the training loop, which knows nothing of pixels, needs to know of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel
from torch import Tensor, nn

from .config import TrainConfig
from .data import TrainingData
from .errors import raise_all
from .loss import Network
from .model import build_unet, unet_config
from .pipeline import PixelPipeline, load_pipeline
from .schedulers import exported_scheduler
from .sources import Source


def network_arguments(config: TrainConfig, channels: int, num_labels: int) -> dict[str, Any]:
    """Arguments of UNet2DModel for images of so many channels; `num_labels` counts a "none" among the labels, too."""
    assert config.data.resolution is not None
    return unet_config(config.model, config.data.resolution, channels, num_labels, config.objective.learn_sigma)


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
        self.arguments = network_arguments(config, self.data.channels, num_labels)

    def build(self) -> UNet2DModel:
        """A network with fresh weights."""
        return build_unet(self.arguments)

    def start_from(self, unet: UNet2DModel, model: str) -> list[str]:
        """Puts the weights of another model into a network that `build` made.

        Returns:
            What else that model was trained for, a sentence each.

        Raises:
            InputError: its network is another one; names what differs and how to take it as it is.
        """
        pipeline = load_pipeline(model)
        theirs = pipeline.unet.config
        differ = [f"{name}: init has {theirs[name]}, this run {ours}" for name, ours in unet.config.items() if _differs(name, theirs, ours)]
        raise_all(differ, f"init {model} is another network (to take it as it is: --model_config with its unet/config.json)")
        unet.load_state_dict(pipeline.unet.state_dict())
        return [
            f"{name} was {before} in {model}, here it is {now}"
            for name, now in exported_scheduler(self.config.objective).config.items()
            if not name.startswith("_") and name in _TRAINED_FOR and (before := pipeline.scheduler.config.get(name)) != now
        ]

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


# Of a scheduler's configuration, what its network was trained for.
_TRAINED_FOR = {
    "prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr", "shift",
}  # fmt: skip

# Fields of a UNet2DModel that neither its weights nor its computation depend on, or that training may change.
_FREE = {"dropout", "sample_size"}


def _differs(name: str, theirs: Mapping[str, Any], ours: Any) -> bool:
    if name.startswith("_") or name in _FREE:
        return False

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return bool(plain(theirs.get(name)) != plain(ours))
