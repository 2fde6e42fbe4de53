"""Trains the classifier whose features compare sets of emoji, `debias_diffusers/evaluation/emoji_classifier.safetensors`.

    python tools/train_emoji_classifier.py

Learns the nine categories of four of five of the embedded emoji, each moved by up to two pixels, mirrored, and blurred with noise;
every fifth is kept to see how many are told right. About three minutes on one core, always with the same result on the same machine.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from debias_diffusers.config.schema import DataConfig
from debias_diffusers.data.images import decode, to_array
from debias_diffusers.data.sources import open_source
from debias_diffusers.evaluation.feature_extractors import EmojiClassifier

WEIGHTS = Path(__file__).parent.parent / "debias_diffusers" / "evaluation" / "emoji_classifier.safetensors"
EPOCHS, BATCH = 60, 64
MOVED, NOISE = 2, 20.0  # pixels, and grey levels of 255


def emoji() -> tuple[torch.Tensor, torch.Tensor]:
    """All emoji, (1906, 3, 16, 16) float in 0 .. 255, and the numbers of their categories."""
    source = open_source(DataConfig(dataset="emoji", resolution=16, class_conditional=True))
    read = [source.read(k) for k in range(len(source))]
    images = torch.stack([torch.from_numpy(to_array(decode(data, name))) for data, _, name in read]).float()
    return images, torch.tensor([label for _, label, _ in read])


def varied(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each moved by up to two pixels on white, mirrored or not, with noise of a random strength."""
    side, places = images.shape[-1], torch.randint(0, 2 * MOVED + 1, (len(images), 2), generator=generator)
    padded = F.pad(images, (MOVED,) * 4, value=255)
    moved = torch.stack([image[:, y : y + side, x : x + side] for image, (x, y) in zip(padded, places.tolist())])
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    strength = NOISE * torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = strength * torch.randn(moved.shape, generator=generator)
    return (torch.where(mirrored, moved.flip(-1), moved) + noise).clamp(0, 255)


def main() -> None:
    """Trains, says the accuracy on the emoji that were kept, and writes the weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images, labels = emoji()
    kept = torch.arange(len(images)) % 5 == 0
    network = EmojiClassifier()
    steps = EPOCHS * ((~kept).sum().item() // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=5e-2)
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
    save_file(network.state_dict(), WEIGHTS)
    WEIGHTS.chmod(0o644)
    print(f"{right:.1%} of {kept.sum()} emoji that were not learned are told right; {WEIGHTS}")


if __name__ == "__main__":
    main()
