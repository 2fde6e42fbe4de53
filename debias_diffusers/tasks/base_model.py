"""The base model of a text-to-image training: its pipeline folder, what its configurations say, and what is wrong with them. No torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..config.hub_names import is_model_id
from ..config.loading import update
from ..config.schema.data import DIGITS, TextConfig
from ..config.schema.objective import BETA_ENDS
from ..config.schema.training import TrainConfig
from ..config.validation.training import train_problems
from ..errors import InputError, raise_all, reason
from ..hub import client
from ..runs.model_folder import (
    MODEL_INDEX,
    TEXT_PIPELINES,
    convert_advice,
    is_lora,
    part_config,
    require_text_model,
    text_parts,
    vae_scale,
)
from ..runs.part_files import has_weights, loaded_files, variant_of
from ..utils.files import read_json_object

PACKAGED = Path(str(resources.files("debias_diffusers.data").joinpath("text_base")))
FROZEN = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")  # what no training changes
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that are not taken over
SIZE_IDS = 6  # numbers of SDXL's size conditioning


@dataclass(frozen=True)
class BaseModel:
    """A pipeline folder of Stable Diffusion XL, 2.x or 1.x by its configuration files."""

    folder: Path
    vae_folder: Path
    index: Mapping[str, Any]  # model_index.json
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]

    @property
    def is_xl(self) -> bool:
        """Whether it has two text encoders and size conditioning."""
        return bool(self.index["_class_name"] == "StableDiffusionXLPipeline")

    @property
    def parts(self) -> list[str]:
        """Names of the sub-folders of the frozen parts."""
        return [name for name in FROZEN if self.is_xl or not name.endswith("_2")]

    @property
    def factor(self) -> int:
        """Pixels a side of one latent."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def side_unit(self) -> int:
        """Pixels of which the sides of images must be multiples: the VAE halves them, and stock pipelines take multiples of 8 only."""
        return max(8, self.factor)

    @property
    def zeros_for_empty(self) -> bool:
        """Whether the pipeline samples with zeros, and not with the encoding of "", where no negative prompt is given."""
        return bool(self.is_xl and self.index.get("force_zeros_for_empty_prompt", True))

    @property
    def is_trained(self) -> bool:
        """Whether the UNet has weights; that of the packaged base has none."""
        return self.folder != PACKAGED

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of square images."""
        side = resolution // self.factor
        return int(self.vae["latent_channels"]), side, side

    def frozen_files(self) -> dict[str, Path]:
        """The files of the frozen parts by their path in the exported folder, as they are loaded."""
        return _read({name: self.vae_folder if name == "vae" else self.folder / name for name in self.parts})

    def read_files(self) -> dict[str, Path]:
        """The files that decide what is drawn, but for the scheduler's: UNet, text encoders, tokenizers and VAE as they are loaded."""
        unet = _read({"unet": self.folder / "unet"})
        return unet | {name: path for name, path in self.frozen_files().items() if not name.startswith("scheduler/")}

    def exported_index(self, zeros: bool, scheduler: Mapping[str, Any]) -> str:
        """model_index.json of the exported pipeline, whose "no caption" is zeros or the encoding of "", with this scheduler."""
        kept = {name: value for name, value in self.index.items() if name not in UNUSED and name != "_name_or_path"}
        if scheduler["_class_name"] != self.scheduler["_class_name"]:  # else a base model's own index may say another class, which counts
            kept["scheduler"] = ["diffusers", scheduler["_class_name"]]
        if self.is_xl:
            kept["force_zeros_for_empty_prompt"] = zeros
        else:
            kept["requires_safety_checker"] = False
            kept |= {name: [None, None] for name in UNUSED}
        return json.dumps(kept, indent=2) + "\n"

    def record(self, text: TextConfig, zeros: bool, scheduler: Mapping[str, Any], hashes: Mapping[str, str]) -> dict[str, Any]:
        """What a LoRA says of its base model.

        Args:
            text: names base model and VAE.
            zeros: as of `exported_index`.
            scheduler: its configuration, with the objective of the LoRA.
            hashes: of `read_files`.
        """
        return {
            "base_model": text.base_model,
            "vae": text.vae,
            "pipeline": self.index["_class_name"],
            "layers_per_block": self.unet.get("layers_per_block", 2),
            "force_zeros_for_empty_prompt": zeros,
            "scheduler": dict(scheduler),
            "files": dict(hashes),
        }

    def objective(self) -> dict[str, Any]:
        """The fields of the objective that the scheduler of the base model says.

        Raises:
            InputError: its noise schedule has no name here.
        """
        values = self.scheduler
        predicted, name = values.get("prediction_type", "epsilon"), values.get("_class_name")
        if "beta_schedule" not in values:  # its noise is not that of DDPM
            raise InputError(f"the {name} of base_model {self.folder} has no betas: its noise is not that of DDPM; take another model")
        if predicted not in ("epsilon", "v_prediction"):
            raise InputError(f"base_model {self.folder} predicts {predicted}, but must predict epsilon or v_prediction")
        betas = {"squaredcos_cap_v2": "cosine"}.get(values.get("beta_schedule", "linear"), values.get("beta_schedule", "linear"))
        T, ends = values.get("num_train_timesteps", 1000), (values.get("beta_start", 0.0001), values.get("beta_end", 0.02))
        named = betas == "cosine" or (betas in BETA_ENDS and all(abs(1000 / T * b - e) < 1e-9 for b, e in zip(BETA_ENDS[betas], ends)))
        if not named or values.get("trained_betas") is not None:
            has = "trained_betas" if values.get("trained_betas") is not None else f"betas {betas} from {ends[0]} to {ends[1]}"
            known = ", ".join(f"{name} from {low} to {high}" for name, (low, high) in BETA_ENDS.items())
            raise InputError(f"base_model {self.folder} has {has}, which is no noise schedule of this package ({known}, or cosine)")
        return {
            "prediction_type": predicted,
            "noise_schedule": betas,
            "num_train_timesteps": T,
            "rescale_betas_zero_snr": bool(values.get("rescale_betas_zero_snr", False)),
            "schedule_shift": 1.0,
        }


