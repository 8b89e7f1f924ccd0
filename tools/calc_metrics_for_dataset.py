"""FVD, KVD, FID, KID and inception scores of generated videos, under a named protocol: one command, one JSON.

    python -m tools.calc_metrics_for_dataset --real_data_path A --fake_data_path B --metrics fvd2048_16f,fid50k_full \\
        --protocol latte --dataset ffs --detector i3d_torchscript.pt --detector inception-2015-12-05.pt
    torchrun --nproc_per_node=8 -m tools.calc_metrics_for_dataset ...            the same numbers, sooner

A and B are each a folder of videos, of folders of frames, or of the arrays that sample/sample_ddp.py
writes, at any depth. Writes the result, and beside it the list of the clips that were read (`*.manifest.json`).
docs/datasets_evaluation.md explains protocols, metrics and traps.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine import cli

if TYPE_CHECKING:
    from engine.distributed import World
    from evaluation.detectors import Detector
    from evaluation.measure import Evaluation
    from evaluation.protocols import Metric
    from evaluation.sources import Source

KIND = "latte metrics"  # tells our results from other files
DETECTOR_FOLDER = Path("share_ckpts/detectors")
RESULT_FOLDER = Path("results/metrics")
CACHE_FOLDER = Path("results/metrics_cache")


def switch(text: str) -> bool:
    """0, 1, false, true, as the official command takes them."""
    known = {"0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"'{text}' is neither 0 nor 1")
    return known[text.lower()]


def names(text: str) -> list[str]:
    """a,b,c; "none" is nothing."""
    return [] if text == "none" else [each.strip() for each in text.split(",") if each.strip()]


def numbers(text: str) -> list[int]:
    """0,1,2."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of seeds, as 0,1,2")
    return list(dict.fromkeys(int(each) for each in text.split(",")))


