"""The command ``foldfeed bench loader``: words for `foldfeed.loader.speed`.

Nothing heavy is imported here before the command runs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from foldfeed.feature_store.errors import MissingExtraError

if TYPE_CHECKING:
    from foldfeed.loader.recipe import Recipe
    from foldfeed.loader.speed import LoaderSpeed


@click.command("loader", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("store", metavar="STORE")
@click.option("--recipe", "name", default="crop_first", show_default=True, help="Recipe or preset.")
@click.option("--crop-residues", type=int, help="Residues of a crop. [default: the recipe's]")
@click.option("--num-clusters", type=int, help="Cluster centres, or rows. [default: the recipe's]")
@click.option("--num-extra", type=int, help="Extra rows. [default: the recipe's]")
@click.option("--labels", is_flag=True, help="With what the losses need from structures.")
@click.option("--batch", type=int, default=8, show_default=True, help="Samples of a step on this rank.")
@click.option("--step-ms", type=float, default=33.0, show_default=True, help="Time of a training step.")
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--processes", type=int, default=0, show_default=True, help="That read samples.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda[:N].")
@click.option("--seconds", type=float, default=20.0, show_default=True, help="Of the measurement.")
@click.option("--record-set", metavar="NAME", help="Of the store; all records unless given.")
@click.option("--trace", metavar="FILE", help="Write what every thread did when, for Perfetto.")
@click.option("--cache-folder", default="", metavar="FOLDER", help="Keep blocks of a remote store there.")
@click.option(
    "--cache-gb", type=float, default=0.0, help="Limit of that folder in 10^9 bytes. [default: 107]"
)
@click.option("--cache-memory-mb", type=float, default=0.0, help="Memory for blocks. [default: none, or 268]")
@click.option("--cache-redis", default="", metavar="URL", help="Server for blocks, redis:// or rediss://.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
def bench_loader(
    store: str,
    name: str,
    crop_residues: int | None,
    num_clusters: int | None,
    num_extra: int | None,
    labels: bool,
    batch: int,
    step_ms: float,
    threads: int,
    processes: int,
    device: str,
    seconds: float,
    record_set: str | None,
    trace: str | None,
    cache_folder: str,
    cache_gb: float,
    cache_memory_mb: float,
    cache_redis: str,
    as_json: bool,
) -> None:
    """Say how fast samples of STORE come here, and whether loader or accelerator is the bottleneck.

    Runs the loader with a consumer that takes no time, then beside one that pauses for --step-ms, and
    compares the second with batches that are in memory already. Nothing is written.

    \b
    Examples:
      foldfeed bench loader my-store --crop-residues 256 --step-ms 33
      foldfeed bench loader my-store --recipe af2_initial --device cuda --threads 8 --processes 2
    """
    try:
        from foldfeed.loader import CropLoader, FeatureStore, LoaderConfigError, Recipe
        from foldfeed.loader.cache.config import cache_of_options
        from foldfeed.loader.meters.reports import table
        from foldfeed.loader.speed import measure_speed
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "train") from error

    for option, value in (("--step-ms", step_ms), ("--seconds", seconds)):
        if not 0 <= value < float("inf") or (option == "--seconds" and value == 0):
            raise click.BadParameter(f"{value:g} must be a number above 0", param_hint=option)
    values: dict[str, Any] = {
        "crop_residues": crop_residues,
        "num_clusters": num_clusters,
        "num_extra": num_extra,
        "labels": labels or None,
    }
    try:
        recipe = Recipe.named(name, **{field: value for field, value in values.items() if value is not None})
        opened = FeatureStore.open(store)
        records = opened.subset(record_set) if record_set else opened
        loader = CropLoader(
            records,
            recipe,
            seed=0,
            global_batch=batch,
            num_threads=threads,
            num_processes=processes,
            device=device,
            trace=trace,
            cache=cache_of_options(cache_folder, cache_gb, cache_memory_mb, cache_redis),
        )
    except LoaderConfigError as error:
        raise click.UsageError(str(error)) from error
    with loader:
        speed = measure_speed(loader, step_s=step_ms / 1000, seconds=seconds)
        meters = loader.meters()
    if as_json:
        facts = {"recipe": dataclasses.asdict(recipe), "device": device, "threads": threads}
        facts |= {"processes": processes, "loss": speed.loss, "bottleneck": speed.bottleneck}
        click.echo(json.dumps(facts | dataclasses.asdict(speed) | {"meters": meters}))
        return
    for line in [*lines_of(recipe, speed), *cache_lines_of(meters["cache"]), *table(meters)]:
        click.echo(line)


def lines_of(recipe: Recipe, speed: LoaderSpeed) -> list[str]:
    """Returns a measurement as lines for a person."""
    shape = f"{recipe.crop_residues} residues x {recipe.num_clusters} rows"
    if recipe.num_extra:
        shape += f" and {recipe.num_extra} extra"
    count, loss = speed.num_samples, 100 * speed.loss
    lines = [
        f"{recipe.name}, {shape}, {count} samples a step",
        f"loader alone: {count / speed.alone_s:.1f} samples/s ({1000 * speed.alone_s:.1f} ms a step)",
        f"  one sample, one thread: {1000 * speed.fetch_s:.2f} ms read, "
        f"{1000 * speed.prepare_s:.2f} ms features, {speed.sample_bytes / 1e6:.2f} MB",
        f"beside steps of {1000 * speed.step_s:.1f} ms: {count / speed.streamed_s:.1f} samples/s, "
        f"{count / speed.cached_s:.1f} with batches in memory; a step takes {loss:.1f} % longer",
        f"  waits for a batch: p50 {1000 * speed.wait_s(0.5):.1f} ms, "
        f"p99 {1000 * speed.wait_s(0.99):.1f} ms, worst {1000 * speed.waits_s[-1]:.1f} ms, "
        f"over {len(speed.waits_s)} steps",
    ]
    if speed.bottleneck == "loader":
        lines.append(
            "the bottleneck is the loader: give it threads or processes (--threads, --processes), a device "
            "for the features (--device cuda), or smaller samples"
        )
    else:
        lines.append("the bottleneck is the accelerator: it does not wait for samples")
    return lines


def cache_lines_of(counters: Mapping[str, float]) -> list[str]:
    """Returns what the tiers of a cache served, since the loader was made, as lines for a person."""
    if not counters:
        return []
    tiers = [
        f"{name} {counters[f'{name}_hits']:.0f} ({counters[f'{name}_bytes'] / 1e6:.1f} MB)"
        for name in ("memory", "folder", "redis", "store")
    ]
    return [f"blocks from {', '.join(tiers)}; {counters['damaged']:.0f} damaged in a cache"]