def _read(folders: Mapping[str, Path]) -> dict[str, Path]:
    """The files of some parts that are loaded, by their path in an exported folder."""
    return {f"{name}/{file}": path for name, folder in folders.items() for file, path in loaded_files(folder).items()}


def open_base(text: TextConfig) -> BaseModel:
    """The base model of a configuration, from this disk or the Hub; `vae` takes the place of its own.

    Raises:
        InputError: there is no such model, it lacks a part, or its parts do not fit each other.
        HubError: the Hub cannot be reached or refuses.
    """
    assert text.base_model
    folder = _folder("base_model", text.base_model)
    if is_lora(folder):
        raise InputError(f"base_model {text.base_model} is a LoRA, not a whole model; name its own base model, and the LoRA as --init")
    index = read_json_object("base_model", folder / MODEL_INDEX)
    if not text_parts(folder):
        raise InputError(f"base_model {text.base_model} is a {index.get('_class_name')}; take a {' or '.join(TEXT_PIPELINES)}")
    require_text_model(folder, text.base_model)
    vae = _folder("vae", text.vae) if text.vae else folder
    vae = vae / "vae" if (vae / "vae" / "config.json").is_file() else vae
    found = BaseModel(
        folder=folder,
        vae_folder=vae,
        index=index,
        unet=read_json_object("base_model", folder / "unet" / "config.json"),
        vae=read_json_object("vae", vae / "config.json"),
        scheduler=read_json_object("base_model", folder / "scheduler" / "scheduler_config.json"),
    )
    try:
        found.objective()
        raise_all(_problems(found, text), f"base_model {text.base_model}")
    except (TypeError, ValueError, ArithmeticError) as error:  # a value of another type
        raise InputError(f"a configuration file of base_model {text.base_model} is damaged: {reason(error)}") from error
    return found


def _folder(field: str, name: str) -> Path:
    if name == DIGITS:
        return PACKAGED
    if is_model_id(name):
        return client.download_model(name)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.is_file():
            advice = "name a folder with config.json and diffusion_pytorch_model.safetensors, or a Hub id such as user/name"
            raise InputError(f"{field} {name} is a file; {convert_advice(name) if field == 'base_model' else advice}")
        raise InputError(f"{field} {name} does not exist; name a pipeline folder, a run directory or a Hub id such as user/name")
    return folder


