"""Image writer: a folder of samples (PNG, WebP or one `.npz`), its settings, and threads that encode and write."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import zipfile
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config.schema.types import ImageFormat
from ..data import images
from ..data.image_folders import GRID, METADATA, PACKED, PARTS, SETTINGS, TRAJECTORY
from ..data.labels import row_names
from ..errors import InputError
from ..utils.files import atomic_write, read_file, read_json, remove, remove_temporary_files, translate_write_errors, user_files, write_file

GRID_IMAGES, GRID_CLASSES, GRID_COLUMNS = 100, 20, 20  # at most
OWN_NAME = re.compile(r"([0-9]{6}|[1-9][0-9]{6,})\.(png|webp)")  # of the images
ELSEWHERE = "name another --output_dir, or replace its images with --overwrite"
PNG_END = b"IEND\xaeB`\x82"
WRITER_THREADS = min(8, os.cpu_count() or 1)  # threads that encode; more would compete with sampling for the interpreter lock
MAX_PENDING_BATCHES = 2  # batches that wait to be written before sampling waits for them

ENCODERS: dict[ImageFormat, tuple[str, Callable[[Image.Image], bytes]]] = {
    "png": (".png", images.png),
    "webp": (".webp", images.webp),
    "npz": (".png", images.png),
}


class SampleFolder:
    """A folder with the images 0 .. num_images - 1, as files or, when all are sampled, one `.npz`."""

    def __init__(self, folder: Path, kind: ImageFormat, num_images: int) -> None:
        self.folder = folder
        self.kind = kind
        self.num_images = num_images
        self.files = folder / PARTS if kind == "npz" else folder
        self.suffix, self._encoded = ENCODERS[kind]

    def name(self, k: int) -> str:
        """The file name of image k."""
        return f"{k:06d}{self.suffix}"

    def beside(self, more: str) -> SampleFolder:
        """A folder for as many images with `more` in its name."""
        return SampleFolder(self.folder.with_name(f"{self.folder.name}-{more}"), self.kind, self.num_images)

    def begin(self, settings: dict[str, Any], overwrite: bool = False) -> list[int]:
        """Prepares the folder for images with these settings and returns the indices of missing images. Call it in one process only.

        With `overwrite`, images with other settings are removed first, and those beyond `num_images`.

        Raises:
            InputError: the folder has other pictures; or, without `overwrite`, images with other settings, or more images.
        """
        remove_temporary_files(self.folder)
        remove_temporary_files(self.files)
        if others := self._other_pictures():
            raise InputError(f"output_dir {self.folder} holds other pictures, such as {others[0]}; name another --output_dir")
        other = self.other_content(settings)
        if other and not overwrite:
            raise InputError(f"output_dir {self.folder} holds {other}; {ELSEWHERE}")
        if other:
            self._remove_images()
        if other or not (self.folder / SETTINGS).exists():
            # After the images: a kill between the two leaves none that these settings do not describe.
            write_file(self.folder / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())
        if self._is_packed():
            return []
        if (beyond := self.beyond()) and not overwrite:
            raise InputError(f"output_dir {self.folder} holds more than {self.num_images} images, such as {beyond[0].name}; {ELSEWHERE}")
        with translate_write_errors(self.folder):
            for path in beyond:
                remove(path)
        found = {p.name: p for p in self.files.glob(f"*{self.suffix}")}
        return [k for k in range(self.num_images) if (name := self.name(k)) not in found or not is_complete(found[name])]

    def _other_pictures(self) -> list[str]:
        """Pictures of any format that `sample.py` did not name: who reads the folder as a data set would take them for samples."""
        there = {path.name for folder in (self.folder, self.files) for path in folder.glob("*") if path.suffix.lower() in images.EXTENSIONS}
        return sorted(name for name in there if not OWN_NAME.fullmatch(name))

    def beyond(self) -> list[Path]:
        """The images with numbers from `num_images` on."""
        numbered = (p for p in self.files.glob(f"*{self.suffix}") if OWN_NAME.fullmatch(p.name))
        return sorted(p for p in numbered if int(p.stem) >= self.num_images)

    def other_content(self, settings: dict[str, Any]) -> str | None:
        """What the folder holds if it holds images that have, or may have, other settings than these."""
        if not (self.folder / SETTINGS).exists():
            return None
        before = read_json(self.folder / SETTINGS)
        if not isinstance(before, dict) or not before:
            return f"images of unknown settings ({SETTINGS} is damaged)"
        if before.get("seed") and "seed_factor" not in before:
            formulas = "seed + k and not from seed * 2654435761 + k"
            return f"images of seed {before['seed']} by an older version, which drew image k from {formulas}"
        changed = _differences(before, settings)
        return f"images of other settings ({'; '.join(changed)})" if changed else None

    def _remove_images(self) -> None:
        """Removes what `sample.py` wrote, of any format, but for the settings. Other files stay."""
        numbered = [p for folder in (self.folder, self.folder / PARTS) for p in folder.glob("*") if OWN_NAME.fullmatch(p.name)]
        with translate_write_errors(self.folder):
            for path in (*numbered, *(self.folder / name for name in (METADATA, PACKED, GRID, TRAJECTORY))):
                remove(path)
        with contextlib.suppress(OSError):  # not there, or with other files
            (self.folder / PARTS).rmdir()

    def _is_packed(self) -> bool:
        """Whether a complete `.npz` exists. Removes a damaged one, or the leftover parts of a complete one."""
        packed = self.folder / PACKED
        if not packed.exists():
            return False
        with translate_write_errors(self.folder):
            if not is_complete(packed):
                packed.unlink()
                return False
            remove(self.files)
        return True

    def write(self, k: int, array: np.ndarray) -> None:
        """Writes image k, (C, H, W) uint8, atomically but without fsync: after a power cut `begin` finds damaged files."""
        write_file(self.files / self.name(k), self._encoded(images.from_array(array)), fsync=False)

    def read(self, k: int) -> Image.Image:
        """Reads image k.

        Raises:
            InputError: it is missing or damaged.
        """
        path = self.files / self.name(k)
        return images.decode(read_file(path), str(path))

    def finish(
        self,
        labels: Sequence[int] | None,
        seeds: Sequence[int],
        class_names: Sequence[str] | None = None,
        prompts: Sequence[str] | None = None,
        loras: Sequence[str] = (),
    ) -> None:
        """Writes the grid, and metadata.jsonl or the `.npz` file, which make the folder a data set.

        Args:
            labels: of all images; None for a model without classes.
            seeds: of the generators of all images.
            class_names: by label, for the grid; None if unknown.
            prompts: of all images of a text-to-image model.
            loras: with which all images are drawn, as NAME:STRENGTH.
        """
        if (self.folder / PACKED).exists():
            return
        grid = self._prompts_grid(prompts) if prompts else self._grid(labels or [], class_names)
        write_file(self.folder / GRID, images.png(grid))
        if self.kind == "npz":
            self._pack(labels)
            return
        rows = [
            {
                "file_name": self.name(k),
                **({"label": labels[k]} if labels else {}),
                **({"text": prompts[k]} if prompts else {}),
                **({"lora": " ".join(loras)} if loras else {}),
                "seed": seeds[k],
            }
            for k in range(self.num_images)
        ]
        write_file(self.folder / METADATA, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def _grid(self, labels: Sequence[int], class_names: Sequence[str] | None) -> Image.Image:
        """The first images; of several classes the first images of each, a class a row with its name."""
        if len(classes := sorted(set(labels))[:GRID_CLASSES]) < 2:
            return images.grid([self.read(k) for k in range(min(self.num_images, GRID_IMAGES))])
        columns = min(GRID_COLUMNS, GRID_IMAGES // len(classes))
        rows = [[k for k, label in enumerate(labels) if label == each][:columns] for each in classes]
        return images.named_grid(row_names(classes, class_names), [[self.read(k) for k in row] for row in rows])

    def _prompts_grid(self, prompts: Sequence[str]) -> Image.Image:
        """The first images, each above its prompt; where a few prompts have several images each, a prompt a row, with its text beside."""
        of_each = {prompt: [k for k, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts[:GRID_IMAGES])}
        if len(of_each) == 1:
            (group,) = of_each.values()
            shown = [self.read(k) for k in group[:GRID_IMAGES]]
            return images.captioned_rows(prompts[:1], [shown], math.ceil(math.sqrt(len(shown))))
        if len(of_each) > GRID_CLASSES or min(map(len, of_each.values())) < 2:
            return images.captioned_grid(prompts[:GRID_IMAGES], [self.read(k) for k in range(min(self.num_images, GRID_IMAGES))])
        columns = min(GRID_COLUMNS, GRID_IMAGES // len(of_each))
        return images.captioned_rows([*of_each], [[self.read(k) for k in group[:columns]] for group in of_each.values()], columns)

    def _pack(self, labels: Sequence[int] | None) -> None:
        """Writes `arr_0` (N, H, W, C) uint8 and `arr_1` (N,) int64 labels, with one image in memory at a time."""
        first = _channels_last(self.read(0))
        with atomic_write(self.folder / PACKED) as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (self.num_images, *first.shape)}
                np.lib.format.write_array_header_1_0(member, header)
                for k in range(self.num_images):
                    member.write(_channels_last(self.read(k)).tobytes())
            if labels:
                with archive.open("arr_1.npy", "w") as member:
                    np.lib.format.write_array(member, np.asarray(labels, dtype=np.int64))
        with translate_write_errors(self.files):
            remove(self.files)


# They say whose hash it is, which alone is compared, or follow from other settings.
_TOLD_OTHERWISE = ("model_sha256", "model_step", "weights", "seed_factor", "prompts_sha256")


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How settings of `.sampling.json` differ, in words."""
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    words = [f"{name} was {before.get(name)}, now {now.get(name)}" for name in changed if name not in _TOLD_OTHERWISE]
    words += ["the prompts were others"] if "prompts_sha256" in changed else []
    if "format" in changed:
        words = [word for word in words if not word.startswith("num_images ")]  # of an npz only
    if "model_sha256" not in changed:
        return words
    labels = {"weights": "weights was", "model_step": "the model was at step"}
    about = [
        f"{label} {before[name]}, now {now[name]}" for name, label in labels.items() if name in changed and before.get(name) and now[name]
    ]
    return words + (about or ["the model was another, or at another step"])


