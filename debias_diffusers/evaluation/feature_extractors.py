"""Networks whose features compare images: classifiers of the embedded data sets, and those of torch-fidelity; images with prompts.

An extractor takes images as bytes, (B, 3, H, W) uint8, and resizes them itself, as its weights were meant to be used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_clip import MODEL_METADATA
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from ..config.registry import METRICS
from ..config.schema.data import DIGITS, EMBEDDED, EMOJI
from ..data.captions import DIGIT_NAMES
from ..errors import InputError, reason, shortened
from ..utils import text_libraries
from ..utils.files import read_file

INCEPTION = "inception-v3-compat"
SPATIAL = "spatial"  # the layer of sFID
DIGITS_SIDE, EMOJI_SIDE = 8, 16


class Classifier(nn.Module):
    """A small network, `body`, whose features compare sets of images, and the classes that it learned, `head`."""

    body: nn.Sequential
    head: nn.Linear

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) float in 0 .. 255 to (B, 64) features and (B, classes) logits."""
        features = self.body(images / 127.5 - 1)
        return features, self.head(features)


class DigitsClassifier(Classifier):
    """A small network that tells grey 8x8 digits apart; trained by `tools/train_digits_classifier.py`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(32 * DIGITS_SIDE**2 // 4, 64),
            nn.GELU(),
        )
        self.head = nn.Linear(64, 10)


class EmojiClassifier(Classifier):
    """A small network that tells the categories of 16x16 emoji apart; trained by `tools/train_emoji_classifier.py`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * EMOJI_SIDE**2 // 16, 64),
            nn.GELU(),
        )
        self.head = nn.Linear(64, 9)


class FeatureExtractorDigits(FeatureExtractorBase):
    """The digits' classifier as torch-fidelity takes it. Images of another size are resized (bilinear, antialiased)."""

    side, grey = DIGITS_SIDE, True
    classifier: type[Classifier] = DigitsClassifier

    def __init__(self, name: str, features_list: Sequence[str], feature_extractor_weights_path: str | None = None, **_: Any) -> None:
        super().__init__(name, features_list)
        self.network = self.classifier()
        packaged = resources.files(__package__).joinpath(f"{name}_classifier.safetensors")
        data = Path(feature_extractor_weights_path).read_bytes() if feature_extractor_weights_path else packaged.read_bytes()
        self.network.load_state_dict(safetensors.torch.load(data))
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) uint8 to the layers asked for; for the digits, colours are averaged."""
        pixels = images.float().mean(1, keepdim=True) if self.grey else images.float()
        if pixels.shape[-2:] != (self.side, self.side):
            pixels = nn.functional.interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=True)
        found = dict(zip(self.get_provided_features_list(), self.network(pixels)))
        return tuple(found[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names of the layers."""
        return ("64", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Which layer a metric compares."""
        return "logits" if metric == "isc" else "64"

    @staticmethod
    def can_be_compiled() -> bool:
        """Whether torch.compile may be tried."""
        return True

    @classmethod
    def get_dummy_input_for_compile(cls) -> Tensor:
        """An image of the right kind."""
        return torch.zeros(1, 3, cls.side, cls.side, dtype=torch.uint8)


class FeatureExtractorEmoji(FeatureExtractorDigits):
    """The same of the emoji's classifier, in colour."""

    side, classifier, grey = EMOJI_SIDE, EmojiClassifier, False


class FeatureExtractorInceptionSpatial(FeatureExtractorInceptionV3):
    """Inception-v3 with the layer of sFID (arXiv 2103.03841): the first seven channels of `mixed_6/conv`, 17 x 17 places each.

    In TensorFlow's graph that is the first branch of the sixth mixed block, here `Mixed_6d.branch1x1`.
    """

    def __init__(self, name: str, features_list: Sequence[str], **options: Any) -> None:
        super().__init__(name, list(features_list), **options)
        self._seen: Tensor | None = None
        self.Mixed_6d.branch1x1.register_forward_hook(self._look)

    def _look(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self._seen = output[:, :7].permute(0, 2, 3, 1).flatten(1).float()  # in TensorFlow's order, as in its statistics

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) uint8 to the layers asked for."""
        wanted: list[str] = list(self.get_requested_features_list())
        self.features_list = [name for name in wanted if name != SPATIAL] or ["2048"]
        try:
            found = dict(zip(self.features_list, super().forward(images)))
        finally:
            self.features_list = wanted
        assert self._seen is not None
        return tuple(self._seen if name == SPATIAL else found[name] for name in wanted)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names of the layers."""
        return (*FeatureExtractorInceptionV3.get_provided_features_list(), SPATIAL)


# The table of extractors is torch-fidelity's; these are ours.
SPATIAL_INCEPTION = f"{INCEPTION}-{SPATIAL}"  # as which INCEPTION is loaded where its spatial layer is wanted
OURS = {DIGITS: FeatureExtractorDigits, EMOJI: FeatureExtractorEmoji, SPATIAL_INCEPTION: FeatureExtractorInceptionSpatial}
for _name, _kind in OURS.items():
    if _name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(_name, _kind)


class Extractor:
    """A network, the layers of it that some metrics compare, and what identifies its weights."""

    def __init__(self, name: str, metrics: Sequence[str], weights: str | None = None) -> None:
        """Loads the network.

        Args:
            name: `digits`, `emoji`, or a name of torch-fidelity.
            metrics: those of `registry.METRICS` that compare its features.
            weights: its weight file, where it is not packaged or fetched.

        Raises:
            InputError: there is no such extractor or layer, or its weights cannot be had.
        """
        if name not in names():
            raise InputError(f"feature_extractor is {name}, which is not known; take one of {', '.join(names())}")
        specs = {metric: METRICS[metric] for metric in metrics}
        for metric, spec in specs.items():
            if spec.extractor not in (None, name):
                raise InputError(
                    f"metric {metric} is of {spec.extractor}, but feature_extractor is {name}; leave {metric} out or take the other"
                )
        kind = SPATIAL_INCEPTION if any(spec.layer == SPATIAL for spec in specs.values()) else name
        default = FEATURE_EXTRACTORS_REGISTRY[kind].get_default_feature_layer_for_metric
        self.name = name
        self.layers: dict[str, str] = {metric: spec.layer or default(spec.layer_of) for metric, spec in specs.items()}
        self.network = _load(kind, sorted(set(self.layers.values())), weights)
        self.weights_sha256 = _fingerprint(self.network)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) uint8 on the network's device to (B, D) float32 features on the CPU for each layer."""
        with torch.inference_mode():
            return {name: value.float().cpu() for name, value in zip(self.network.features_list, self.network(images))}