def _problems(base: BaseModel, text: TextConfig) -> list[str]:
    unet, vae, found = base.unet, base.vae, _weight_problems(base)
    if unet.get("_class_name") != "UNet2DConditionModel":
        found.append(f"its UNet is a {unet.get('_class_name')}, without text conditions; take a text-to-image model")
    if vae.get("_class_name") != "AutoencoderKL":
        found.append(f"the VAE is a {vae.get('_class_name')}; take an AutoencoderKL")
    if unet.get("in_channels") != vae.get("latent_channels"):
        found.append(f"its UNet takes {unet.get('in_channels')} channels, but the VAE has {vae.get('latent_channels')}; take another VAE")
    if not isinstance(vae.get("block_out_channels"), list):
        found.append("the VAE has no block_out_channels; take an AutoencoderKL")
    if unet.get("time_cond_proj_dim"):
        found.append("its UNet takes the guidance scale as a condition (a distilled model), which is not trained here")
    if base.is_xl:
        expected = SIZE_IDS * unet.get("addition_time_embed_dim", 0) + part_config(base.folder, "text_encoder_2").get("projection_dim", 0)
        if unet.get("addition_embed_type") != "text_time" or unet.get("projection_class_embeddings_input_dim") != expected:
            found.append("its UNet does not take the six sizes of SDXL as a condition (a refiner?); take the base model")
    if text.null_caption == "zeros" and not base.is_xl:
        found.append(
            'null_caption is zeros, but StableDiffusionPipeline always samples with the encoding of ""; take empty or leave it out'
        )
    return found


def _weight_problems(base: BaseModel) -> list[str]:
    """Parts without weights; those of the UNet would be drawn at random."""
    parts = [name for name in base.parts if name.startswith(("vae", "text_encoder"))] + ["unet"] * base.is_trained
    folders = {name: base.vae_folder if name == "vae" else base.folder / name for name in parts}
    return [
        f"its {name} has no safetensors weights; take a model with such weights, not .bin alone"
        for name, folder in folders.items()
        if not (has_weights(folder) or variant_of(folder))
    ]


def with_objective(config: TrainConfig, base: BaseModel, chosen: Collection[str], num_processes: int = 1) -> TrainConfig:
    """The configuration with the parameterization that the scheduler of the base model says, for the fields in `chosen`.

    Raises:
        InputError: it does not go with the rest, nor the resolution with the VAE.
    """
    config = update(config, {name: value for name, value in base.objective().items() if name in chosen})
    raise_all(resolution_problems(base, config) + train_problems(config, num_processes))
    return config


def resolution_problems(base: BaseModel, config: TrainConfig) -> list[str]:
    """A resolution that the VAE cannot halve as often as it does."""
    resolution, step = config.data.resolution or 0, base.side_unit
    if resolution > 0 and resolution % step == 0:
        return []
    return [
        f"resolution is {resolution}, but must be a multiple of {step} for this base model; take {step * max(1, round(resolution / step))}"
    ]


def contradictions(base: BaseModel, config: TrainConfig) -> list[str]:
    """Where objective or latents are not those of the base model, a sentence each."""
    if not base.is_trained:
        return []
    ours = config.objective
    found = [
        f"{name} is {getattr(ours, name)}, but base_model was trained with {value}: its UNet has to learn the other one"
        for name, value in base.objective().items()
        if getattr(ours, name) != value
    ]
    scale, own = _scale(base.vae), _scale(part_config(base.folder, "vae"))
    if scale != own:  # as of the VAE that --config sdxl names, for a base model of Stable Diffusion 1.x
        found.append(
            f"vae {config.text.vae} has latents of scale {scale}, but base_model was trained with {own}: its UNet has to learn others"
        )
    return found


def _scale(vae: Mapping[str, Any]) -> Any:
    """How a VAE's latents are scaled, for a message: one number where it has no mean and deviation."""
    factor, *moments = vae_scale({"scaling_factor": 0.18215, **vae})  # which diffusers takes where it is left out
    return [factor, *filter(None, moments)] if any(moments) else factor
