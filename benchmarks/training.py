"""How fast a training is, where its time goes, and how near it comes to what the machine's convolutions and matrix products give.

    python benchmarks/training.py                                  # on CPUs cases a and b, on an accelerator b and c too
    python benchmarks/training.py --cases b --rounds 5 --json training.json
    python benchmarks/training.py --cases b --variants float32 "float32 other layout" --variant "often=--checkpoint_every 5"
    python benchmarks/training.py --cases c --rounds 1 --variants "bf16 compiled" --trace traces      # kernels by the time that they take

Case a is the digits' network at its batch of 64; b is 32x32 with 64 channels x (1, 2, 2, 2), 7 632 262 parameters, batch 16; c is
CelebA-HQ at 256x256, 93 563 910 parameters, batch 8, on an accelerator only. Images are made up: their content costs nothing.

`baseline` is a plain float32 loop in the manner of the paper's code: AdamW parameter by parameter, averages parameter by parameter,
the loss read in each step; on a GPU with TF32 in convolutions only, as torch has it, and once more without any and with all TF32.
The others are `train.py` with some flags. Each runs in a process of its own, forked from one that has imported what it needs, all in
turn, `--rounds` times, so that what else the machine does falls on all alike; a table has the medians. "first step s" counts from
there: without imports, with compilation.

ms per step are split into data (waiting for the loader), forward, backward, update (norm, clipping, optimizer, averages), logging and
the rest; on an accelerator in a shorter run of its own that waits for the device after each part, so that they add up to more than a
step. `checkpoint` is what the saves take of the loop's own time, in seconds: usually one, the last, which is waited for. FLOPs are
counted, forward and backward; "of best" is their rate as a share of what the network's own convolutions and products reach one by one,
in the same precision and in the memory layout that is best for each; on an accelerator by the time of their kernels alone.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

UNET_32 = "--resolution 32 --model_channels 64 --channel_mult 1 2 2 2 --layers_per_block 1 --attention_resolutions 16"
PAPER = "--resblock_updown --resnet_time_scale_shift scale_shift --learn_sigma"
CASES = {
    "a": "--dataset digits",
    "b": f"--dataset IMAGES/32 {UNET_32} {PAPER} --batch_size 16",
    "c": "--config celebahq256 --dataset IMAGES/256",
}
WARM = {"a": 30}  # at least so many steps before those that count: an epoch, in which images are decoded
USUAL = "--lr_schedule constant --warmup_steps 0 --sample_every 0 --checkpoint_every 0 --ema_decay 0.9999 --max_grad_norm 1"
VARIANTS = {
    "float32": "--mixed_precision no",
    "bf16": "--mixed_precision bf16",
    "float32 compiled": "--mixed_precision no --compile",
    "bf16 compiled": "--mixed_precision bf16 --compile",
    "bf16 CUDA graphs": "--mixed_precision bf16 --compile --compile_mode reduce-overhead",
    "bf16 recomputed": "--mixed_precision bf16 --gradient_checkpointing",
    "bf16 three averages": "--mixed_precision bf16 --ema_decay 0.999 0.9999 0.99999",
    # Not as the machine's rule has it (machine.memory_format), to see whether the rule is right.
    "float32 other layout": "--mixed_precision no OTHER_LAYOUT",
    "bf16 other layout": "--mixed_precision bf16 OTHER_LAYOUT",
}
BASELINE = "baseline"
BASELINES_ON_A_GPU = {"baseline without TF32": "NO_TF32", "baseline with all TF32": "ALL_TF32"}
WORDS = ("OTHER_LAYOUT", "NO_TF32", "ALL_TF32", "NO_SAVE")  # among the flags of a variant: for the benchmark
NOW = {False: time.perf_counter, True: time.process_time}  # by whether CPU seconds count
Loop = Callable[[list[str], "Clock"], dict[str, Any]]  # trains with flags
PARTS = ("data", "forward", "backward", "update", "logging")


# ---- one measurement, in a process of its own ------------------------------------------------------------------------


def synchronize() -> None:
    """Waits for the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock:
    """Seconds by part of a step, and the moments at which steps began."""

    def __init__(self, wait: bool, now: Callable[[], float]) -> None:
        self.wait, self.now, self.seconds = wait, now, Counter[str]()
        self.first_step = 0.0  # when its update was made, seconds since the epoch
        self.moments: list[float] = []
        self.by_then: list[Counter[str]] = []  # the seconds by part at these moments

    @property
    def signum(self) -> int:
        """What the loop asks once a step, whether it should stop."""
        if self.wait:
            synchronize()
        self.moments.append(self.now())
        self.by_then.append(self.seconds.copy())
        return 0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what happens within for a part, but for what is within another part."""
        if self.wait:
            synchronize()
        begun, inner = self.now(), self.seconds.total()
        try:
            yield
        finally:
            if self.wait:
                synchronize()
            self.seconds[name] += self.now() - begun - (self.seconds.total() - inner)
            if name == "update" and not self.first_step:
                synchronize()
                self.first_step = time.time()

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted for a part."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed

    def batches(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that returns batches, whose waiting counts for the data."""

        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            source = iter(function(*args, **kwargs))
            while True:
                with self.part("data"):
                    try:
                        batch = next(source)
                    except StopIteration:
                        return
                yield batch

        return timed


