"""Regular expressions of an adapter's config: those that never end are refused in seconds, and words are not tried."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.inference import patterns
from launcher.inference.patterns import check_patterns

NAMES = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(4)]
FOREVER = "(a+)+$|(.*)*(.*)*(.*)*x"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": FOREVER},
        {"exclude_modules": FOREVER},
        {"rank_pattern": {FOREVER: 4}},
        {"layers_pattern": [FOREVER]},
    ],
)
def test_an_expression_that_takes_for_ever_is_refused_with_the_file_that_holds_it(fields, monkeypatch):
    monkeypatch.setattr(patterns, "LIMIT_S", 0.5)

    with pytest.raises(ValueError, match=r"folder/adapter_config.json: matching .* takes more than"):
        check_patterns(SimpleNamespace(**fields), NAMES, Path("folder"))


def test_an_expression_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        check_patterns(SimpleNamespace(alpha_pattern={"(": 1}), NAMES, Path("folder"))


def test_sound_expressions_pass_and_words_start_no_process(monkeypatch):
    check_patterns(SimpleNamespace(target_modules=r".*\.(q|v)_proj"), NAMES, Path("folder"))
    monkeypatch.setattr(patterns.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))

    check_patterns(
        SimpleNamespace(target_modules={"q_proj"}, rank_pattern={"layers.0.q_proj": 2}), NAMES, Path("folder")
    )
    check_patterns(SimpleNamespace(target_modules="all-linear"), NAMES, Path("folder"))