# ---- images with their prompts ---------------------------------------------------------------------------------------


class PromptScorer(Protocol):
    """How well images fit their prompts."""

    weights_sha256: str
    key: str  # of all that its figures depend on

    def check(self, prompts: Sequence[str]) -> None:
        """Raises InputError for prompts that it cannot judge."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) uint8 on the network's device and B prompts to (B, 1) float32 on the CPU."""


def prompt_scorer(metric: str, clip_model: str | None, device: Any) -> PromptScorer:
    """The network of a metric of images and prompts, on a device."""
    return PromptAccuracy(device) if metric == "prompt_accuracy" else ClipScore(clip_model or "", device)


_DIGIT = re.compile(rf"\b({'|'.join(DIGIT_NAMES)}|[0-9])\b", re.IGNORECASE)


class PromptAccuracy:
    """1 where the packaged classifier of the digits sees the digit that the prompt names, as a word or as a figure; else 0."""

    def __init__(self, device: Any) -> None:
        self.network = FeatureExtractorDigits(DIGITS, ["logits"]).to(device)
        self.weights_sha256 = self.key = _fingerprint(self.network)

    def check(self, prompts: Sequence[str]) -> None:
        """Raises InputError for prompts that name no digit, or several."""
        if wrong := [prompt for prompt in prompts if _digit(prompt) is None]:
            raise InputError(
                f"metric prompt_accuracy is for prompts that name one digit, such as 'a handwritten seven', but {len(wrong)} of "
                f"{len(prompts)} do not, such as {shortened(wrong[0])[:60]!r}; leave it out"
            )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.inference_mode():
            seen = self.network(images)[0].argmax(1).cpu()
        named = torch.tensor([-1 if (digit := _digit(prompt)) is None else digit for prompt in prompts])
        met: Tensor = seen == named
        return met.float()[:, None]


def _digit(prompt: str) -> int | None:
    """The digit that a prompt names; None if it names none, or several."""
    words = {word.lower() for word in _DIGIT.findall(prompt)}
    found = {int(word) if word.isdecimal() else DIGIT_NAMES.index(word) for word in words}
    return found.pop() if len(found) == 1 else None