def other_layout(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The opposite of a rule for the memory format."""
    import torch

    return lambda *args: torch.contiguous_format if rule(*args) == torch.channels_last else torch.channels_last


def ours(flags: list[str], clock: Clock) -> dict[str, Any]:
    """`train.py` with these flags."""
    from debias_diffusers.cli import train_config
    from debias_diffusers.runs.run_directory import open_run
    from debias_diffusers.training import device, trainer
    from debias_diffusers.training.hooks import Checkpointer
    from debias_diffusers.training.setup.build import make_trainer

    config = train_config([flag for flag in flags if flag not in WORDS], None)
    # Backward with the release of its graph, which the plain loops have within forward, where a name gets its next value.
    parts = [(trainer.Trainer, "_terms", "forward"), (trainer.Trainer, "_backward", "backward"), (trainer.Trainer, "_update", "update")]
    parts += [(trainer.Logger, "log_step", "logging"), (Checkpointer, "save", "checkpoint")]
    with contextlib.ExitStack() as patches:
        for owner, name, part in parts:
            patches.enter_context(patch.object(owner, name, clock.counted(part, getattr(owner, name))))
        if "NO_SAVE" in flags:
            patches.enter_context(patch.object(Checkpointer, "save", lambda *_, **__: None))
        if "OTHER_LAYOUT" in flags:
            patches.enter_context(patch.object(device, "memory_format", other_layout(device.memory_format)))
        patches.enter_context(patch.object(trainer, "micro_batches", clock.batches(trainer.micro_batches)))
        training, _ = make_trainer(config, open_run(config), device.start_accelerator(config))
        training.train(clock)  # type: ignore[arg-type]
    return {"checkpoint_s": clock.seconds["checkpoint"]}


def baseline(flags: list[str], clock: Clock) -> dict[str, Any]:
    """A plain loop with the same network, data and loss."""
    import copy

    import torch

    from debias_diffusers.cli import train_config
    from debias_diffusers.data import dataset
    from debias_diffusers.data.sources.opening import open_source
    from debias_diffusers.diffusion.loss import make_objective
    from debias_diffusers.diffusion.timestep_samplers import make_timestep_sampler
    from debias_diffusers.tasks.pixels import PixelTask
    from debias_diffusers.utils import distributed

    config = train_config([flag for flag in flags if flag not in WORDS], None)
    if "NO_TF32" in flags or "ALL_TF32" in flags:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = "ALL_TF32" in flags
    target = "cuda" if torch.cuda.is_available() else "cpu"
    objective, task = make_objective(config.objective), PixelTask(config, open_source(config.data))
    sampler = make_timestep_sampler(config.objective, objective.schedule)
    torch.manual_seed(0)
    distributed.set_threads(config.optimization.num_threads)
    network = task.build().to(target).train()
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, foreach=False, fused=False)
    size, steps = config.optimization.batch_size, config.optimization.max_steps
    positions = dataset.PositionBatchSampler(size, size, 0, 1, range(steps))
    batches = clock.batches(dataset.micro_batches)(task.data, positions, pin_memory=target == "cuda")
    for step, batch in enumerate(batches):
        with clock.part("forward"):
            x_0, noise = task.x_0(batch, target), batch["noise"].to(target)
            t = sampler.draw(batch["u"], range(step * size, (step + 1) * size))
            terms = objective(task.conditioned(network, batch, target), x_0, noise, t)
            loss = terms.loss.mean()
        with clock.part("backward"):
            loss.backward()
        _ = clock.signum
        with clock.part("update"):
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=False)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for mean, weight in zip(average.parameters(), network.parameters()):
                    mean.mul_(0.9999).add_(weight, alpha=1 - 0.9999)
        with clock.part("logging"):
            loss.item()
    return {"checkpoint_s": None}


def one(options: argparse.Namespace, loop: Loop, flags: str) -> dict[str, Any]:
    """Trains once with a loop and returns what was seen."""
    import torch

    clock = Clock(options.wait, NOW[options.cpu_time])
    gpu, started = torch.cuda.is_available(), time.time()
    with tempfile.TemporaryDirectory() as folder, traced(options.trace):
        every = [*shlex.split(flags), "--max_steps", str(options.warm + options.steps), "--output_dir", str(Path(folder) / "run")]
        with contextlib.redirect_stdout(sys.stderr):
            found = loop(every, clock)
    begun, *_, ended = clock.moments[options.warm :]
    before, *_, after = clock.by_then[options.warm :]
    parts = {name: (after[name] - before[name]) / (options.steps - 1) for name in PARTS}
    seconds = (ended - begun) / (options.steps - 1)
    return found | {
        "seconds": seconds,
        "parts": parts | {"rest": seconds - sum(parts.values())},
        "peak_mb": (torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e6,
        "first_step_s": clock.first_step - started,
    }


@contextlib.contextmanager
def traced(path: str | None) -> Iterator[None]:
    """Writes a table of the operations and kernels by their own time to a file, or does nothing without one."""
    if path is None:
        yield
        return
    import torch
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        yield
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    Path(path).write_text(profiler.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=80))


# ---- the network's work, and the best rate at which it can be done ----------------------------------------------------


def network_and_batch(flags: list[str]) -> tuple[Any, dict[str, Any], int]:
    """The network, a batch for it, and the batch's size."""
    import torch

    from debias_diffusers.cli import train_config
    from debias_diffusers.tasks.pixels import network_arguments
    from debias_diffusers.tasks.unet import build_unet

    config = train_config(flags, None)
    channels = config.data.channels or (1 if config.data.dataset == "digits" else 3)
    size, side = config.optimization.batch_size, config.data.resolution
    assert side is not None
    with torch.device("meta"):  # shapes are all that is asked for
        network = build_unet(network_arguments(config, channels, 0))
        batch = {"sample": torch.zeros(size, channels, side, side), "timestep": torch.zeros(size)}
    return network, batch, size


def work(flags: list[str]) -> dict[str, Any]:
    """Parameters, images of a step, FLOPs of its forward and backward, and how often which product is computed."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    network, batch, size = network_and_batch(flags)
    found: Counter[tuple[Any, ...]] = Counter()

    def note(module: Any, inputs: Any, _: Any) -> None:
        shape = tuple(inputs[0].shape)
        if isinstance(module, torch.nn.Conv2d):
            found["conv", shape, module.out_channels, module.kernel_size, module.stride, module.padding] += 1
        else:
            found["linear", shape, module.out_features] += 1

    original = torch.nn.functional.scaled_dot_product_attention

    def attention(query: Any, *args: Any, **kwargs: Any) -> Any:
        found["attention", tuple(query.shape)] += 1
        return original(query, *args, **kwargs)

    for module in network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(note)
    counter = FlopCounterMode(display=False)
    # Of attention's kernels it does not know all; as plain products it does.
    with patch.object(torch.nn.functional, "scaled_dot_product_attention", attention), sdpa_kernel(SDPBackend.MATH), counter:
        network(**batch).sample.sum().backward()
    return {"parameters": sum(p.numel() for p in network.parameters()), "images": size, "flops": counter.get_total_flops(), "calls": found}


def seconds_of(call: tuple[Any, ...], dtype: Any, layout: Any, now: Callable[[], float]) -> float:
    """Forward and backward of one convolution, product or attention alone: median of several."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, shape, *rest = call
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    operation: Callable[[Any], Any]
    if kind == "conv":
        out, kernel, stride, padding = rest
        module = torch.nn.Conv2d(shape[1], out, kernel, stride, padding, device=device, dtype=dtype).to(memory_format=layout)
        x, operation = x.detach().contiguous(memory_format=layout).requires_grad_(), module
    elif kind == "linear":
        operation = torch.nn.Linear(shape[-1], rest[0], device=device, dtype=dtype)
    else:
        operation = lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x)  # noqa: E731

    upstream = torch.ones_like(operation(x))
    inputs = [x, *(operation.parameters() if isinstance(operation, torch.nn.Module) else ())]

    def run() -> None:
        torch.autograd.grad(operation(x), inputs, upstream)

    def timed(count: int) -> float:
        synchronize()
        begun = now()
        for _ in range(count):
            run()
        synchronize()
        return (now() - begun) / count

    timed(2)
    if device == "cuda":
        return kernel_seconds(run)
    count = max(1, int(0.02 / max(timed(2), 1e-6)))
    return statistics.median(timed(count) for _ in range(5))