def build_parser() -> argparse.ArgumentParser:
    """The command line; the flags of the official one keep their names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--real_data_path", metavar="PATH", help="folder; not needed for is and isv")
    add("--fake_data_path", metavar="PATH", required=True, help="folder")
    add("--metrics", type=names, default="fvd2048_16f,fid50k_full", help="of fvd, kvd, fid, kid, is, isv (%(default)s)")
    add("--protocol", default="latte", metavar="NAME", help="stylegan-v, latte or latte-published (%(default)s)")
    add("--dataset", metavar="NAME", help="preset of ffs, sky, taichi or ucf101: real stride and 256 x 256")
    add("--split", metavar="NAME", help="what the real data are, for the report (train)")
    add("--resolution", type=int, metavar="N", help="crop and resize to N x N; without: frames as they are")
    add("--real_stride", type=int, metavar="N", help="instead of the protocol's")
    add("--fake_stride", type=int, metavar="N", help="instead of the protocol's")
    add("--divisor", choices=("n", "n-1"), help="of covariances, instead of the protocol's n")
    add("--seeds", type=numbers, metavar="N,N,...", help="a run for each; mean and deviation are reported (0)")
    add("--num_runs", type=int, metavar="N", help="the same as --seeds 0,1,...,N-1")
    add("--detector", action="append", default=[], metavar="[NAME=]FILE[@SHA256]", help="repeatable; NAME is found out")
    add("--detector_dir", type=Path, default=DETECTOR_FOLDER, metavar="DIR", help="of the others (%(default)s)")
    add("--checks", type=names, default="floor,shuffle", help="beside the value; none (%(default)s)")
    add("--report", type=names, default="clip", help="clip; and frame: along the clip (%(default)s)")
    add("--manifest", metavar="FILE", help="read exactly the clips of this list")
    add("--out", type=Path, metavar="FILE", help="result (a new file in results/metrics)")
    add("--use_cache", type=switch, default=True, metavar="0|1", help="keep and find real features (1)")
    add("--cache_dir", type=Path, default=CACHE_FOLDER, metavar="DIR", help="of these (%(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="loader processes per rank (%(default)s)")
    add(
        "--threads", type=int, default=1, metavar="N", help="of each rank; part of the last bits on a CPU (%(default)s)"
    )
    add("--device", choices=("cpu", "cuda"), help="by default CUDA where there is one")
    add("--gpus", type=int, metavar="N", help="official; here torchrun says it")
    add("--mirror", type=switch, default=False, metavar="0|1", help="official; without effect there too")
    add("--verbose", type=switch, default=sys.stderr.isatty(), metavar="0|1", help="show progress")
    return parser


def main(argv: list[str]) -> int:
    """Evaluate as the command line says."""
    arguments = build_parser().parse_args(argv)

    import torch

    from engine.distributed import close_world, init_world, on_main

    started = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    metrics = check(arguments)
    world = init_world(arguments.device)
    on_main(lambda: make_writable(arguments.out or free_name(arguments)))
    evaluation = prepare(arguments, metrics, world)
    evaluation.look(metrics)
    entries = {metric.name: evaluation.measure(metric, arguments.seeds) for metric in metrics}
    if world.is_main:
        result = describe(argv, arguments, evaluation, entries, world, time.perf_counter() - started)
        write(arguments.out or free_name(arguments), result, evaluation)  # free now, if another job took the first
    close_world()
    return cli.leave(0)


def check(arguments: argparse.Namespace) -> list[Metric]:
    """Look at the flags together; fills in `seeds`. ValueError for what makes no sense."""
    import os

    from evaluation.measure import CHECKS, REPORTS
    from evaluation.protocols import parse_metric

    metrics = [parse_metric(name) for name in dict.fromkeys(arguments.metrics)]
    if not metrics:
        raise ValueError("--metrics names nothing to compute")
    for flag, known in (("checks", CHECKS), ("report", REPORTS)):
        for name in getattr(arguments, flag):
            if name not in known:
                raise ValueError(f"--{flag}: '{name}' is unknown, use {', '.join(known)}")
    for flag, least in (("workers", 0), ("threads", 1), ("num_runs", 1)):
        if (getattr(arguments, flag) or least) < least:
            raise ValueError(f"--{flag} must be at least {least}")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if (arguments.gpus or 1) > 1 and arguments.gpus != world_size:
        raise ValueError(
            f"--gpus {arguments.gpus}: start as many processes instead, with torchrun --nproc_per_node="
            f"{arguments.gpus} -m tools.calc_metrics_for_dataset; the numbers do not depend on it"
        )
    if arguments.seeds and arguments.num_runs:
        raise ValueError("--num_runs N is the same as --seeds 0,...,N-1: give one of them")
    arguments.seeds = arguments.seeds or list(range(arguments.num_runs or 1))
    return metrics


def free_name(arguments: argparse.Namespace) -> Path:
    """A result file that does not exist, named after the fakes' folder, the one above it and the protocol."""
    fakes = Path(arguments.fake_data_path).resolve()
    name = fakes.name
    name = "-".join(part for part in (fakes.parent.name, name, arguments.protocol, arguments.dataset) if part)
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(path for each in names if not (path := RESULT_FOLDER / f"{each}.json").exists())


def make_writable(out: Path) -> None:
    """See that the result can be written before anything is computed, and that no stranger's file is in its place."""
    from sample.sample import make_writable as make_folder

    make_folder(out.parent, "--out")
    if not out.exists():
        return
    try:
        ours = json.loads(out.read_text(encoding="utf-8"))["kind"] == KIND
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise ValueError(f"--out {out} exists and is no result of this tool: name another file")


def prepare(arguments: argparse.Namespace, metrics: Sequence[Metric], world: World) -> Evaluation:
    """Find the clips and load the detectors."""
    from evaluation.cache import FeatureCache
    from evaluation.extract import Extractor
    from evaluation.manifest import Manifest
    from evaluation.measure import Evaluation
    from evaluation.protocols import build_protocol
    from evaluation.sources import Source

    settings = {
        key: getattr(arguments, key) for key in ("split", "resolution", "real_stride", "fake_stride", "divisor")
    }
    protocol = build_protocol(arguments.protocol, arguments.dataset, **settings)
    sources = {"fake": Source.find(arguments.fake_data_path, "--fake_data_path")}
    needed = [metric.name for metric in metrics if metric.num_real != 0]
    if needed and not arguments.real_data_path:
        raise ValueError(f"--real_data_path is missing: {needed[0]} compares with real data")
    if needed:
        sources["real"] = Source.find(arguments.real_data_path, "--real_data_path")
    return Evaluation(
        real=sources.get("real"),
        fake=sources["fake"],
        protocol=protocol,
        detectors=load_detectors(arguments.detector, arguments.detector_dir, metrics, world),
        extractor=Extractor(world, arguments.workers, progress(arguments.verbose)),
        cache=FeatureCache(arguments.cache_dir) if arguments.use_cache else None,
        windows=Manifest(arguments.manifest, sources) if arguments.manifest else None,
        checks=arguments.checks,
        reports=arguments.report,
    )


