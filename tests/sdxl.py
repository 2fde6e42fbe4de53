"""The configuration files of Stable Diffusion XL at its full size, without weights."""

import json

import torch

CLIP = {"hidden_act": "quick_gelu", "max_position_embeddings": 77, "vocab_size": 49408, "layer_norm_eps": 1e-05, "attention_dropout": 0.0}
PARTS = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    },
    "text_encoder": {**CLIP, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "text_encoder_2": {
        **CLIP,
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    },
}
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


def write(folder, tokenizer):
    """A pipeline folder with the configurations, and the files of a tokenizer."""
    kinds = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    index = {name: ["transformers", kind] for name, kind in kinds.items()}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    for name, config in {**PARTS, "scheduler": SCHEDULER}.items():
        (folder / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(config))
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir()
        for file in tokenizer.iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    for name in PARTS:  # files that are not read
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        (folder / name / f"{stem}.safetensors").touch()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline", **index}))
    return folder


def on_meta(kind, folder, device):
    """In place of `frozen_parts._loaded`: a part without memory."""
    config = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        part = kind.from_config(config) if hasattr(kind, "from_config") else kind(kind.config_class(**config))
    return part.requires_grad_(False)