def kernel_seconds(run: Callable[[], None], count: int = 10) -> float:
    """Seconds that the kernels of a function take on a GPU, without those in which it waits for the host to launch the next."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            run()
        synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6 / count


def best_rate(found: dict[str, Any], precision: str, now: Callable[[], float]) -> float:
    """FLOP per second of the network's convolutions and products one by one, each in its best layout."""
    import torch

    torch.backends.cudnn.benchmark = True  # as the training has it
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    layouts = (torch.contiguous_format, torch.channels_last)
    seconds = 0.0
    for call, times in found["calls"].items():
        seconds += times * min(seconds_of(call, dtype, layout, now) for layout in layouts[: 2 if call[0] == "conv" else 1])
    return found["flops"] / seconds


# ---- all of them ------------------------------------------------------------------------------------------------------


def make_images(folder: Path) -> None:
    """Smooth made-up pictures: 2048 of 32x32 (PNG) and 256 of 256x256 (JPEG)."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for side, count, kind in ((32, 2048, "png"), (256, 256, "jpg")):
        (folder / str(side)).mkdir(parents=True)
        for k in range(count):
            small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            small.resize((side, side), Image.Resampling.BICUBIC).save(folder / str(side) / f"{k:04d}.{kind}")


def measured(name: str, loop: Loop, flags: str, options: argparse.Namespace, **changes: Any) -> dict[str, Any] | None:
    """One run of a variant in a process of its own; None where it failed, which is said."""
    # A process that has asked CUDA for its devices cannot be forked; the server only asks the driver whether there is one.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["debias_diffusers.cli", "debias_diffusers.training.setup.build", "debias_diffusers.tasks.text_to_image"])
    with ProcessPoolExecutor(1, mp_context=server) as pool:
        try:
            run = pool.submit(one, argparse.Namespace(**{**vars(options), "wait": False, "trace": None, **changes}), loop, flags).result()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            print(f"{name}: {flags}\n{''.join(traceback.format_exception(error))[-3000:]}", file=sys.stderr, flush=True)
            return None
    # At once: a machine that is lent for minutes may be gone before the table.
    seen = f"{1000 * run['seconds']:.1f} ms/step, first step after {run['first_step_s']:.1f} s, peak {run['peak_mb']:.0f} MB"
    print(f"{name}: {seen}", file=sys.stderr, flush=True)
    return run


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of several runs of one variant; the seconds of a step in each beside them."""
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0] if isinstance(runs[0][key], float)}
    middle["parts"] = {part: statistics.median(run["parts"][part] for run in runs) for part in runs[0]["parts"]}
    return middle | {"all_seconds": [run["seconds"] for run in runs]}


