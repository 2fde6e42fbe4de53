"""LoRA in training: adapters of peft on a network whose own weights stay as they are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor, nn

from ..config.schema.network import LoraConfig
from ..errors import InputError, reason
from ..pipelines.lora import alpha_of, lora_file, read_lora
from ..pipelines.text_pipeline import encoded, joined_outputs
from ..runs.lora_folder import ADAPTER, LORA_WEIGHTS, exported_name
from .base import trained_parameters

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # the attention of text encoders
# What the name of a module begins with that has others like it: a converted LoRA names hundreds of modules one by one.
_PLACE = re.compile(r".*\b(?:attn\d|self_attn|mlp|transformer_blocks\.\d+|attentions\.\d+|resnets\.\d+)\.")


class UNetWithTextEncoders(nn.Module):
    """UNet and text encoders as one network, which is wrapped, trained and averaged as a whole.

    Every parameter takes part in every forward, of whatever captions are dropped, as DistributedDataParallel needs it.
    """

    def __init__(self, unet: Any, encoders: Mapping[str, Any], zeros: bool, chunks: int) -> None:
        """`encoders` by the names of their parts; `zeros` and `chunks` as of `null_embeddings`."""
        super().__init__()
        self.unet, self.names, self.zeros, self.chunks = unet, tuple(encoders), zeros, chunks
        for name, encoder in encoders.items():
            self.add_module(name, encoder)

    @property
    def encoders(self) -> list[Any]:
        """The text encoders, in the order of their embeddings."""
        return [getattr(self, name) for name in self.names]

    def embeddings(self, ids: Sequence[Tensor], dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Text embeddings (B, K tokens, width) and pooled embeddings (B, width); zeros for captions that are `dropped` (B,), if `zeros`."""
        xl = len(self.names) > 1
        outputs = encoded(self.encoders, ids, xl)
        text, pooled = joined_outputs(outputs, xl, self.chunks)
        if self.zeros:
            kept = (~dropped).to(text)
            text, pooled = text * kept[:, None, None], pooled * kept[:, None]
        # The last layer of SDXL's first text encoder is in no embedding.
        return text + 0 * sum(output[0].sum() for output in outputs), pooled

    def forward(self, x_t: Tensor, t: Tensor, ids: Sequence[Tensor], dropped: Tensor, time_ids: Tensor) -> Tensor:
        """The prediction (B, C, h, w).

        Args:
            x_t: (B, C, h, w).
            t: (B,).
            ids: of `token_ids`; those of dropped captions are of the empty prompt.
            dropped: (B,) which captions are dropped.
            time_ids: (B, 6) sizes of SDXL.
        """
        text, pooled = self.embeddings(ids, dropped)
        added = {"text_embeds": pooled, "time_ids": time_ids} if len(self.names) > 1 else None
        predicted: Tensor = self.unet(x_t, t, text, added_cond_kwargs=added, return_dict=False)[0]
        return predicted

    def enable_gradient_checkpointing(self) -> None:
        """Of the UNet, whose activations are the most."""
        self.unet.enable_gradient_checkpointing()

    @property
    def _repeated_blocks(self) -> Any:
        return self.unet._repeated_blocks

    def compile_repeated_blocks(self, **options: Any) -> None:
        """Of the UNet."""
        self.unet.compile_repeated_blocks(**options)


def networks(network: Any) -> dict[str, Any]:
    """UNet and text encoders of a network that is trained, by the names of their parts."""
    if not isinstance(network, UNetWithTextEncoders):
        return {"unet": network}
    return {"unet": network.unet, **dict(zip(network.names, network.encoders))}


def add_adapters(parts: Mapping[str, Any], config: LoraConfig) -> None:
    """Freezes networks and adds adapters, which change nothing yet: A is drawn from torch's global generator, and B is 0.

    Args:
        parts: "unet", and text encoders, if they get adapters, too.
        config: of the adapters.

    Raises:
        InputError: a name of `lora_targets` is that of no module, or of one that cannot have an adapter.
    """
    matching = {name: [target for target in config.lora_targets if _has(part, target)] for name, part in parts.items()}
    if unknown := set(config.lora_targets).difference(*matching.values()):
        found = min(unknown, key=config.lora_targets.index)
        raise InputError(f"lora_targets has {found}, but no module of the {' or '.join(parts)} has a name that ends so; take to_q, for one")
    for name, part in parts.items():
        _add(part, matching[name] if name == "unet" else [*dict.fromkeys([*TEXT_TARGETS, *matching[name]])], config)


