"""How fast a text-to-image training is, beside a plain loop of stock pieces in the manner of diffusers' example scripts.

    python benchmarks/text_to_image.py                             # on CPUs the cases tiny and medium, on an accelerator full, too
    python benchmarks/text_to_image.py --cases tiny --rounds 5 --json text.json
    python benchmarks/text_to_image.py --cases full --rounds 1 --steps 6 --warm 2 --recipes AdamW "LoRA of rank 16, base in bf16"

Case tiny is the packaged base model of the captioned digits at its batch of 64. Medium has a UNet of 31 million parameters at 128x128
and a VAE that takes a fifth of its FLOPs, as SDXL's takes a quarter (counted: 20.2 and 4.9 TFLOP for an image of 1024x1024). Full is
Stable Diffusion XL's own size with random weights, at 1024x1024 in bf16, 4 images a step and one at a time; only its text encoders have
one layer, because they have done their work before the first step.

Both load the same files, encode captions once, train with AdamW (full: Adafactor) and one average (full: none), clip, and read the
loss: the plain loop in each step. `known` has the latents of all images before the first step, `encoded` computes them in each; in the
case full they are known, and the rows are ways to train it. Each runs in a process of its own, all in turn, `--rounds` times; a table
has the medians. "outside" is the share of the time that is neither forward (with the VAE), backward nor update.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import training
from training import Clock

PLAIN, OURS, KNOWN, ENCODED = "plain loop", "train.py", "known", "encoded"
USUAL = (
    "--lr_schedule constant --warmup_steps 0 --sample_every 0 --checkpoint_every 0 --max_grad_norm 1 --learning_rate 1e-4 --num_workers 0"
)
CASES = {
    "tiny": "--resolution 8 --batch_size 64 --ema_decay 0.995",
    "medium": "--resolution 128 --batch_size 4 --ema_decay 0.995",
    "full": "--resolution 1024 --batch_size 4 --micro_batch_size 1 --ema_decay 0 --mixed_precision bf16 NO_SAVE",
}
IMAGES = {"tiny": 512, "medium": 64, "full": 8}
CHECKPOINTED, BF16_WEIGHTS = "--gradient_checkpointing", "--param_dtype bf16"
RECIPES = {  # of the case full
    "Adafactor": f"--optimizer adafactor {CHECKPOINTED}",
    "AdamW": f"--optimizer adamw {CHECKPOINTED}",
    "Adafactor, weights in bf16": f"--optimizer adafactor {CHECKPOINTED} {BF16_WEIGHTS}",
    "Adafactor, weights in bf16, no gradient checkpointing": f"--optimizer adafactor {BF16_WEIGHTS}",
    "LoRA of rank 16, base in bf16": f"--lora_rank 16 {CHECKPOINTED} {BF16_WEIGHTS}",
    "LoRA of rank 16, base in bf16, no gradient checkpointing": f"--lora_rank 16 {BF16_WEIGHTS}",
    "LoRA of rank 16, base in bf16, compiled": f"--lora_rank 16 {BF16_WEIGHTS} --compile",
}
MEDIUM_UNET = {
    "block_out_channels": [64, 128, 256],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 4, 8],
    "norm_num_groups": 32,
}
MEDIUM_VAE = {
    "block_out_channels": [16, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
}
FULL_UNET = MEDIUM_UNET | {
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FULL_VAE = MEDIUM_VAE | {"block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32}
FULL_TEXT = {"num_hidden_layers": 1, "max_position_embeddings": 77}
FULL_ENCODER = FULL_TEXT | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
FULL_ENCODER_2 = FULL_TEXT | {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "projection_dim": 1280}
UNETS, VAES = {"medium": MEDIUM_UNET, "full": FULL_UNET}, {"medium": MEDIUM_VAE, "full": FULL_VAE}


# ---- what is trained -------------------------------------------------------------------------------------------------


def make_base(case: str, folder: Path) -> None:
    """The packaged base model with a random UNet of this case, and random VAE and text encoders where the case has others."""
    import shutil

    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from debias_diffusers.tasks.base_model import PACKAGED

    shutil.copytree(PACKAGED, folder)
    torch.manual_seed(0)
    parts: list[tuple[str, Any, dict[str, Any]]] = [("unet", UNet2DConditionModel, UNETS.get(case, {}))]
    parts += [("vae", AutoencoderKL, VAES[case])] if case in VAES else []
    full = case == "full"
    if full:
        parts += [("text_encoder", CLIPTextModel, FULL_ENCODER), ("text_encoder_2", CLIPTextModelWithProjection, FULL_ENCODER_2)]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # billions of random numbers take a CPU minutes
        for name, kind, changes in parts:
            config = json.loads((folder / name / "config.json").read_text()) | changes
            network = kind(kind.config_class(**config)) if name.startswith("text") else kind.from_config(config)
            network.to(torch.bfloat16 if full else torch.float32).save_pretrained(folder / name)
    for path in folder.glob("tokenizer*/tokenizer_config.json") if full else ():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 77}))


def make_data(folder: Path, count: int, side: int) -> None:
    """Made-up pictures with captions beside them."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    generator = np.random.default_rng(0)
    for k in range(count):
        small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{k:04d}.png")
        (folder / f"{k:04d}.txt").write_text(f"a handwritten {('one', 'two', 'three', 'four')[k % 4]}")