def case(name: str, variants: dict[str, str], options: argparse.Namespace, images: Path) -> dict[str, Any]:
    """All variants of a case in turn, several times."""
    import torch

    from debias_diffusers.utils.distributed import set_threads

    options = argparse.Namespace(**{**vars(options), "warm": max(options.warm, WARM.get(name, 0))})
    flags = f"{CASES[name].replace('IMAGES', str(images))} {USUAL} {'--num_threads 1' if options.cpu_time else ''}"
    plain = {BASELINE: ""} | (BASELINES_ON_A_GPU if torch.cuda.is_available() else {})
    every = {key: f"{flags} --num_workers 1 --mixed_precision no {more}" for key, more in plain.items()}
    every |= {key: f"{flags} {more}" for key, more in variants.items()}
    loops = {key: baseline if key in plain else ours for key in every}
    runs: dict[str, list[dict[str, Any]]] = {key: [] for key in every}
    for _ in range(options.rounds):
        for key, all_flags in list(every.items()):
            run = measured(key, loops[key], all_flags, options)
            if run:
                runs[key].append(run)
            else:  # the others are worth having
                del every[key], runs[key]
    if BASELINE not in runs:
        sys.exit("without the baseline there is nothing to compare with")
    found = work([*shlex.split(flags), "--output_dir", "unused"])
    set_threads(1 if options.cpu_time else None)
    precisions = sorted({precision_of(flags) for flags in every.values()})
    best = {precision: best_rate(found, precision, NOW[options.cpu_time]) for precision in precisions}
    rows = {key: median(several) for key, several in runs.items()}
    for key, row in rows.items():
        if torch.cuda.is_available():  # the parts wait for the device, so they are measured apart
            row["parts"] = (measured(key, loops[key], every[key], options, wait=True, warm=5, steps=10) or row)["parts"]
        if options.trace:
            Path(options.trace).mkdir(parents=True, exist_ok=True)
            file = Path(options.trace) / f"{name}-{key.replace(' ', '-')}.txt"
            measured(key, loops[key], every[key], options, trace=str(file), warm=3, steps=10)
        row["images_per_second"] = found["images"] / row["seconds"]
        row["ratio"] = rows[BASELINE]["seconds"] / row["seconds"]
        row["of_best"] = found["flops"] / row["seconds"] / best[precision_of(every[key])]
    return {key: value for key, value in found.items() if key != "calls"} | {"best_flops": best, "rows": rows}