class ClipScore:
    """max(100 cos, 0) of the embeddings of image and prompt (arXiv 2104.08718) by a CLIPModel of transformers."""

    def __init__(self, model: str, device: Any) -> None:
        """Loads it from a folder, or from the cache by the name of its repository.

        Raises:
            InputError: transformers is not installed, or there is no such model here.
        """
        text_libraries.require()
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        try:
            network, found = CLIPModel.from_pretrained(model, local_files_only=True, use_safetensors=True, output_loading_info=True)
            if found["missing_keys"]:  # which transformers would make random
                raise ValueError(f"its weights lack {sorted(found['missing_keys'])[0]}")
            self.network = network.float().eval().to(device)
            self.tokenizer = CLIPTokenizer.from_pretrained(model, local_files_only=True)
            self.processor = CLIPImageProcessor.from_pretrained(model, local_files_only=True)
        except Exception as error:  # a damaged or hostile file may provoke any
            raise InputError(
                f"clip_model {model} cannot be loaded: {reason(error)}; name a folder with a CLIPModel of transformers in safetensors, its "
                f"tokenizer and its preprocessor_config.json, or a repository that is in the cache (hf download NAME)"
            ) from error
        self.weights_sha256 = _fingerprint(self.network)
        files = (self.network.config.to_json_string(), self.processor.to_json_string(), repr(sorted(self.tokenizer.get_vocab().items())))
        self.key = hashlib.sha256("\n".join((self.weights_sha256, *files)).encode()).hexdigest()

    def check(self, prompts: Sequence[str]) -> None:
        """Any prompt will do; of a long one the beginning is read."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        most = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=most, return_tensors="pt")
        pixels = self.processor(images=[image.permute(1, 2, 0).cpu().numpy() for image in images], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            found = self.network(**tokens.to(self.network.device), pixel_values=pixels.to(self.network.device))
            cosine: Tensor = nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        return (100 * cosine).clamp(min=0).float().cpu()[:, None]


# ---- loading ---------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """Extractors that can be asked for."""
    return [*EMBEDDED, *sorted(name for name in FEATURE_EXTRACTORS_REGISTRY if name not in (*EMBEDDED, SPATIAL_INCEPTION))]


def _load(kind: str, layers: list[str], weights: str | None) -> Any:
    if weights and not Path(weights).exists():
        raise InputError(f"feature_extractor_weights {weights} does not exist; name a file of weights")
    try:
        with _harmless(kind, weights) as path:
            return FEATURE_EXTRACTORS_REGISTRY[kind](kind, layers, feature_extractor_weights_path=path, verbose=False)
    except InputError:
        raise
    except NotImplementedError:
        raise InputError(f"feature_extractor_weights is {weights}, but {kind} fetches its own only; leave it out") from None
    except Exception as error:  # of the network, a missing file, or a file of another network
        name = kind.removesuffix(f"-{SPATIAL}")
        source = f" ({URL_INCEPTION_V3})" if name == INCEPTION else ""
        if weights:
            raise InputError(f"feature_extractor_weights {weights} are no weights of {name}: {reason(error)}") from error
        raise InputError(
            f"the weights of {name} cannot be fetched: {reason(error)}; download them{source} and name the file with "
            f"--feature_extractor_weights, or take --feature_extractor {DIGITS}, or --metrics colour, which needs none"
        ) from error


@contextlib.contextmanager
def _harmless(kind: str, weights: str | None) -> Iterator[str | None]:
    """A copy of a weight file that holds tensors only: torch-fidelity would run what else a file holds, a fetched one's, too.

    Weights of CLIP are programs of TorchScript, so the original ones alone are taken.
    """
    if kind.startswith("clip"):
        _require_original(kind, weights)
        yield weights
        return
    if weights is None or kind in EMBEDDED:
        with _tensors_only():
            yield weights
        return
    try:
        data = safetensors.torch.load_file(weights) if weights.endswith(".safetensors") else torch.load(weights, weights_only=True)
    except Exception as error:  # a damaged or hostile file may provoke any
        raise InputError(
            f"feature_extractor_weights {weights} is damaged, or holds more than tensors; give a .safetensors file, or a "
            f"state dict that was saved alone"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(data, path)
        yield str(path)


def _require_original(kind: str, weights: str | None) -> None:
    """Raises InputError where a file of CLIP's weights, given or fetched before, is not the one that OpenAI published."""
    sha256 = MODEL_METADATA[kind]["hash"]
    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / f"{kind}-{sha256}.pt"
    if (weights or path.exists()) and hashlib.sha256(read_file(path)).hexdigest() != sha256:
        advice = "leave it out, and they are fetched" if weights else "remove it, and they are fetched again"
        raise InputError(f"{path} is not the file of {kind} that OpenAI published, and others may hold any program; {advice}")


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """torch refuses files that hold more than tensors, whatever its caller asks for and the user has set."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update(before)


def _fingerprint(network: nn.Module) -> str:
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    return hashlib.sha256(safetensors.torch.save(state)).hexdigest()