# ---- the plain loop --------------------------------------------------------------------------------------------------


def plain(flags: list[str], clock: Clock) -> dict[str, Any]:
    """A loop of stock pieces with the same network, data and loss."""
    import torch
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, StableDiffusionXLPipeline
    from diffusers.training_utils import EMAModel

    from debias_diffusers.cli import train_config
    from debias_diffusers.utils import distributed

    known = "random" not in flags  # the crop of ours, with which it encodes in each step
    config = train_config([flag for flag in flags if flag not in training.WORDS], None)
    optim = config.optimization
    accelerator = Accelerator(mixed_precision=optim.mixed_precision)
    distributed.set_threads(optim.num_threads)
    pipeline = StableDiffusionXLPipeline.from_pretrained(config.text.base_model, add_watermarker=False).to(accelerator.device)
    unet, vae = pipeline.unet.train(), pipeline.vae.requires_grad_(False)
    if optim.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    scheduler = DDPMScheduler.from_pretrained(config.text.base_model, subfolder="scheduler")
    data = _PlainData(config, pipeline, known)
    optimizer = _optimizer(unet, optim.optimizer, optim.learning_rate)
    average = EMAModel(unet.parameters(), decay=optim.ema_decay[0]) if optim.ema_decay[0] else None
    loader = torch.utils.data.DataLoader(data, batch_size=optim.batch_size, shuffle=True, drop_last=True)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    step = 0
    while step < optim.max_steps:
        for batch in clock.batches(lambda: loader)():
            micro = optim.micro_batch_size or optim.batch_size
            for start in range(0, optim.batch_size, micro):
                part = {name: value[start : start + micro] for name, value in batch.items()}
                with clock.part("forward"):
                    loss = _loss(unet, vae, scheduler, part, known) * micro / optim.batch_size
                    mean_loss = accelerator.gather(loss.detach().repeat(micro)).mean()
                with clock.part("backward"):
                    accelerator.backward(loss)
            _ = clock.signum
            with clock.part("update"):
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                if average:
                    average.step(unet.parameters())
            with clock.part("logging"):
                mean_loss.item()
            step += 1
            if step == optim.max_steps:
                break
    return {}


def _loss(unet: Any, vae: Any, scheduler: Any, batch: dict[str, Any], known: bool) -> Any:
    import torch

    posterior = batch["mean"] + batch["std"] * torch.randn_like(batch["mean"]) if known else _encoded(vae, batch["pixels"])
    latents = posterior * vae.config.scaling_factor
    noise = torch.randn_like(latents)
    t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    added = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
    predicted = unet(scheduler.add_noise(latents, noise, t), t, batch["text"], added_cond_kwargs=added, return_dict=False)[0]
    v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, t) if v else noise
    return torch.nn.functional.mse_loss(predicted.float(), target.float())


def _optimizer(unet: Any, name: str, rate: float) -> Any:
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(unet.parameters(), lr=rate, relative_step=False, scale_parameter=False)
    import torch

    return torch.optim.AdamW(unet.parameters(), lr=rate)


def _encoded(vae: Any, pixels: Any) -> Any:
    import torch

    with torch.no_grad():
        return vae.encode(pixels).latent_dist.sample()


