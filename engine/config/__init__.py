"""The typed configuration: defaults, then YAML, then `key=value`; unknown keys are refused with a hint."""

from .checks import (
    FINITE,
    NOT_NEGATIVE,
    Limit,
    at_least,
    check_limits,
    check_read_only_with,
    one_of,
    optional,
    within,
)
from .loading import MAX_YAML_CHARACTERS, all_keys, load_config, one_line, read_yaml
from .rules import Config
from .sections import (
    FRAME_LIMITS,
    LABEL_RULES,
    SAMPLE_PRECISIONS,
    SEED,
    MonitorConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    check_frame_keys,
    window_overlap,
)

__all__ = [
    "FINITE",
    "FRAME_LIMITS",
    "LABEL_RULES",
    "MAX_YAML_CHARACTERS",
    "NOT_NEGATIVE",
    "SAMPLE_PRECISIONS",
    "SEED",
    "Config",
    "Limit",
    "MonitorConfig",
    "OptimConfig",
    "SampleConfig",
    "TrainConfig",
    "all_keys",
    "at_least",
    "check_frame_keys",
    "check_limits",
    "check_read_only_with",
    "load_config",
    "one_line",
    "one_of",
    "optional",
    "read_yaml",
    "window_overlap",
    "within",
]
