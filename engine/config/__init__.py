"""The typed configuration: defaults, then YAML, then `key=value`; unknown keys are refused with a hint."""

from .loading import MAX_YAML_CHARACTERS, all_keys, load_config, read_yaml
from .rules import Config
from .sections import (
    LABEL_RULES,
    MonitorConfig,
    ObjectiveConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    window_overlap,
)
