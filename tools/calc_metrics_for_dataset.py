"""Computes FVD, KVD, FID, KID and inception scores of generated videos under a named protocol; writes one JSON file.

    python -m tools.calc_metrics_for_dataset --real_data_path A --fake_data_path B --metrics fvd2048_16f,fid50k_full \\
        --protocol latte --dataset ffs --detector i3d_torchscript.pt --detector inception-2015-12-05.pt
    python -m engine.elastic --nproc_per_node=8 -m tools.calc_metrics_for_dataset ...       the same numbers, faster

A and B are folders that hold, at any depth, videos, folders of frames, or the arrays that sample/sample_ddp.py writes.
Writes the result and, next to it, the list of the clips that were read (`*.manifest.json`).
docs/datasets_evaluation.md explains protocols, metrics and pitfalls.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from common.checks import require
from common.console import progress_bar
from common.storage import write_atomically, write_json
from engine import cli
from engine.distributed import World, close_world, init_world, on_main
from evaluation.cache import FeatureCache
from evaluation.detectors import DETECTORS, Detector, load_detector, read_detector_files
from evaluation.extract import Extractor
from evaluation.manifest import Manifest, format_manifest
from evaluation.measure import CHECKS, REPORTS, Evaluation
from evaluation.protocols import Metric, build_protocol, parse_metric
from evaluation.report import format_table, group_warnings, list_versions
from evaluation.sources import Source
from sample.command import make_writable

KIND = "latte metrics"  # identifies our results
OFFICIAL_METRICS = "fvd2048_16f,fid50k_full"
DETECTOR_FOLDER = Path("share_ckpts/detectors")
RESULT_FOLDER = Path("results/metrics")
CACHE_FOLDER = Path("results/metrics_cache")
SWITCHES = {"0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}


def parse_switch(text: str) -> bool:
    """Parses 0, 1, false or true, as the official command does."""
    if text.lower() not in SWITCHES:
        raise argparse.ArgumentTypeError(f"'{text}' is neither 0 nor 1")
    return SWITCHES[text.lower()]


def parse_names(text: str) -> list[str]:
    """Parses a,b,c; "none" is an empty list."""
    return [] if text == "none" else [each.strip() for each in text.split(",") if each.strip()]


def parse_seeds(text: str) -> list[int]:
    """Parses 0,1,2."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of seeds such as 0,1,2")
    return list(dict.fromkeys(int(each) for each in text.split(",")))


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; the official flags keep their names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--real_data_path", metavar="PATH", help="folder; not needed for is and isv")
    add("--fake_data_path", metavar="PATH", required=True, help="folder")
    add("--metrics", type=parse_names, default=OFFICIAL_METRICS, help="fvd, kvd, fid, kid, is, isv (%(default)s)")
    add("--protocol", default="latte", metavar="NAME", help="stylegan-v, latte or latte-published (%(default)s)")
    add("--dataset", metavar="NAME", help="ffs, sky, taichi or ucf101: sets the real stride and 256 x 256")
    add("--split", metavar="NAME", help="split of the real data, only reported (train)")
    add("--resolution", type=int, metavar="N", help="crop and resize to N x N (original size)")
    add("--real_stride", type=int, metavar="N", help="stride of real frames (the protocol's)")
    add("--fake_stride", type=int, metavar="N", help="stride of generated frames (the protocol's)")
    add("--divisor", choices=("n", "n-1"), help="divisor of covariances (the protocol's, n)")
    add("--seeds", type=parse_seeds, metavar="N,N,...", help="one run per seed; mean and deviation are reported (0)")
    add("--num_runs", type=int, metavar="N", help="the same as --seeds 0,1,...,N-1")
    add("--detector", action="append", default=[], metavar="[NAME=]FILE[@SHA256]", help="repeatable; NAME is detected")
    add("--detector_dir", type=Path, default=DETECTOR_FOLDER, metavar="DIR", help="other detectors (%(default)s)")
    add("--checks", type=parse_names, default="floor,shuffle", help="checks of each value, or none (%(default)s)")
    add("--report", type=parse_names, default="clip", help="clip, and frame for values along the clip (%(default)s)")
    add("--manifest", metavar="FILE", help="read exactly the clips of this list")
    add("--out", type=Path, metavar="FILE", help="result file (a new one in results/metrics)")
    add("--use_cache", type=parse_switch, default=True, metavar="0|1", help="cache the features of real data (1)")
    add("--cache_dir", type=Path, default=CACHE_FOLDER, metavar="DIR", help="folder of that cache (%(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="loader processes per rank (%(default)s)")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads per rank; change the last bits (%(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    add("--gpus", type=int, metavar="N", help="official flag; refused, with the command to use")
    add(
        "--mirror",
        type=parse_switch,
        default=False,
        metavar="0|1",
        help="official flag; refused where it has an effect",
    )
    add("--verbose", type=parse_switch, default=sys.stderr.isatty(), metavar="0|1", help="show progress")
    return parser


def main(argv: list[str]) -> int:
    """Evaluates the command line; returns the exit code."""
    arguments = build_parser().parse_args(argv)

    started = time.perf_counter()
    metrics = check_arguments(arguments)
    torch.set_num_threads(arguments.threads)
    world = init_world(arguments.device)
    on_main(lambda: check_out(arguments.out or find_free_name(arguments)))
    evaluation = prepare(arguments, metrics, world)
    evaluation.check_inputs(metrics)
    entries = {metric.name: evaluation.measure(metric, arguments.seeds) for metric in metrics}
    if world.is_main:
        out = arguments.out or find_free_name(arguments)  # another job may have taken the first name
        result = describe(argv, arguments, evaluation, entries)
        result |= {"seconds": round(time.perf_counter() - started, 1), "manifest": f"{out.stem}.manifest.json"}
        manifest = format_manifest(evaluation.read, evaluation.sources)
        write_atomically(out.with_name(result["manifest"]), lambda path: path.write_text(manifest, encoding="utf-8"))
        write_json(out, result, indent=2)
        print(f"{format_table(result)}\n\n{out}, {result['manifest']}: {result['seconds']} s")
    close_world()
    return cli.leave(0)


def check_arguments(arguments: argparse.Namespace) -> list[Metric]:
    """Checks the flags and fills in `seeds`. Raises ValueError for invalid combinations."""
    metrics = [parse_metric(name) for name in dict.fromkeys(arguments.metrics)]
    require(bool(metrics), "--metrics is empty: name at least one")
    mirrored = [each.name for each in metrics if each.unit == "frame" and each.num_real == each.num_fake]
    require(
        not (arguments.mirror and mirrored),
        f"--mirror 1 adds mirrored real frames to {' and '.join(mirrored)}, which is not supported: leave it out, or "
        "use fid50k_full and kid50k_full, which it does not affect",
    )
    for flag, known in (("checks", CHECKS), ("report", REPORTS)):
        for name in getattr(arguments, flag):
            require(name in known, f"--{flag}: '{name}' is unknown, use {', '.join(known)}")
    for flag, least in (("workers", 0), ("threads", 1), ("num_runs", 1)):
        value = getattr(arguments, flag)
        require(value is None or value >= least, f"--{flag} must be at least {least}")
    gpus = arguments.gpus or 1
    require(
        gpus <= 1 or gpus == int(os.environ.get("WORLD_SIZE", "1")),
        f"--gpus {gpus}: start that many processes with python -m engine.elastic --nproc_per_node={gpus} "
        "-m tools.calc_metrics_for_dataset; the result is the same",
    )
    both = arguments.seeds and arguments.num_runs
    require(not both, "--num_runs N is the same as --seeds 0,...,N-1: give only one of them")
    arguments.seeds = arguments.seeds or list(range(arguments.num_runs or 1))
    return metrics


def find_free_name(arguments: argparse.Namespace) -> Path:
    """Returns an unused result path, named after the fake folder, its parent and the protocol."""
    fakes = Path(arguments.fake_data_path).resolve()
    name = "-".join(filter(None, (fakes.parent.name, fakes.name, arguments.protocol, arguments.dataset)))
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(path for each in names if not (path := RESULT_FOLDER / f"{each}.json").exists())


def check_out(out: Path) -> None:
    """Checks that the result can be written, and that its path is free or holds an earlier result."""
    make_writable(out.parent, "--out")
    if out.exists():
        ours = False
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            ours = json.loads(out.read_text(encoding="utf-8"))["kind"] == KIND
        require(ours, f"--out {out} exists and is not a result of this tool: use another file.")


def prepare(arguments: argparse.Namespace, metrics: Sequence[Metric], world: World) -> Evaluation:
    """Finds the clips and loads the detectors."""
    keys = ("split", "resolution", "real_stride", "fake_stride", "divisor")
    settings = {key: getattr(arguments, key) for key in keys}
    protocol = build_protocol(arguments.protocol, arguments.dataset, **settings)
    sources = {"fake": Source.find(arguments.fake_data_path, "--fake_data_path")}
    needed = [metric.name for metric in metrics if "real" in metric.sides]
    if needed:
        require(bool(arguments.real_data_path), f"--real_data_path is missing: {needed[0]} compares with real data")
        sources = {"real": Source.find(arguments.real_data_path, "--real_data_path"), **sources}
    return Evaluation(
        sources,
        protocol,
        load_detectors(arguments.detector, arguments.detector_dir, metrics, world),
        Extractor(world, arguments.workers, show_progress() if arguments.verbose and world.is_main else None),
        cache=FeatureCache(arguments.cache_dir) if arguments.use_cache else None,
        manifest=Manifest(arguments.manifest, sources) if arguments.manifest else None,
        checks=arguments.checks,
        reports=arguments.report,
    )


def load_detectors(given: Sequence[str], folder: Path, metrics: Sequence[Metric], world: World) -> dict[str, Detector]:
    """Loads the detector of each family of metrics, from the given files or else the official one in `folder`."""
    files = read_detector_files(given)
    loaded: dict[str, Detector] = {}
    for family in dict.fromkeys(metric.family for metric in metrics):
        specs = [spec for spec in DETECTORS.values() if family in spec.metrics]  # the official one comes first
        fitting = (Detector(spec, file, world.device) for spec in specs for each, file in files if each == spec)
        name, path = specs[0].name, folder / specs[0].file
        loaded[family] = next(fitting, None) or load_detector(name, path, device=world.device)
    return loaded


def show_progress() -> Callable[[int, int], None]:
    """Returns a callback that draws a progress bar."""
    bar = progress_bar(0, "item")

    def show(done: int, wanted: int) -> None:
        if done < bar.n or bar.total != wanted:
            bar.reset(wanted)
        bar.update(done - bar.n)

    return show


def describe(
    argv: Sequence[str], arguments: argparse.Namespace, evaluation: Evaluation, entries: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the content of the result file."""
    world = evaluation.extractor.world
    return {
        "kind": KIND,
        "command": ["tools.calc_metrics_for_dataset", *argv],
        "metrics": dict(entries),
        "protocol": asdict(evaluation.protocol),
        "seeds": arguments.seeds,
        "sources": {
            side: {"path": source.root, "clips": len(source.clips), "no clips": source.skipped}
            for side, source in evaluation.sources.items()
        },
        "detectors": {
            each.name: {"path": str(each.path), "sha256": each.sha256} for each in evaluation.detectors.values()
        },
        "warnings": list(group_warnings(entries)),
        "versions": list_versions(),
        "device": world.device.type,
        "world_size": world.size,
        "threads": arguments.threads,
    }


if __name__ == "__main__":
    cli.run(main)
