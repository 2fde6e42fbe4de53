"""What loading pixel models and text-to-image models has in common: the folder of a model, and weights that are all there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from ..config import hub_names
from ..errors import InputError, reason
from ..hub import client
from ..runs.model_folder import model_index, require_model
from ..runs.part_files import variant_of


def folder_of_model(model: str, variant: str | None = None, allow_pickle: bool = False) -> Path:
    """The folder of a model: a path, or what is downloaded of a Hub id (user/name, user/name@revision).

    Args:
        model: path or Hub id.
        variant: of the weights of the UNet, such as ema_0_999; None for the default weights.
        allow_pickle: download .bin weights, too.

    Raises:
        InputError: there is no such folder, or it holds no pipeline.
        HubError: the Hub cannot be reached or rejects the request.
    """
    folder = client.download_model(model, variant, allow_pickle) if hub_names.is_model_id(model) else Path(model)
    require_model(folder, model)
    return folder


@contextlib.contextmanager
def explained_errors(subject: str) -> Iterator[None]:
    """Turns whatever loading something raises into an InputError, which begins with `subject`, such as "model runs/digits"."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a damaged or hostile file may provoke any
        raise InputError(f"{subject} cannot be loaded: {reason(error)}") from error


def require_variant(folder: Path, model: str, variant: str | None) -> None:
    """Raises InputError if the UNet has no weights of a variant."""
    if variant and not any(folder.glob(f"unet/{client.WEIGHTS}.{variant}.*")):
        raise InputError(f"model {model} has no weights {variant}, as averages at other rates are named; take --weights ema")


def class_of_part(folder: Path, name: str) -> Any:
    """The class of a UNet, a VAE or a text encoder of a text-to-image model, whose classes `require_text_model` has checked."""
    if name in (found := {"unet": UNet2DConditionModel, "vae": AutoencoderKL}):
        return found[name]
    import transformers

    return getattr(transformers, model_index(folder)[name][1])


def load_part(kind: Any, folder: Path, model: str, variant: str | None = None) -> Any:
    """A part of a model, of a class of diffusers or transformers, from its folder, in float32.

    Args:
        kind: its class.
        folder: with its configuration and weights.
        model: its name for messages.
        variant: of the weights, such as ema_0_999; None for the default weights, or those in fp16 where there are no others.

    Raises:
        InputError: a file is missing or damaged, or lacks a weight, which the libraries would draw at random, with a warning only.
    """
    with explained_errors(f"model {model}"):
        part, found = kind.from_pretrained(
            folder, variant=variant or variant_of(folder), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        if missing := sorted(found["missing_keys"]) or sorted(str(each) for each in found["mismatched_keys"]):
            raise InputError(f"model {model} cannot be loaded: the weight file of its {folder.name} lacks {missing[0]}")
        return part.float()


def require_all_weights(module: Any, model: str) -> None:
    """Raises InputError if a weight file lacked a tensor of a module, which diffusers leaves on the meta device."""
    if missing := [name for name, parameter in module.named_parameters() if parameter.is_meta]:
        raise InputError(f"model {model} cannot be loaded: its weight file lacks {missing[0]}")


def require_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Raises InputError where a weight is NaN or infinite; `where` names their file or folder."""
    if spoilt := [name for name, value in weights.items() if not _is_finite(value)]:
        raise InputError(f"{where} has weights that are not finite, such as {spoilt[0]}; take those of an earlier step")


def _is_finite(value: Tensor) -> bool:
    return bool((value.half() if value.element_size() == 1 else value).isfinite().all())  # torch's is not there for all float8
