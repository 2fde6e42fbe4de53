"""What people type for the flags and values of this package: names of other trainers, short forms, misspellings. Suggested, not accepted.

The names are those of diffusers' example scripts, guided-diffusion and kohya's scripts, where a flag of the same meaning has
another name here, or a similar name has another meaning.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from .ranges import field_types
from .schema.evaluation import ScoreConfig
from .schema.sampling import SampleConfig
from .schema.training import TrainConfig

# (names that are typed, what it is here, in what it differs). Upper case is an argument that stands without a flag. Where nothing is
# the same here, the last says what to do instead. A row is for the commands that have all its flags; the first such row counts.
_ROWS: tuple[tuple[str, str, str], ...] = (
    # length and batches
    (
        "steps num_steps n_steps train_steps train_num_steps max_train_steps num_iterations iterations iters max_iters total_steps",
        "--max_steps",
        "",
    ),
    (
        "epochs epoch n_epochs max_epochs num_train_epochs max_train_epochs",
        "--num_epochs",
        "in place of --max_steps",
    ),
    (
        "train_batch_size per_device_train_batch_size batch bs",
        "--batch_size",
        "it counts the images of all processes; --micro_batch_size those of one",
    ),
    (
        "eval_batch_size val_batch_size",
        "",
        "images are drawn in batches that the training has memory for; --micro_batch_size makes them smaller",
    ),
    (
        "gradient_accumulation_steps gradient_accumulate_every grad_accum accumulate_grad_batches gradient_accumulation "
        "accumulative_counts",
        "--micro_batch_size",
        "it counts the images of one forward pass; batch_size stays that of a whole optimizer step",
    ),
    ("microbatch microbatch_size", "--micro_batch_size", "the whole batch if left out, where guided-diffusion has -1"),
    ("scale_lr", "", "the learning rate is not scaled by the batch size; --learning_rate is what is taken"),
    # learning rate
    ("lr base_lr peak_lr train_lr unet_lr", "--learning_rate", ""),
    ("lr_scheduler lr_scheduler_type learning_rate_scheduler", "--lr_schedule", "constant, linear or cosine; --warmup_steps is apart"),
    ("lr_warmup_steps lr_warmup num_warmup_steps warmup", "--warmup_steps", "optimizer steps, however many processes there are"),
    ("warmup_epochs", "--warmup_steps", "it counts optimizer steps"),
    ("warmup_ratio", "--warmup_steps", "optimizer steps, not a share of them"),
    (
        "lr_anneal_steps lr_decay_steps lr_decay",
        "--lr_schedule linear --max_steps",
        "the learning rate falls to 0 at the end of the run",
    ),
    ("lr_scheduler_num_cycles lr_num_cycles lr_power lr_scheduler_power", "", "--lr_schedule cosine is half a period"),
    ("min_lr", "", "--lr_schedule linear and cosine end at 0"),
    ("schedule scheduler", "--noise_schedule or --lr_schedule", "the betas, or the learning rate"),
    # optimizer
    ("adam_weight_decay wd", "--weight_decay", ""),
    ("decay", "--ema_decay or --weight_decay", ""),
    ("adam_beta1 adam_beta2 adam_betas beta1 beta2", "", "AdamW has the betas 0.9 and 0.999, which no flag changes"),
    ("adam_epsilon", "", "the epsilon of AdamW is 1e-8, which no flag changes"),
    ("optimizer_type optim", "--optimizer", "adamw, adafactor or adamw8bit"),
    ("full_bf16 weight_dtype weights_dtype", "--param_dtype bf16", ""),
    ("optimizer_args", "--learning_rate --weight_decay", "an optimizer has no other options here"),
    ("use_8bit_adam optimizer_8bit use_8bit", "--optimizer adamw8bit", ""),
    ("use_adafactor adafactor", "--optimizer adafactor", ""),
    ("relative_step scale_parameter warmup_init", "", "adafactor has no relative step here; --learning_rate bounds the RMS of an update"),
    ("clip grad_clip gradient_clip gradient_clip_val clip_grad clip_grad_norm clip_norm max_norm", "--max_grad_norm", ""),
    # EMA
    ("ema ema_rate ema_decay_rate ema_beta ema_rates", "--ema_decay", "one or more rates; the EMA is always there"),
    ("ema_max_decay", "--ema_decay", ""),
    ("use_ema no_ema", "", "the EMA is always there; --ema_decay sets its rate"),
    ("offload_ema ema_cpu ema_cpu_only cpu_ema", "--ema_on_cpu", ""),
    ("ema_inv_gamma ema_power", "", "the warmup of the EMA is min(rate, (1 + n) / (10 + n)); --no_ema_warmup switches it off"),
    # data
    ("data dataset_name train_data_dir instance_data_dir data_dir data_path data_root dataset_path image_dir", "--dataset", ""),
    ("images image_folder folder path train_dir input_dir", "--dataset", ""),
    ("train_shards_path_or_url shards shard_urls urls webdataset", "--dataset", "a folder of .tar files, or 'shards/{0000..0127}.tar'"),
    ("shuffle_buffer shuffle_buffer_size buffer_size shardshuffle", "--shuffle_window", "shards whose images are shuffled together"),
    ("dataset_config_name dataset_config", "", "a dataset of the Hub is taken by its name alone; --split names the split"),
    ("max_train_samples max_images num_samples", "", "all images of --dataset are trained; give a folder with fewer"),
    ("image_size img_size image_resolution sample_size res", "--resolution", ""),
    ("enable_bucket enable_buckets buckets bucketing", "--aspect_ratio_buckets", ""),
    (
        "bucket_reso_steps min_bucket_reso max_bucket_reso bucket_no_upscale",
        "--aspect_ratio_buckets",
        "its sizes follow from --resolution",
    ),
    ("color_aug vertical_flip augment augmentation aug", "", "the only augmentation is --random_flip"),
    ("grayscale greyscale gray grey", "--channels 1", ""),
    ("color colour rgb", "--channels 3", ""),
    ("flip flip_aug horizontal_flip hflip", "--random_flip", ""),
    ("class_cond conditional", "--class_conditional", ""),
    ("unconditional uncond", "--no_class_conditional", ""),
    ("num_classes n_classes classes labels", "", "classes are found in the data; --class_conditional trains with them"),
    ("cfg_dropout class_dropout_prob cond_drop_prob p_uncond label_drop_prob", "--label_dropout", "only with --class_conditional"),
    ("dataloader_num_workers max_data_loader_n_workers workers n_workers", "--num_workers", ""),
    ("max_images num_samples n_samples num_images_per_prompt n", "--num_images", ""),
    # captions and adapters
    (
        "validation_prompt validation_prompts prompt prompts sample_prompt",
        "--sample_prompts",
        "the prompts of the sample grids of a text-to-image model",
    ),
    ("instance_prompt class_prompt", "--caption_column", "each image has a caption of its own; there is no DreamBooth"),
    (
        "proportion_empty_prompts caption_dropout_rate caption_tag_dropout_rate",
        "--caption_dropout",
        "share of captions replaced by what the pipeline takes for an empty prompt",
    ),
    ("caption_extension", "--caption_column", "NAME.txt beside NAME.png is read without a flag"),
    ("max_token_length tokenizer_max_length", "--caption_chunks", "a number of inputs of 75 tokens: 3 for 225"),
    ("caption text_column captions_column", "--caption_column", ""),
    ("random_crop", "--crop random", "of a text-to-image model; pixel models are cropped at the center"),
    ("lora rank network_dim lora_r", "--lora_rank", "of a text-to-image model"),
    ("network_alpha", "--lora_alpha", "of a text-to-image model"),
    ("network_weights lora_weights", "--init", "a LoRA to start from, with --lora_rank"),
    ("network_train_unet_only", "--lora_rank", "of the UNet alone; --lora_text_encoders adds the text encoders"),
    ("unet_lora_config", "--lora_rank --lora_targets", "adapters by peft, of a text-to-image model"),
    ("conv_dim conv_alpha", "--lora_targets", "modules of the UNet, such as conv1 conv2, with the rank of all"),
    (
        "use_dora network_dropout lora_dropout rank_dropout module_dropout scale_weight_norms",
        "",
        "--lora_rank adds plain adapters, without dropout or limits",
    ),
    ("with_prior_preservation prior_loss_weight reg_data_dir class_data_dir num_class_images", "", "there is no prior preservation"),
    ("network_module network_args target_modules lora_layers", "--lora_rank --lora_targets", "adapters by peft, of a text-to-image model"),
    ("train_text_encoder", "--lora_text_encoders", "adapters on them, with --lora_rank; their own weights are not trained"),
    ("text_encoder_lr clip_skip tokenizer_name", "", "text encoders are those of the base model, and all adapters have --learning_rate"),
    (
        "cache_latents cache_latents_to_disk vae_batch_size cache_text_embeddings cache_text_encoder_outputs "
        "cache_text_encoder_outputs_to_disk pre_compute_text_embeddings latent_caching",
        "--precompute_dir",
        "a folder; without it latents and text embeddings are kept in memory, where nothing random precedes them",
    ),
    ("offset_noise offset_noise_weight", "--noise_offset", ""),
    ("adaptive_noise_scale noise_offset_random_strength", "", "--noise_offset is the same for all samples"),
    ("ip_noise_gamma perturbation_noise_weight", "--input_perturbation", ""),
    ("multires_noise_discount pyramid_noise multires_noise", "--pyramid_noise_discount", ""),
    ("multires_noise_iterations", "--pyramid_noise_discount --pyramid_noise_iterations", ""),
    ("pretrained_vae_model_name_or_path vae_path", "--vae", ""),
    ("save_model_as save_precision", "", "a run has .safetensors of its weights as they are; debias_diffusers.convert writes other files"),
    ("revision non_ema_revision", "", "a revision is a part of a name of the Hub, as in user/name@revision"),
    ("variant", "", "files of the variant fp16 are taken of models that have no others"),
    ("center_crop", "--crop center", "of a text-to-image model; pixel models are always cropped at the center"),
    # network
    (
        "pretrained_model_name_or_path pretrained pretrained_model finetune finetune_from init_from load_weights",
        "--init or --base_model",
        "weights of a pixel model, or a text-to-image model",
    ),
    ("model model_path model_name network", "--init or --model_config", "weights to start from, or the configuration of a network"),
    ("ckpt ckpt_path checkpoint checkpoint_path", "--init", "weights alone; the same command resumes a run"),
    ("model_config_name_or_path unet_config model_config_file", "--model_config", ""),
    ("num_channels base_channels model_dim hidden_size unet_dim dim width", "--model_channels", "--channels are those of the images"),
    ("in_channels out_channels image_channels", "--channels", "those of the images"),
    ("channel_multipliers channel_mults dim_mults ch_mult", "--channel_mult", ""),
    ("num_res_blocks res_blocks depth num_layers n_layers layers blocks", "--layers_per_block", ""),
    ("num_heads n_heads heads attention_heads num_attention_heads", "--attention_head_dim", "channels of a head, not the number of heads"),
    ("num_head_channels head_dim", "--attention_head_dim", ""),
    ("dropout_rate dropout_prob drop_rate", "--dropout", ""),
    ("patch_size", "", "the network is a UNet without patches; --channel_mult has its levels"),
    ("attn_resolutions", "--attention_resolutions", ""),
    ("use_scale_shift_norm scale_shift_norm", "--resnet_time_scale_shift scale_shift", ""),
    ("use_checkpoint checkpointing", "--gradient_checkpointing", "--checkpoint_every saves checkpoints"),
    ("use_new_attention_order", "", "the order of the attention's channels is that of diffusers"),
    # objective
    ("parameterization pred_type objective prediction", "--prediction_type", ""),
    ("predict_xstart", "--prediction_type sample", ""),
    ("predict_v v_parameterization v_pred v_prediction", "--prediction_type v_prediction", ""),
    ("loss_weighting loss_weight weighting_scheme weight_schedule mse_loss_weight_type", "--weighting", ""),
    ("weights", "--weighting or --init", "weights of the loss, or of a network to start from"),
    ("loss loss_type huber_c huber_schedule", "", "the loss is a weighted mean square; --weighting chooses the weights"),
    (
        "scale_v_pred_loss_like_noise_pred",
        "--weighting constant",
        "weights are those of the noise error, whatever is predicted; --weighting v is the plain loss of v",
    ),
    ("min_snr_gamma min_snr loss_weight_strength", "--weighting min_snr --snr_gamma", "the same weights whatever --prediction_type"),
    ("debiased_estimation_loss debiased debiased_estimation", "--weighting debiased", "debiased_kohya is the loss of kohya's scripts"),
    ("use_kl", "--learn_sigma --weighting variational", "the bound alone"),
    ("rescale_learned_sigmas", "--learn_sigma", "the bound is always rescaled by T/1000"),
    ("diffusion_steps num_timesteps timesteps num_diffusion_steps ddpm_num_steps", "--num_train_timesteps", ""),
    ("ddpm_beta_schedule beta_schedule", "--noise_schedule", "cosine is squaredcos_cap_v2"),
    ("beta_start beta_end betas", "", "--noise_schedule has its own betas, AdamW 0.9 and 0.999; --schedule_shift multiplies the SNR"),
    ("zero_terminal_snr ztsnr", "--rescale_betas_zero_snr", ""),
    ("shift flow_shift timestep_shift discrete_flow_shift", "--schedule_shift", "it multiplies the SNR: a shift s of t is 1/s^2 here"),
    ("schedule_sampler", "--timestep_sampler", ""),
    ("logit_mean", "--timestep_mean", ""),
    ("logit_std", "--timestep_std", ""),
    ("min_timestep max_timestep", "", "all timesteps are drawn; --timestep_sampler and --timestep_bias_strategy decide how often"),
    ("timestep_bias", "--timestep_bias_strategy", ""),
    ("rescale_timesteps", "", "timesteps go to the network as they are, from 0 to T - 1"),
    # device
    ("fp16 use_fp16 full_fp16 amp half", "--mixed_precision fp16", ""),
    ("fp16_scale_growth", "--mixed_precision fp16", "the loss scale is that of accelerate"),
    ("bf16", "--mixed_precision bf16", ""),
    ("precision", "--mixed_precision", ""),
    ("enable_xformers_memory_efficient_attention xformers mem_eff_attn flash_attention sdpa", "", "attention is PyTorch's own"),
    ("allow_tf32 tf32", "", "no flag changes it; --mixed_precision bf16 computes in half precision"),
    (
        "device gpu gpus num_gpus devices num_processes",
        "",
        "the launcher chooses: accelerate launch names the number of processes, and ACCELERATE_USE_CPU=true the CPU",
    ),
    ("local_rank", "", "accelerate launch and torchrun set it in the environment"),
    # output
    (
        "out outdir out_dir output save_dir logging_dir log_dir logdir run_dir run_name results_dir results_folder checkpoint_dir ckpt_dir",
        "--output_dir",
        "",
    ),
    ("overwrite_output_dir", "--output_dir", "a run is never overwritten; name another directory"),
    (
        "save_every save_steps save_interval checkpointing_steps save_every_n_steps checkpoint_interval ckpt_every save_model_steps",
        "--checkpoint_every",
        "",
    ),
    ("save_every_n_epochs save_model_epochs save_epochs", "--checkpoint_every", "it counts optimizer steps"),
    ("checkpoints_total_limit save_total_limit save_last_n_steps keep_last", "--keep_checkpoints", "a number of checkpoints"),
    ("sample_steps validation_steps sample_every_n_steps save_images_steps sample_interval", "--sample_every", ""),
    ("validation_epochs save_images_epochs sample_every_n_epochs", "--sample_every", "it counts optimizer steps"),
    ("val_split valid_split eval_split holdout", "--validation_split", ""),
    ("validate_every_n_steps val_every validation_interval", "--validation_every", "with --validation_split"),
    ("validation_seed", "", "--seed decides which images --validation_split holds out, and their noise"),
    ("log_interval logging_steps log_steps log_freq print_freq print_every", "--log_every", ""),
    ("eval_steps eval_interval eval_freq", "--eval_every", ""),
    ("logger log_with tracker", "--report_to", ""),
    ("wandb use_wandb", "--report_to wandb", ""),
    ("tensorboard use_tensorboard", "--report_to tensorboard", ""),
    ("trackio mlflow comet_ml swanlab", "--report_to", "trackers by name, several at once"),
    ("random_seed manual_seed", "--seed", ""),
    ("torch_compile compile_model", "--compile", ""),
    ("mode", "--compile_mode", ""),
    ("max_time time_limit", "--max_hours", ""),
    ("model_size unet_size network_size", "--size", ""),
    ("tracker_project_name wandb_project", "", "--report_to wandb takes WANDB_PROJECT from the environment"),
    (
        "resume_from_checkpoint resume_checkpoint resume_from save_state",
        "",
        "--resume RUN goes on with a run, and so does the same command; --init takes weights alone",
    ),
    ("hub_token hf_token token", "", "the token is that of `hf auth login` or HF_TOKEN"),
    ("hub_private_repo", "--hub_private", ""),
    ("hub_repo repo_id hub_id hub_name", "--hub_model_id", ""),
    # sampling and evaluation
    (
        "model model_path model_name_or_path pretrained_model_name_or_path ckpt ckpt_path checkpoint checkpoint_path model_id",
        "MODEL",
        "it stands first, without a flag",
    ),
    ("target targets model samples", "TARGETS", "they stand first, without a flag"),
    ("reference dataset", "REFERENCE OUT", "they stand first, without a flag"),
    ("run run_dir model checkpoint", "RUN", "it stands first, without a flag"),
    ("output out out_dir outdir output_dir output_path", "OUT", "it stands second, without a flag"),
    (
        "image_size num_channels num_res_blocks num_heads num_head_channels channel_mult attention_resolutions learn_sigma class_cond",
        "--flags",
        "all of them as one text: see the help",
    ),
    (
        "num_inference_steps sampling_steps sampling_timesteps ddim_steps ddpm_num_inference_steps num_steps n_steps sample_steps",
        "--steps",
        "",
    ),
    ("sampler solver method sample_sampler", "--scheduler", ""),
    ("sampler solver scheduler", "--schedulers", ""),
    ("use_ddim", "--scheduler ddim", ""),
    ("timestep_respacing", "--steps or --sections", "steps is a number, sections are those of each equal part"),
    ("ddim_eta", "--eta", ""),
    ("clip_denoised clip_sample clip", "--clipping", ""),
    ("thresholding dynamic_thresholding", "--clipping dynamic", ""),
    ("cfg cfg_scale guidance classifier_scale", "--guidance_scale", "1 is off"),
    ("class classes class_label label labels", "--class_labels", ""),
    ("prompts_file prompt_file from_file captions caption", "--prompts", "a file with one prompt a line"),
    ("neg_prompt n_prompt uncond_prompt negative_prompts", "--negative_prompt", ""),
    ("ema use_ema", "--weights", "raw is without EMA"),
    ("fp16 bf16 half precision mixed_precision", "--dtype", ""),
    ("batch bs eval_batch_size", "--batch_size", "images of one process"),
    ("ref reference_path real fid_ref dataset data", "--reference", ""),
    ("num_fid_samples fid_samples max_images num_samples n_samples", "--num_images", ""),
    ("out outdir out_dir output_dir output_path", "--output", ""),
    ("image_size img_size", "--resolution", ""),
)  # fmt: skip

# Values that are typed for those of a field, where no spelling rule leads to them.
_VALUES: dict[str, dict[str, str]] = {
    "prediction_type": {
        "v": "v_prediction", "velocity": "v_prediction", "v_pred": "v_prediction", "pred_v": "v_prediction",
        "eps": "epsilon", "noise": "epsilon", "pred_noise": "epsilon",
        "x0": "sample", "pred_x0": "sample", "x_0": "sample", "x_start": "sample", "xstart": "sample", "x": "sample", "image": "sample",
        "rf": "flow", "rectified_flow": "flow", "flow_matching": "flow", "flow_prediction": "flow",
    },
    "noise_schedule": {"squaredcos_cap_v2": "cosine", "squaredcos": "cosine", "cos": "cosine"},
    "optimizer": {
        "adam": "adamw", "adamw_torch": "adamw", "adam8bit": "adamw8bit", "adam_8bit": "adamw8bit", "adamw_8bit": "adamw8bit",
        "adamw_bnb_8bit": "adamw8bit",
    },
    "lr_schedule": {"constant_with_warmup": "constant", "cos": "cosine", "none": "constant"},
    "weighting": {
        "none": "constant", "uniform": "constant", "simple": "constant", "mse": "constant", "l_simple": "constant",
        "min_snr_gamma": "min_snr", "truncated": "truncated_snr", "vlb": "variational", "kl": "variational",
        "debiased_estimation": "debiased", "debiased_estimation_loss": "debiased_kohya",
    },
    "timestep_sampler": {"lognormal": "log_normal", "logitnormal": "logit_normal", "none": "uniform"},
    "mixed_precision": {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "fp32": "no", "float32": "no", "none": "no"},
    "dtype": {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"},
    "scheduler": {
        "ddimscheduler": "ddim", "ddpmscheduler": "ddpm", "unipcmultistepscheduler": "unipc", "uni_pc": "unipc",
        "dpmsolvermultistepscheduler": "dpmsolver++", "dpm_solver": "dpmsolver", "dpm_solver++": "dpmsolver++",
        "dpm++": "dpmsolver++", "dpmpp_2m": "dpmsolver++", "dpm++_2m": "dpmsolver++", "dpmpp_2m_sde": "dpmsolver++sde",
        "heundiscretescheduler": "heun", "eulerdiscretescheduler": "euler", "euler_a": "euler_ancestral",
        "eulerancestraldiscretescheduler": "euler_ancestral", "flowmatcheulerdiscretescheduler": "flow_euler",
        "flowmatchheundiscretescheduler": "flow_heun",
    },
    "report_to": {"tb": "tensorboard", "no": "none", "comet": "comet_ml"},
    "clipping": {"none": "off", "no": "off", "thresholding": "dynamic"},
}  # fmt: skip
_VALUES["schedulers"] = _VALUES["scheduler"]

POSITIONS = {"model", "targets", "out", "run"}  # arguments without a flag, in any command

# Commands of whose flags others are told.
_COMMANDS = {"train.py": TrainConfig, "sample.py": SampleConfig, "eval.py score": ScoreConfig}

SIMILAR = 0.8  # difflib's ratio, from which on a word is a misspelling: a letter left out of five, or two swapped
VERY_SIMILAR = 0.9  # for names of others, which are many and may differ by a syllable


def fields_of(text: str) -> set[str]:
    """The fields whose flags a text names; `--config` and `--resume` of train.py are none."""
    return set(re.findall(r"--(?:no_)?(\w+)", text)) - {"config", "resume"}


def suggestion(typed: str, kind: Any) -> str:
    """What to write for a flag that a command does not have: the end of a sentence, or "".

    Args:
        typed: the name, without dashes.
        kind: the dataclass of the command's flags.
    """
    known, name = field_types(kind), typed.lower().replace("-", "_")
    rows = {alias: row for *row, names in _rows(known) for alias in names}
    if name not in rows:
        for command, other in _COMMANDS.items():
            if name in field_types(other) and name not in POSITIONS:
                return f"that is a flag of {command}"
        own = {"config", "resume"} if kind is TrainConfig else set()
        flags = difflib.get_close_matches(name, own | known.keys() - POSITIONS, n=1, cutoff=SIMILAR)
        begins, ends = len(name) >= 3, len(name) >= 5  # that a flag ends with "size" or "rate" says nothing
        flags = flags or [flag for flag in known if (begins and flag.startswith(name)) or (ends and flag.endswith(f"_{name}"))]
        if 1 <= len(flags) <= 3:
            return f"did you mean {' or '.join(f'--{flag}' for flag in flags)}?"
        name = next(iter(difflib.get_close_matches(name, rows, n=1, cutoff=VERY_SIMILAR)), name)
    meant, differs = rows.get(name, ("", ""))
    return f"did you mean {meant}?{f' ({differs})' if differs else ''}" if meant else differs


def _rows(known: Container[str]) -> Iterator[tuple[str, str, list[str]]]:
    """The rows for a command, those that count first at the end, with their names apart."""
    for names, meant, differs in reversed(_ROWS):
        positions = {name.lower() for name in re.findall(r"\b[A-Z]+\b", meant)}
        if all(field in known for field in fields_of(f"{meant} {differs}") | positions):
            yield meant, differs, names.split()


def value_suggestion(field: str, typed: str, choices: Iterable[str]) -> str:
    """The choice of a field that was meant: its name, or "" where none is similar."""
    choices, name = list(choices), typed.strip().lower().replace("-", "_").replace(" ", "_")
    plain = {choice.replace("-", "_"): choice for choice in choices}
    found = _VALUES.get(field, {}).get(name) or plain.get(name)
    if not found:  # other digits are another value: float64 is not float16
        same = [choice for choice in plain if re.findall(r"\d", choice) == re.findall(r"\d", name)]
        found = next((plain[near] for near in difflib.get_close_matches(name, same, n=1, cutoff=SIMILAR)), None)
    return found if found in choices else ""


def typed_suggestion(flag: str, typed: Sequence[str], hint: Any) -> str:
    """How to type values that cannot be read: a list with commas, as guided-diffusion writes it, or a whole number such as 1e5; or ""."""
    types = {hint, *get_args(hint)}
    if any(get_origin(one) is tuple for one in types):
        return f"; separate the values by spaces: {flag} {' '.join(_parts(typed))}" if "," in "".join(typed) else ""
    return whole_number(typed[0]) if int in types and len(typed) == 1 else ""


def written_suggestion(name: str, value: Any, hint: Any) -> str:
    """The same for the value of a field in a configuration file, which may also be another word for one of its choices."""
    types = {hint, *get_args(hint)}
    if any(get_origin(one) is tuple for one in types):
        return f"; write [{', '.join(_parts([value]))}]" if isinstance(value, str) and "," in value else ""
    choices = [choice for one in types if get_origin(one) is Literal for choice in get_args(one)]
    if choices:
        near = value_suggestion(name, value, choices) if isinstance(value, str) else ""
        return f"; did you mean {near}?" if near else ""
    return whole_number(value) if int in types and isinstance(value, str | float) else ""


def whole_number(value: str | float) -> str:
    """The end of a sentence about a whole number that is written as 1e5; "" where it is none."""
    with contextlib.suppress(ValueError, OverflowError):
        if float(value).is_integer():
            return f"; did you mean {int(float(value))}?"
    return ""


def _parts(typed: Sequence[str]) -> list[str]:
    return [part for text in typed for part in re.split(r"[\[\](), ]+", text) if part]
