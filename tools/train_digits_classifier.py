"""Trains the classifier whose features compare sets of digits, `debias_diffusers/evaluation/digits_classifier.safetensors`.

    python tools/train_digits_classifier.py

Four of five of the embedded digits are learned, each moved by up to a pixel and blurred with noise in every epoch; every fifth
is kept to see how many are told right. About a minute on one core, always with the same result on the same machine.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.data.images import decode, to_array
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.evaluation.feature_extractors import Classifier, DigitsClassifier

FOLDER = Path(__file__).parent.parent / "debias_diffusers" / "evaluation"
EPOCHS, BATCH, NOISE = 60, 64, 20.0  # noise in grey levels of 255


def embedded(name: str, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of an embedded data set, (N, C, side, side) float in 0 .. 255, and their labels."""
    source = open_source(DataConfig(dataset=name, resolution=side, class_conditional=True))
    read = [source.read(k) for k in range(len(source))]
    images = torch.stack([torch.from_numpy(to_array(decode(data, name))) for data, _, name in read]).float()
    return images, torch.tensor([label for _, label, _ in read])


def varied(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each moved by up to a pixel, with noise of a random strength."""
    shifts = torch.randint(0, 3, (len(images), 2), generator=generator)
    padded = F.pad(images, (1, 1, 1, 1))
    moved = torch.stack([image[:, y : y + 8, x : x + 8] for image, (x, y) in zip(padded, shifts.tolist())])
    strength = NOISE * torch.rand(len(images), 1, 1, 1, generator=generator)
    return (moved + strength * torch.randn(moved.shape, generator=generator)).clamp(0, 255)


def train(name: str, side: int, kind: type[Classifier], varied: Callable[..., torch.Tensor], weight_decay: float) -> None:
    """Trains a classifier of an embedded data set, says the accuracy on the images that were kept, and writes the weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images, labels = embedded(name, side)
    kept = torch.arange(len(images)) % 5 == 0
    network = kind()
    steps = EPOCHS * ((~kept).sum().item() // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(EPOCHS):
        order = torch.arange(len(images))[~kept][torch.randperm((~kept).sum().item(), generator=generator)]
        for batch in order.split(BATCH)[: steps // EPOCHS]:
            optimizer.zero_grad()
            _, logits = network(varied(images[batch], generator))
            F.cross_entropy(logits, labels[batch], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right = (network.eval()(images[kept])[1].argmax(1) == labels[kept]).float().mean()
    weights = FOLDER / f"{name}_classifier.safetensors"
    save_file(network.state_dict(), weights)
    weights.chmod(0o644)
    print(f"{right:.1%} of {kept.sum()} {name} that were not learned are told right; {weights}")


if __name__ == "__main__":
    train("digits", 8, DigitsClassifier, varied, weight_decay=1e-2)
