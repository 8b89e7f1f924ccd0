"""The `model` section: official names and sizes, and one sentence with the key for every mistake."""

import re

import pytest

from models import LatteConfig
from models.config import NAMES
from tests.conftest import refuses

CUSTOM = {"name": "custom", "hidden_size": 16, "depth": 4, "num_heads": 4, "patch_size": 2}
OFFICIAL = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def test_official_names() -> None:
    assert len(NAMES) == 12
    for name in NAMES:
        letters, patch = name.removeprefix("Latte-").split("/")
        assert LatteConfig(name=name).size == (*OFFICIAL[letters], int(patch))
        assert LatteConfig(name=name.replace("Latte-", "LatteIMG-")).size == LatteConfig(name=name).size


def test_null_label_row() -> None:
    assert LatteConfig(num_classes=3).has_null_label
    assert not LatteConfig(num_classes=3, label_dropout=0.0).has_null_label
    assert not LatteConfig().has_null_label


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "Latte-XL2"}, ["model.name", "'Latte-XL2'", "did you mean Latte-XL/2?"]),
        ({"name": "zzz"}, ["model.name", "'zzz'", "Latte-S/8", "custom"]),
        ({"name": "custom", "depth": 2}, ["model.hidden_size", "model.num_heads", "model.patch_size"]),
        ({"depth": 3}, ["Latte-XL/2", "model.depth", "null"]),
        ({**CUSTOM, "depth": 3}, ["model.depth", "even", "interleaved", "3"]),
        ({**CUSTOM, "hidden_size": 18}, ["model.hidden_size", "divisible by 4", "18"]),
        ({**CUSTOM, "num_heads": 3}, ["model.hidden_size (16)", "model.num_heads (3)"]),
        ({**CUSTOM, "num_heads": 1, "variant": "parallel"}, ["model.num_heads", "even", "parallel", "1"]),
        ({**CUSTOM, "num_heads": 16, "temporal_position": "rope"}, ["rope", "even", "model.num_heads 16"]),
        ({"variant": "late"}, ["model.variant", "late_fusion", "'late'"]),
        ({"patch_embedding": "tube"}, ["model.patch_embedding", "tubelet", "'tube'"]),
        ({"patch_embedding": "tubelet", "tubelet_size": 1}, ["model.tubelet_size", "1", "uniform"]),
    ],
)
def test_mistakes_are_answered_with_a_sentence(fields: dict, words: list[str]) -> None:
    refuses(".*".join(map(re.escape, words)), LatteConfig, **fields)


def test_one_head_per_pair_is_enough_in_parallel_rope() -> None:
    """Half the heads are twice as wide, so an odd width of a head becomes an even one."""
    odd = {**CUSTOM, "hidden_size": 12, "num_heads": 4, "temporal_position": "rope"}
    refuses("even", LatteConfig, **odd)
    assert LatteConfig(**odd, variant="parallel").head_width == 6
