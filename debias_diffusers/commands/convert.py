"""The command `convert`: checkpoints, single files and LoRAs to the format of diffusers, and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .. import parsing
from ..config.schema.conversion import ExportConfig, GuidedConfig, LoraFormatConfig, SingleConfig
from ..config.validation.conversion import single_problems
from ..errors import raise_all
from ..runs.lora_folder import lora_problems
from .base import dispatch

CONVERT_HELP = """
  guided MODEL.pt OUT --flags FLAGS   a checkpoint of guided-diffusion (the paper's code, ADM, P2, Min-SNR) to a pipeline
  export MODEL OUT.pt                 the network of a run or pipeline to a checkpoint that guided-diffusion loads
  single MODEL.safetensors OUT        a single file of Stable Diffusion XL, 2.x or 1.x to a pipeline folder
  single MODEL OUT.safetensors        a run or pipeline of them to a single file, which other programs load
  lora LORA OUT --format FORMAT       a LoRA to the names of kohya's scripts (sd-scripts), or from these to those of diffusers"""


def run_convert(argv: list[str], program: str) -> None:
    """Runs `guided`, `export`, `single` or `lora`."""
    dispatch({"guided": _guided, "export": _export, "single": _single, "lora": _lora}, CONVERT_HELP, argv, program)


def _guided(argv: list[str], program: str) -> None:
    if "--flags" in argv[:-1]:  # its value starts with dashes, so the parser needs "--flags=VALUE"
        place = argv.index("--flags")
        argv = [*argv[:place], f"--flags={argv[place + 1]}", *argv[place + 2 :]]
    config = parsing.parse(GuidedConfig, argv, program)
    from ..convert import guided_diffusion

    guided_diffusion.guided(**dataclasses.asdict(config))


def _export(argv: list[str], program: str) -> None:
    config = parsing.parse(ExportConfig, argv, program)
    from ..convert import guided_diffusion

    guided_diffusion.export(**dataclasses.asdict(config))


def _single(argv: list[str], program: str) -> None:
    config = parsing.parse(SingleConfig, argv, program)
    raise_all(single_problems(config))
    from ..convert import single_file

    if Path(config.out).suffix == ".safetensors":
        single_file.pack(config.model, config.out, config.dtype)
    else:
        single_file.unpack(config.model, config.out, config.config)


def _lora(argv: list[str], program: str) -> None:
    config = parsing.parse(LoraFormatConfig, argv, program)
    raise_all(lora_problems("lora", config.lora))
    from ..convert import lora

    lora.convert(**dataclasses.asdict(config))