def is_complete(path: Path) -> bool:
    """Whether the end of a file is valid for its format. Does not decode, because a folder may have many files."""
    if path.suffix == ".npz":
        try:
            with zipfile.ZipFile(path) as archive:
                return "arr_0.npy" in archive.namelist()
        except (OSError, zipfile.BadZipFile):
            return False
    with open(path, "rb") as file:
        head = file.read(8)
        size = file.seek(0, 2)
        if path.suffix == ".webp":
            return size == 8 + int.from_bytes(head[4:8], "little")
        file.seek(max(0, size - 8))
        return file.read() == PNG_END


def require_sample_folder(folder: Path) -> None:
    """Raises InputError if a folder has other files, or is not a folder. Writes nothing."""
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        kind = "a file" if folder.exists() else "a link to nowhere"
        raise InputError(f"output_dir {folder} is {kind}; name a new or empty folder")
    if folder.is_dir():
        there = user_files(folder)
        if there and SETTINGS not in there:
            raise InputError(f"output_dir {folder} holds other files, such as {there[0]}; name a new or empty folder")


def _channels_last(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


class ImageWriter:
    """Encodes and writes batches of images in background threads. Errors are raised by a later call or at the end."""

    def __init__(self, samples: SampleFolder) -> None:
        self.samples = samples
        self._pool = ThreadPoolExecutor(max_workers=WRITER_THREADS)
        self._waiting: deque[list[Future[None]]] = deque()

    def __enter__(self) -> ImageWriter:
        return self

    def put(self, indices: Sequence[int], batch: Any) -> None:
        """Queues images (B, C, H, W) uint8, a tensor on any device, and their B indices."""
        fetched = self._pool.submit(lambda: batch.cpu().numpy())
        self._waiting.append([self._pool.submit(self._write, k, fetched, place) for place, k in enumerate(indices)])
        while len(self._waiting) > MAX_PENDING_BATCHES:
            self._wait_for_the_oldest()

    def _write(self, k: int, fetched: Future[np.ndarray], place: int) -> None:
        self.samples.write(k, fetched.result()[place])

    def _wait_for_the_oldest(self) -> None:
        for done in self._waiting.popleft():
            done.result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is not None:
            return
        while self._waiting:
            self._wait_for_the_oldest()
        os.sync()  # once for all images: an fsync of each takes longer than encoding it
