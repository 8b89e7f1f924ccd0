"""Keys of the official YAML files (Vchitect/Latte, configs/) and their translation to ours; removed keys and flags.

`engine.config` refuses an official key with a hint at its new name; `tools.convert config` translates a whole file.
Every key of the official configs for the four data sets is in RENAMED or DROPPED. Imports nothing slow, so `--help`
is fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# official key -> our dotted key
RENAMED: dict[str, str] = {
    # data
    "dataset": "data.name",
    "data_path": "data.path",
    "frame_data_txt": "data.frame_list",
    "num_frames": "data.num_frames",
    "video_length": "data.num_frames",
    "frame_interval": "data.frame_interval",
    "image_size": "data.image_size",
    "use_image_num": "data.num_images",
    "num_workers": "data.num_workers",
    # model and codec
    "model": "model.name",
    "num_classes": "model.num_classes",
    "learn_sigma": "model.learn_sigma",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "pretrained_model_path": "codec.path",
    # training
    "learning_rate": "optim.learning_rate",
    "lr_warmup_steps": "optim.warmup_steps",
    "clip_max_norm": "optim.max_grad_norm",
    "start_clip_iter": "optim.clip_start_step",
    "results_dir": "train.output_dir",
    "pretrained": "train.init_from",
    "max_train_steps": "train.max_steps",
    "local_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.grad_accum_steps",
    "ckpt_every": "train.checkpoint_every",
    "log_every": "train.log_every",
    "global_seed": "train.seed",
    "mixed_precision": "train.precision",
    "use_compile": "train.compile",
    # sampling
    "ckpt": "sample.ckpt",
    "save_img_path": "sample.save_video_path",
    "save_video_path": "sample.save_video_path",
    "seed": "sample.seed",
    "sample_method": "sample.method",
    "num_sampling_steps": "sample.steps",
    "cfg_scale": "sample.guidance_scale",
    "sample_names": "sample.labels",
    "use_fp16": "sample.precision",
    "per_proc_batch_size": "sample.batch_size",
    "num_fvd_samples": "sample.num_videos",
}

# official key -> why there is no such key here
DROPPED: dict[str, str] = {
    "resume_from_checkpoint": "train.resume=auto continues runs by itself; official files hold no optimizer state.",
    "extras": "model.num_classes alone says it: 0 is unconditional, more is class-conditional.",
    "fixed_spatial": "it froze every parameter there (nothing was left to train).",
    "attention_bias": "the attention projections always have their bias, as in the released weights.",
    "attention_mode": "train.attention names the kernel; all compute the same (docs/attention.md).",
    "enable_xformers_memory_efficient_attention": "attention uses PyTorch's fused kernels (docs/attention.md).",
    "frame_data_path": "joint training draws its images from the videos themselves (data.num_images).",
    "sequence_parallel_size": "a clip is never split over GPUs; train.parallel=fsdp spreads the weights.",
    "save_ceph": "no program read it; checkpoints go to train.output_dir.",
    "load_from_ceph": "data is read from data.path.",
    "negative_name": "the null label is the model's own.",
    "run_time": "no program for these data sets read it; the sample names are numbered.",
    "num_sample": "no program for these data sets read it; sample.num_videos is the number of videos.",
}

# official key -> conversion of its value; other values stay the same
VALUES: dict[str, Callable[[Any], Any]] = {
    "dataset": lambda name: str(name).removesuffix("_img"),
    "sample_method": lambda method: str(method).lower(),
    "use_fp16": lambda on: "fp16" if on else "fp32",
    "mixed_precision": lambda on: "bf16" if on else "tf32",
    "sample_names": lambda names: [str(name) for name in (names if isinstance(names, list) else [names])],
}

# official key -> remark in the translation report
REMARKS: dict[str, str] = {
    "pretrained_model_path": "the codec is its subfolder vae; text-to-video parts are not read.",
    "mixed_precision": "the official switch had no effect: it trained in tf32.",
    "gradient_accumulation_steps": "all step counts here are optimizer steps, not micro-batches.",
    "learning_rate": "the official programs always used 1e-4, whatever the file said.",
}

# official keys that have a counterpart but are not carried over -> the reason
OMITTED: dict[str, str] = {
    "frame_data_txt": "images are drawn from the videos; to use listed ones, put them below data.path and set "
    "data.frame_list.",
}

UNCONDITIONAL, TEXT = 1, 78  # values of the official key `extras`


def translate_config(official: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Returns the sections of our config, and a report line for each official key."""
    if official.get("extras") == TEXT or str(official.get("model", "")).startswith("LatteT2V"):
        raise ValueError(
            "this is a text-to-video config (model LatteT2V), and only those of ffs, sky, taichi and ucf101 are "
            "translated: pass it to sample/sample_t2x.py, which reads its keys and reports those replaced."
        )
    sections: dict[str, dict[str, Any]] = {}
    report = []
    for key, value in official.items():
        if key in DROPPED:
            report.append(f"dropped   {key}: {DROPPED[key]}")
        elif key not in RENAMED:
            report.append(f"unknown   {key}: not a key of the official configs; left out.")
        elif key in OMITTED:
            report.append(f"omitted   {key}: {OMITTED[key]}")
        elif value is None:
            report.append(f"empty     {key}: {RENAMED[key]} keeps its default.")
        else:
            section, _, name = RENAMED[key].partition(".")
            ours = VALUES.get(key, lambda same: same)(value)
            sections.setdefault(section, {})[name] = ours
            remark = f" ({REMARKS[key]})" if key in REMARKS else ""
            report.append(f"renamed   {key} -> {RENAMED[key]}: {ours}{remark}")
    if official.get("extras") == UNCONDITIONAL and sections.get("model", {}).pop("num_classes", None) is not None:
        report.append("note      num_classes: left out, since extras is 1 (unconditional).")
    if "path" in sections.get("codec", {}):
        sections["codec"]["subfolder"] = "vae"
    return sections, report


# ---- removed keys, values and flags ----------------------------------------------------------------

# `section.key`, `section.key=value` or `--flag` -> what to do instead
REMOVED: dict[str, str] = {
    "sample.cache": "the step cache was removed: sample.method=unipc with sample.steps=25 is as fast, more accurate.",
    "sample.modulation_mb": "modulations are now computed in every step: leave the key out.",
    "train.attention=triton": "that kernel is in benchmarks/candidates until it is timed on a GPU: use auto.",
    "--cache": "the step cache was removed: --method unipc --steps 25 is as fast and more accurate.",
}


def drop_removed(values: Mapping[str, Any], source: str, *, saved: bool = False) -> dict[str, Any]:
    """Returns nested configuration values without the keys and values of `REMOVED`; ValueError if one is used.

    Args:
        saved: `values` were written by a run, perhaps of an older version: removed keys are ignored. A removed key
            that is off (null, 0 or false) is always ignored.
    """
    kept = {section: dict(keys) if isinstance(keys, Mapping) else keys for section, keys in values.items()}
    for section, keys in values.items():
        for key, value in keys.items() if isinstance(keys, Mapping) else ():
            name = f"{section}.{key}"
            sentence = REMOVED.get(name) or REMOVED.get(f"{name}={value}")
            if sentence and value and not saved:
                raise ValueError(f"{source}: {name}={value}: {sentence}")
            if sentence:
                del kept[section][key]
    return kept


def refuse_removed_flags(argv: Sequence[str]) -> None:
    """Raises ValueError for a flag in `REMOVED`."""
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag in REMOVED:
            raise ValueError(f"{flag}: {REMOVED[flag]}")
