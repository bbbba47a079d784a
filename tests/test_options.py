"""Options from signatures and dataclasses: what is typed, what the function gets, and one line for each mistake."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import pytest

from launcher.config import AdapterConfig, Config, DataConfig
from launcher.options import Misread, Option, parse_call, parse_config


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where."""

    host: str
    """Name of the host."""
    env: tuple[str, ...] = ()
    """NAME=VALUE for every process."""
    port: int = 29500

    def __post_init__(self) -> None:
        if self.port > 65535:
            raise ValueError(f"--port must be at most 65535, got {self.port}")


def act(
    name: str,
    extra: tuple[str, ...] = (),
    *,
    place: Annotated[Place, Option(repeated=True)],
    how: Literal["fast", "slow"] | None = None,
    share: float = 0.5,
    check: bool = True,
    follow: Annotated[bool, Option(short="-f")] = False,
    cache_folder: Annotated[str | None, Option(name="cache")] = None,
    out: io.StringIO | None = None,
) -> dict:
    """Do it, 100 % of the time.

    Args:
        name: Of the thing.
        share: In the range 0..1, such as 50%.
    """
    return dict(  # noqa: C408
        name=name, extra=extra, place=place, how=how, share=share, check=check, follow=follow, cache=cache_folder
    )


def test_a_signature_becomes_positional_arguments_and_options():
    words = "thing more words --host a --env A=1 --env=B=2 --how slow --share 1e-1 --no-check -f --cache c"

    got = parse_call(act, words.split(), "loldu act")()

    assert got == {
        "name": "thing", "extra": ("more", "words"), "place": Place(host="a", env=("A=1", "B=2")), "how": "slow",
        "share": 0.1, "check": False, "follow": True, "cache": "c",
    }  # fmt: skip


def test_options_may_stand_between_positional_arguments_and_have_underscores_or_dashes():
    got = parse_call(act, ["--host=a", "thing", "--share=1", "more"], "loldu act")()

    assert (got["name"], got["extra"], got["share"]) == ("thing", ("more",), 1.0)
    assert parse_config(Config(), ["--max_length", "9"], "x") == parse_config(Config(), ["--max-length=9"], "x")


def test_a_value_may_begin_with_a_dash_after_an_equals_sign_and_a_number_anywhere():
    assert parse_call(act, ["x", "--host=--odd", "--share", "-3"], "loldu act")()["place"].host == "--odd"
    assert parse_call(act, ["x", "--host", "a", "--share", "-3"], "loldu act")()["share"] == -3


def test_nested_fields_that_are_not_given_keep_the_defaults_of_the_recipe():
    recipe = Config(adapter=AdapterConfig(rank=7, targets=("k_proj",)), data=DataConfig(eval_records=5))

    changed = parse_config(
        recipe, ["--rank", "9", "--options", "scale=2", "a=b", "--packing", "--sharding", "ddp"], "x"
    )

    adapter = replace(recipe.adapter, rank=9, options=("scale=2", "a=b"))
    assert changed.adapter == adapter
    assert changed.data == replace(recipe.data, packing=True)
    assert changed.run.sharding == "ddp"
    assert parse_config(recipe, [], "x") == recipe


def test_a_type_of_one_value_or_several_takes_both():
    assert parse_config(Config(), ["--data", "a"], "x").data.data == "a"
    assert parse_config(Config(), ["--data", "a", "b:0.5"], "x").data.data == ("a", "b:0.5")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("thing", "the following arguments are required: --host"),
        ("--host a", "the following arguments are required: NAME"),
        ("thing --host", "--host: expected one argument"),
        ("thing --host a --how quick", "--how: expected one of fast, slow, got 'quick'"),
        ("thing --host a --share much", "--share: expected a number, got 'much'"),
        ("thing --host a --port 1.5", "--port: expected a whole number, got '1.5'"),
        ("thing --host a --shar 1", "unknown option --shar; did you mean --share?"),
        ("thing --host a --no-how", "unknown option --no-how"),
        ("thing --host a --out x", "unknown option --out"),
        ("thing --host a --check=yes", "--check/--no-check: ignored explicit argument 'yes'"),
    ],
)
def test_a_mistake_is_one_line_with_the_way_to_the_help(words, message):
    with pytest.raises(Misread) as caught:
        parse_call(act, words.split(), "loldu act")

    assert message in str(caught.value)
    assert str(caught.value).endswith("(loldu act --help)")
    assert "\n" not in str(caught.value)


def test_an_error_of_a_dataclass_is_shown_unchanged():
    with pytest.raises(Misread, match=r"^--port must be at most 65535, got 70000$"):
        parse_call(act, ["thing", "--host", "a", "--port", "70000"], "loldu act")


def test_the_help_has_every_option_with_its_docstring_and_default(capsys):
    with pytest.raises(SystemExit) as left:
        parse_call(act, ["--help"], "loldu act")

    shown = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    assert "usage: loldu act [options] NAME EXTRA" in shown
    assert "Do it, 100 % of the time." in shown
    assert "NAME Of the thing." in shown
    assert "--share X In the range 0..1, such as 50%. (default: 0.5)" in shown
    assert "--env TEXT NAME=VALUE for every process." in shown
    assert "--how {fast,slow}" in shown
    assert "--out" not in shown


def test_every_field_of_the_config_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        parse_config(Config(), ["--help"], "loldu train x")

    lines = capsys.readouterr().out.splitlines()
    options = [at for at, line in enumerate(lines) if line.startswith("  --")]
    bare = [lines[at] for at in options if "   " not in lines[at].strip() and not lines[at + 1].startswith("      ")]
    assert len(options) > 50
    assert not bare


@pytest.mark.parametrize("words", [["--a=x\udcff"], ["--a", "\udcff"], ["--several", "x", "\ud800"]])
def test_bytes_that_are_no_text_are_refused_before_anything_starts(words):
    def function(*, a: str = "", several: tuple[str, ...] = ()) -> None: ...

    with pytest.raises(Misread, match=r"^--(a|several): expected text in UTF-8, got '.*' \(loldu x --help\)$"):
        parse_call(function, words, "loldu x")