def load_detectors(given: Sequence[str], folder: Path, metrics: Sequence[Metric], world: World) -> dict[str, Detector]:
    """The detector of each family of metrics: of the files given, or else the official one's in `folder`."""
    from evaluation.detectors import DETECTORS, Detector, DetectorFile, load_detector

    files: list[tuple[str, DetectorFile]] = []
    for text in given:
        match = re.fullmatch(r"(?:(?P<name>\w+)=)?(?P<file>.+?)(?:@(?P<sha256>[0-9a-fA-F]{64}))?", text)
        name, path, sha256 = match.groups() if match else (None, text, None)
        if name is not None and name not in DETECTORS:
            raise ValueError(f"--detector: there is no detector '{name}'; they are {', '.join(DETECTORS)}")
        file = DetectorFile.read(path, sha256=sha256, spec=DETECTORS[name] if name else None)
        files += [(each, file) for each in ([name] if name else [spec.name for spec in file.told()])]
    loaded: dict[str, Detector] = {}
    for family in dict.fromkeys(metric.family for metric in metrics):
        specs = [spec for spec in DETECTORS.values() if family in spec.metrics]  # the official one comes first
        fitting = [(spec, file) for spec in specs for name, file in files if name == spec.name]
        if fitting:
            loaded[family] = Detector(*fitting[0], world.device)
        else:
            loaded[family] = load_detector(specs[0].name, folder / specs[0].file, device=world.device)
    return loaded


def progress(shown: bool) -> Callable[[int, int], None] | None:
    """What draws a bar of items."""
    if not shown:
        return None
    from tqdm import tqdm

    bar = tqdm(unit="item", dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 30.0)

    def show(done: int, wanted: int) -> None:
        if done < bar.n or bar.total != wanted:
            bar.reset(wanted)
        bar.update(done - bar.n)

    return show


def describe(
    argv: Sequence[str],
    arguments: argparse.Namespace,
    evaluation: Evaluation,
    entries: Mapping[str, Any],
    world: World,
    seconds: float,
) -> dict[str, Any]:
    """The result file."""
    from evaluation.report import all_warnings, versions

    sources = {"real": evaluation.real, "fake": evaluation.fake}
    return {
        "kind": KIND,
        "command": ["tools.calc_metrics_for_dataset", *argv],
        "metrics": dict(entries),
        "protocol": evaluation.protocol.to_dict(),
        "seeds": arguments.seeds,
        "sources": {side: describe_source(source) for side, source in sources.items() if source},
        "detectors": {
            each.name: {"path": str(each.path), "sha256": each.sha256} for each in evaluation.detectors.values()
        },
        "warnings": all_warnings(entries),
        "versions": versions(),
        "device": world.device.type,
        "world_size": world.size,
        "threads": arguments.threads,
        "seconds": round(seconds, 1),
    }


def describe_source(source: Source) -> dict[str, Any]:
    """Where clips came from, and what else lay there."""
    return {"path": source.root, "clips": len(source.clips), "no clips": source.skipped}


def write(out: Path, result: dict[str, Any], evaluation: Evaluation) -> None:
    """The result and the manifest beside it, and the table for people."""
    from common.storage import write_atomically
    from evaluation.manifest import manifest_text
    from evaluation.report import table

    sources = {side: source for side, source in (("real", evaluation.real), ("fake", evaluation.fake)) if source}
    manifest = out.with_name(f"{out.stem}.manifest.json")
    result["manifest"] = manifest.name
    text = manifest_text(evaluation.read, sources)
    write_atomically(manifest, lambda path: path.write_text(text, encoding="utf-8"))
    write_atomically(out, lambda path: path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8"))
    print(f"{table(result)}\n\n{out}, {manifest.name}: {result['seconds']} s")


if __name__ == "__main__":
    cli.run(main)
