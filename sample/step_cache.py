"""Which evaluations of a walk run all layers of the network; in the others a range of them is not run.

From one timestep to the next the layers add nearly the same to the tokens. A schedule, fitted once by
`python -m tools.fit_cache` for one network and one way of sampling, says where what they added last is added again.
It is static: known on the host before the walk begins, so that nothing waits for the device and there are two graphs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class CacheSchedule:
    """A fitted schedule.

    Attributes:
        computed: of each evaluation, whether all layers run.
        first_layer, end_layer: layers from the first to before the end are those left out.
        network_sha256: of the weights it was fitted to.
        settings: of the sampler it was fitted to.
        predicted_error: sum over the evaluations of what reuse does to the predicted clean clip, root mean square.
    """

    computed: tuple[bool, ...]
    first_layer: int
    end_layer: int
    network_sha256: str
    settings: dict[str, Any]
    predicted_error: float

    @classmethod
    def load(cls, path: str | Path) -> CacheSchedule:
        """Read one that `save` wrote.

        Raises:
            OSError, ValueError: it is not there, or not one; the message names the file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"sample.cache: there is no file {path}; python -m tools.fit_cache makes one.")
        try:
            content = json.loads(path.read_text())
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            found = cls(**{item.name: content[item.name] for item in fields(cls)})
            computed = tuple(map(bool, found.computed))
            whole = computed and computed[0] and 0 <= found.first_layer < found.end_layer
            if not whole or not isinstance(found.settings, dict):
                raise ValueError("it makes no sense")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"sample.cache: {path} is not what tools.fit_cache writes; fit another.") from None
        return cls(**{**asdict(found), "computed": computed})

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(self._text())

    @property
    def sha256(self) -> str:
        """Of what it says, however its file is written."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def _text(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    def check(self, network_sha256: str, settings: Mapping[str, Any], evaluations: int, layers: int) -> None:
        """ValueError, one sentence, unless it was fitted to this network and these settings."""
        if network_sha256 != self.network_sha256:
            raise ValueError("sample.cache was fitted to other weights than these: fit one with tools.fit_cache.")
        now = json.loads(json.dumps(dict(settings)))
        before = self.settings
        differing = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
        if differing:
            raise ValueError(
                f"sample.cache was fitted to another way of sampling ({', '.join(differing)}): fit one to this with "
                "tools.fit_cache, or sample as it was fitted."
            )
        if len(self.computed) != evaluations or self.end_layer > layers:
            raise ValueError("sample.cache does not fit its own settings: it was edited; fit one with tools.fit_cache.")