def precision_of(flags: str) -> str:
    """The last --mixed_precision of some flags."""
    return flags.split("--mixed_precision ")[-1].split()[0]


def table(name: str, found: dict[str, Any]) -> str:
    """A case in Markdown."""
    per_image = found["flops"] / found["images"] / 1e9
    best = ", ".join(f"{precision} {rate / 1e9:.0f} GFLOP/s" for precision, rate in found["best_flops"].items())
    lines = [f"case {name}: {found['parameters']} parameters, batch {found['images']}, {per_image:.2f} GFLOP per image and step"]
    lines += [f"best rate of its convolutions and products: {best}", ""]
    parts = [*PARTS, "rest"]
    lines += [f"| | images/s | of baseline | of best | ms/step | {' | '.join(parts)} | checkpoint s | peak MB | first step s |"]
    lines += ["|" + "---|" * (len(parts) + 8)]
    for key, row in found["rows"].items():
        split = " | ".join(f"{1000 * row['parts'][part]:.1f}" for part in parts)
        saved = f"{row['checkpoint_s']:.2f}" if row.get("checkpoint_s") else ""
        speed = f"{row['images_per_second']:.1f} | {row['ratio']:.2f} | {row['of_best']:.0%} | {1000 * row['seconds']:.1f}"
        lines += [f"| {key} | {speed} | {split} | {saved} | {row['peak_mb']:.0f} | {row['first_step_s']:.1f} |"]
    return "\n".join(lines) + "\n"


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of all benchmarks that call `one`, but for cases and steps."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu_time", action="store_true", help="one CPU thread, whose own seconds count: for a machine at other work")
    parser.add_argument("--json", help="write all figures to this file")


def main() -> None:
    """Measures and prints."""
    import torch

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["b", "c"] if gpu else ["a", "b"])
    usual = ["float32", "bf16", "bf16 compiled", "bf16 CUDA graphs"] if gpu else ["float32", "bf16"]
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=usual)
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=FLAGS", help="one more, with flags of train.py")
    parser.add_argument("--steps", type=int, default=50 if gpu else 20, help="steps that count, of each run")
    parser.add_argument("--warm", type=int, default=15 if gpu else 5, help="steps before them")
    parser.add_argument("--trace", metavar="FOLDER", help="write there which operations and kernels take the time, of a run of each")
    add_common(parser)
    options = parser.parse_args()
    variants = {name: VARIANTS[name] for name in options.variants}
    variants |= {name: f"--mixed_precision no {flags}" for name, flags in (given.split("=", 1) for given in options.variant)}
    where = torch.cuda.get_device_name() if gpu else f"{len(os.sched_getaffinity(0))} CPU cores"
    print(f"{where}, torch {torch.__version__}, medians of {options.rounds} runs of {options.steps} steps\n")
    everything = SimpleNamespace(device=where, torch=torch.__version__, cases={})
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder))
        for name in options.cases:
            everything.cases[name] = case(name, variants, options, Path(folder))
            print(table(name, everything.cases[name]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(vars(everything), indent=2) + "\n")


if __name__ == "__main__":
    main()
