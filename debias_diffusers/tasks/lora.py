"""LoRA in training: adapters of peft on a network whose own weights stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers

from ..config.schema import LoraConfig
from ..errors import InputError, reason
from ..pipelines.lora import lora_file, read_lora
from ..runs.lora_folder import ADAPTER, LORA_WEIGHTS, exported_name
from .unet import require_finite


def add_adapters(network: Any, config: LoraConfig) -> None:
    """Freezes a network and adds adapters, which change nothing yet: A is drawn from torch's global generator, and B is 0.

    Raises:
        InputError: a name of `lora_targets` is that of no module, or of one that cannot have an adapter.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    assert config.lora_rank
    names = [name for name, _ in network.named_modules()]
    for target in config.lora_targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise InputError(f"lora_targets has {target}, but no module of the UNet has a name that ends so; take to_q, for one")
    network.requires_grad_(False)
    alpha: Any = config.lora_alpha or config.lora_rank  # a fraction, too, though peft says int
    wanted = PeftConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=list(config.lora_targets))
    try:
        if isinstance(network, diffusers.ModelMixin):
            network.add_adapter(wanted)
        else:  # that of transformers asks for newer versions of peft than this needs
            inject_adapter_in_model(wanted, network)
    except ValueError as error:
        raise InputError(f"lora_targets is {' '.join(config.lora_targets)}, but peft refuses it: {reason(error)}") from error


def load(network: Any, model: str, config: LoraConfig) -> None:
    """Puts the weights of another LoRA (a run, a file, a Hub id) into the adapters of a network.

    Raises:
        InputError: it cannot be read, or has other modules, another rank or another alpha.
    """
    tensors, about = read_lora(lora_file("init", model), f"init {model}")
    if any(name.endswith(".lora_down.weight") for name in tensors):
        raise InputError(f"init {model} has the names of kohya's scripts; convert it with debias_diffusers.convert lora first")
    ours = {exported_name(name): parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if other := sorted(ours.keys() ^ tensors.keys()):
        targets = about.get("unet.target_modules")
        advice = f"take --lora_targets {' '.join(targets)}" if targets else "name its modules with --lora_targets"
        raise InputError(f"init {model} has adapters of other modules than this run, such as {other[0].split('.lora_')[0]}; {advice}")
    rank = next(len(tensor) for name, tensor in tensors.items() if ".lora_A." in name)
    if rank != config.lora_rank:
        raise InputError(f"init {model} has rank {rank}, but lora_rank is {config.lora_rank}; take --lora_rank {rank}")
    alpha, wanted = about.get("unet.lora_alpha", rank), config.lora_alpha or config.lora_rank
    if alpha != wanted:
        raise InputError(f"init {model} has alpha {alpha:g}, but lora_alpha is {wanted:g}; take --lora_alpha {alpha:g}")
    if other := [name for name, parameter in ours.items() if parameter.shape != tensors[name].shape]:
        raise InputError(f"init {model} was trained on another base model: its {other[0]} has another shape")
    require_finite(tensors, f"init {model}")
    for name, parameter in ours.items():
        parameter.data.copy_(tensors[name])


def save(network: Any, is_xl: bool, folder: Path) -> None:
    """Writes the adapters of a UNet as `load_lora_weights` of stock pipelines reads them, with rank, alpha and targets."""
    from peft.utils import get_peft_model_state_dict

    kind = diffusers.StableDiffusionXLPipeline if is_xl else diffusers.StableDiffusionPipeline
    layers, about = get_peft_model_state_dict(network), _about(network)
    kind.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=about, weight_name=LORA_WEIGHTS)


def _about(network: Any) -> dict[str, Any]:
    """What the file says of its adapters: fields of peft's LoraConfig that every version of it has, in a fixed order."""
    config = network.peft_config[ADAPTER]
    return {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