def _has(network: nn.Module, target: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for name, _ in network.named_modules())


def _add(network: Any, targets: list[str], config: LoraConfig) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    assert config.lora_rank
    network.requires_grad_(False)
    alpha: Any = config.lora_alpha or config.lora_rank  # a fraction, too, though peft says int
    wanted = PeftConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=targets)
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
    ours = {exported_name(name): parameter for name, parameter in trained_parameters(network).items()}
    if other := sorted(ours.keys() ^ tensors.keys()):
        module, advice = other[0].split(".lora_")[0], _advice(ours, tensors, about)
        raise InputError(f"init {model} has adapters of other modules than this run, such as {module}; {advice}")
    ranks = {name: len(tensor) for name, tensor in tensors.items() if ".lora_A." in name}
    _require_one(model, "rank", ranks.values(), "lora_rank", config.lora_rank or 0)
    alphas = [alpha_of(name, rank, about) for name, rank in ranks.items()]
    _require_one(model, "alpha", alphas, "lora_alpha", config.lora_alpha or config.lora_rank or 0)
    if other := [name for name, parameter in ours.items() if parameter.shape != tensors[name].shape]:
        raise InputError(f"init {model} was trained on another base model: its {other[0]} has another shape")
    for name, parameter in ours.items():
        parameter.data.copy_(tensors[name])


def _advice(ours: Collection[str], theirs: Collection[str], about: Mapping[str, Any]) -> str:
    """By which flag a run has the modules of another LoRA, whose header says `about`."""
    here, there = (any(name.startswith("text_encoder") for name in names) for names in (ours, theirs))
    if here != there:
        return f"{'add' if there else 'leave out'} --lora_text_encoders"
    lists = [value for key, value in about.items() if key.endswith(".target_modules") and isinstance(value, list)]  # else a pattern
    targets = sorted({_PLACE.sub("", target) for names in lists for target in names}.difference(TEXT_TARGETS))
    return f"take --lora_targets {' '.join(targets)}" if targets else "name its modules with --lora_targets"


def _require_one(model: str, what: str, values: Iterable[float], field: str, wanted: float) -> None:
    """Raises InputError unless all modules of a LoRA have the rank or alpha of the run."""
    first, *others = sorted(set(values))
    if others:
        raise InputError(f"init {model} has modules of {what} {first:g} to {others[-1]:g}, but {field} is {wanted:g} for all; take another")
    if first != wanted:
        raise InputError(f"init {model} has {what} {first:g}, but {field} is {wanted:g}; take --{field} {first:g}")


def save(network: Any, is_xl: bool, folder: Path) -> None:
    """Writes the adapters of a network as `load_lora_weights` of stock pipelines reads them, with rank, alpha and targets."""
    kind = diffusers.StableDiffusionXLPipeline if is_xl else diffusers.StableDiffusionPipeline
    tensors = {exported_name(name): parameter.detach() for name, parameter in network.named_parameters() if f".{ADAPTER}." in name}
    given: dict[str, Any] = {}
    for part, adapted in networks(network).items():
        given[f"{part}_lora_layers"] = {name.removeprefix(f"{part}."): tensors[name] for name in tensors if name.startswith(f"{part}.")}
        given[f"{part}_lora_adapter_metadata"] = _about(adapted)
    kind.save_lora_weights(folder, weight_name=LORA_WEIGHTS, **given)


def _about(network: Any) -> dict[str, Any]:
    """What the file says of its adapters: fields of peft's LoraConfig that every version of it has, in a fixed order.

    `load_lora_weights` of diffusers 0.38 fails where the patterns are left out.
    """
    config = network.peft_config[ADAPTER]
    about = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
    return about | {"rank_pattern": {}, "alpha_pattern": {}}
