"""Converts a folder of videos, at any depth, to one folder of frames per video.

    python -m tools.convert_videos_to_frames -s UCF-101 -t UCF-101-frames --target_size 256

CLASS/video.avi becomes CLASS/video/000000.png, 000001.png, ... The flags are those of the official tool, plus --format
and --quality (JPEG quality, which the official tool always left at 75). --target_size, as there, resizes the largest
centred square with Lanczos; without it frames keep their size. Names are kept, including '#' and spaces, so that no two
videos collide. Unreadable videos are listed in TARGET/report.json. After a kill, the same command continues.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from common.checks import at_least, check_limits, require
from common.text import printable
from datasets.catalog import find_clips
from datasets.readers import VIDEO_SUFFIXES, VideoError, open_video
from datasets.recipes import VIDEOS
from engine import cli
from tools.frames import LANCZOS, Form, plan_tasks
from tools.output_folder import OutputFolder


def print_frame_rates(source: Path, suffixes: Collection[str]) -> None:
    """Prints the unreadable videos, then the number of videos at each frame rate."""
    rates: Counter[str] = Counter()
    clips = find_clips(source, (VIDEOS,), lambda reason, path: None, suffixes)
    for clip in sorted(clips, key=lambda clip: clip.name):
        try:
            rates[f"{open_video(clip.path).fps:.6g}"] += 1
        except VideoError as error:
            print(f"{printable(clip.name)}: {error.reason}")
    require(bool(rates), f"'{source}' holds no video files that can be read ({' '.join(sorted(suffixes))})")
    for rate, videos in rates.most_common():
        print(f"{rate} frames a second: {videos} videos")


def main(argv: list[str]) -> None:
    """Converts the videos of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-s", "--source_dir", "--source_path", type=Path, required=True, metavar="SOURCE", help="folder of videos")
    add("-t", "--target_dir", "--target_path", type=Path, metavar="TARGET", help="folder to fill")
    add("--video_ext", metavar="EXT", help="only files with this extension (any video)")
    add("--target_size", type=int, metavar="N", help="centre crop and resize to N x N (unchanged)")
    add("--force_fps", type=int, metavar="N", help="pick frames by time, N per second (every frame)")
    add("--format", choices=("png", "jpeg"), default="png", help="frame format (png)")
    add("--quality", type=int, metavar="Q", help="JPEG quality, 1 to 100 (95)")
    add("--num_workers", "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (all cores)")
    add("--compute_fps_only", action="store_true", help="only print the frame rates")
    arguments = parser.parse_args(argv)
    check_limits(arguments, "--", {"num_workers": at_least(1)})
    source, target, extension = arguments.source_dir, arguments.target_dir, arguments.video_ext
    suffixes = {f".{extension.lstrip('.').lower()}"} if extension else VIDEO_SUFFIXES
    if arguments.compute_fps_only:
        print_frame_rates(source, suffixes)
        return
    if target is None:
        parser.error("-t/--target_dir is required")

    form = Form(arguments.format, arguments.quality, arguments.target_size, LANCZOS, arguments.force_fps)
    with OutputFolder(target, source, form, "convert_videos_to_frames", video_ext=extension) as folder:
        clips = folder.find_clips((VIDEOS,), suffixes)
        tasks = plan_tasks(clips, [clip.name for clip in clips], form)
        folder.report(folder.make(tasks, arguments.num_workers))


if __name__ == "__main__":
    cli.run(main)
