"""The demo's report: it measures the mp4s that lie there, and the page shows files that exist."""

import json
import re
from pathlib import Path

import numpy as np

from demo import __main__ as demo
from demo.drawn import CLASSES, draw_clip
from sample.video_io import write_contact_sheet, write_mp4
from tests.conftest import refuses


def test_the_report_measures_the_files_and_the_page_shows_them(tmp_path: Path) -> None:
    """Eight real clips of each kind, but those called `trained` have the next class's label."""
    for kind in demo.TITLES:
        files = []
        for label, shown in enumerate(CLASSES):
            video = draw_clip(label, np.random.default_rng(label), size=32, frames=16).transpose(0, 2, 3, 1)
            claimed = (label + 1) % len(CLASSES) if kind == "trained" else label
            files.append({"file": f"{label:04d}.mp4", "index": label, "label": claimed, "class_name": shown.name})
            write_mp4(tmp_path / kind / files[-1]["file"], video)
        write_contact_sheet(tmp_path / kind / "samples.png", video[None], ["one"])
        (tmp_path / kind / "samples.json").write_text(json.dumps({"videos": files}))
    (tmp_path / "train").mkdir()
    rows = [{"step": step, "loss": 1 / step} for step in (1, 10, 100)]
    (tmp_path / "train" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    metrics = demo.measure(tmp_path)
    for kind, expected in (("real", 1.0), ("pretrained", 1.0), ("trained", 0.0)):
        assert metrics[f"appearance_accuracy_{kind}"] == metrics[f"motion_accuracy_{kind}"] == expected
        assert metrics[f"num_videos_{kind}"] == 8
    assert (metrics["training_loss_start"], metrics["training_loss_end"], metrics["training_steps"]) == (1.0, 0.01, 100)
    assert (tmp_path / "loss.png").is_file()
    demo.write_page(tmp_path, metrics)
    text = (tmp_path / "index.html").read_text()
    named = re.findall(r'src="([^"]+)"', text)
    assert len([name for name in named if name.endswith(".mp4")]) == 24
    assert all((tmp_path / name).is_file() for name in named)
    assert "100.0%" in text and "0.0%" in text


def test_too_few_videos_are_refused() -> None:
    refuses("--videos must be at least 64", demo.main, ["--videos", "10"])