class _PlainData:
    """Images as tensors, or their posteriors, with the embeddings of their captions."""

    def __init__(self, config: Any, pipeline: Any, known: bool) -> None:
        import torch
        from torchvision import transforms

        folder, side = Path(config.data.dataset), config.data.resolution
        self.paths, self.known = sorted(folder.glob("*.png")), known
        self.captions = [path.with_suffix(".txt").read_text() for path in self.paths]
        self.transform = transforms.Compose(
            [transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
        )
        with torch.no_grad():
            self.embeddings = {
                caption: pipeline.encode_prompt(caption, do_classifier_free_guidance=False) for caption in set(self.captions)
            }
        self.time_ids = torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32)
        if known:
            with torch.no_grad():
                self.posteriors = [
                    pipeline.vae.encode(self._pixels(k)[None].to(pipeline.device)).latent_dist for k in range(len(self.paths))
                ]

    def _pixels(self, k: int) -> Any:
        from PIL import Image

        return self.transform(Image.open(self.paths[k]).convert("RGB"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, k: int) -> dict[str, Any]:
        text, _, pooled, _ = self.embeddings[self.captions[k]]
        common = {"text": text[0], "pooled": pooled[0], "time_ids": self.time_ids}
        if self.known:
            return common | {"mean": self.posteriors[k].mean[0], "std": self.posteriors[k].std[0]}
        return common | {"pixels": self._pixels(k)}


# ---- measurements ----------------------------------------------------------------------------------------------------


def case(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both loops, with latents known and encoded, in turn, several times: the medians."""
    import torch

    make_base(name, folder / name)
    torch.cuda.empty_cache()  # all of a GPU is for the trainings, which are other processes
    side, batch = (int(CASES[name].split(f"--{flag} ")[1].split()[0]) for flag in ("resolution", "batch_size"))
    make_data(folder / f"{name}-data", IMAGES[name], side)
    flags = f"--base_model {folder / name} --dataset {folder / f'{name}-data'} {CASES[name]} {USUAL}"
    flags += " --num_threads 1" * options.cpu_time
    variants = {key: (loop, f"{flags} {more}") for key, (loop, more) in rows_of(name, options.recipes).items()}
    runs: dict[str, list[dict[str, Any]]] = {key: [] for key in variants}
    for _ in range(options.rounds):
        for key, (loop, all_flags) in variants.items():
            run = training.measured(key, loop, all_flags, options)
            if run is None and loop is plain:
                sys.exit("without the plain loop there is nothing to compare with")
            runs[key] += [run] if run else []
    rows = {}
    for key, several in runs.items():
        if len(several) < options.rounds:
            continue  # which was said
        row = training.median(several)
        inside = sum(row["parts"][part] for part in ("forward", "backward", "update"))
        beside = next(iter(runs.values())) if name == "full" else runs[f"{PLAIN}, {key.split(', ')[1]}"]
        rows[key] = row | {
            "images_per_second": batch / row["seconds"],
            "ratio": statistics.median(p["seconds"] / o["seconds"] for p, o in zip(beside, several)),
            "outside": 1 - inside / row["seconds"],
        }
    return rows


def rows_of(case: str, recipes: list[str]) -> dict[str, tuple[training.Loop, str]]:
    """Loop and flags of each row of a table; `recipes` are those of the case full."""
    if case == "full":
        first = f"{PLAIN}, Adafactor"
        return {first: (plain, RECIPES["Adafactor"])} | {f"{OURS}, {key}": (training.ours, RECIPES[key]) for key in recipes}
    loops = ((PLAIN, plain), (OURS, training.ours))
    of_latents = ((KNOWN, ""), (ENCODED, "--crop random"))
    return {f"{name}, {latents}": (loop, flags) for latents, flags in of_latents for name, loop in loops}


def table(name: str, rows: dict[str, Any]) -> str:
    """A case in Markdown."""
    lines = [
        f"case {name}: {CASES[name]}",
        "",
        "| | images/s | of the plain loop | ms/step | outside | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for key, row in rows.items():
        speed = f"{row['images_per_second']:.1f} | {row['ratio']:.2f} | {1000 * row['seconds']:.1f} | {row['outside']:.1%}"
        lines.append(f"| {key} | {speed} | {row['peak_mb']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and prints."""
    import torch

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES) if gpu else ["tiny", "medium"])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="rows of the case full, beside the plain loop")
    parser.add_argument("--steps", type=int, default=40, help="steps that count, of each run")
    parser.add_argument("--warm", type=int, default=10, help="steps before them")
    training.add_common(parser)
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if gpu else f"{len(os.sched_getaffinity(0))} CPU cores"
    print(f"{where}, torch {torch.__version__}, medians of {options.rounds} runs of {options.steps} steps\n")
    everything: dict[str, Any] = {"device": where, "torch": torch.__version__, "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cases:
            everything["cases"][name] = case(name, options, Path(folder))
            print(table(name, everything["cases"][name]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
