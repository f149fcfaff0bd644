"""NSAConfig: defaults, the paper's values, and every value it must refuse."""

import copy
import dataclasses
import enum
import functools
import pickle
import re

import pytest
import torch

import nsa

SIZES = [
    "compress_block_size",
    "compress_stride",
    "select_block_size",
    "num_selected_blocks",
    "window_size",
    "q_tile_size",
    "num_cmp_selected_blocks",
    "cmp_group_size",
]
FORCED = ["num_initial_blocks", "num_local_blocks"]
BOUNDED = [
    "compress_block_size",
    "compress_stride",
    "select_block_size",
    "q_tile_size",
    "cmp_group_size",
]


def test_defaults_are_tile_mode_for_long_context():
    assert dataclasses.asdict(nsa.NSAConfig()) == {
        "selection": "tile",
        "compress_block_size": 64,
        "compress_stride": 64,
        "select_block_size": 64,
        "num_selected_blocks": 16,
        "num_initial_blocks": 0,
        "num_local_blocks": 0,
        "window_size": 512,
        "q_tile_size": 256,
        "tile_summary": "first",
        "compressed_visibility": "complete",
        "num_cmp_selected_blocks": None,
        "cmp_group_size": 128,
        "causal": True,
        "scale": None,
    }


def test_paper_is_section_4_1():
    config = nsa.NSAConfig.paper()
    assert config.selection == "token"
    assert (config.compress_block_size, config.compress_stride) == (32, 16)
    assert (config.select_block_size, config.num_selected_blocks) == (64, 16)
    assert (config.num_initial_blocks, config.num_local_blocks) == (1, 2)
    assert config.window_size == 512
    assert nsa.NSAConfig.paper(window_size=7).window_size == 7


def test_stride_and_selection_block_default_to_the_compressed_block():
    config = nsa.NSAConfig(compress_block_size=16)
    assert (config.compress_stride, config.select_block_size) == (16, 16)


def test_mslk_is_the_published_system_that_sees_ahead():
    config = nsa.NSAConfig.mslk()
    ahead = dict(tile_summary="mean", compressed_visibility="started")
    assert config == dataclasses.replace(nsa.NSAConfig(), **ahead)
    assert nsa.NSAConfig.mslk(window_size=7) == dataclasses.replace(config, window_size=7)


def replacements(config):
    """The same by dataclasses.replace and after copies of the configuration."""
    for copied in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        yield functools.partial(dataclasses.replace, copied)


def test_defaults_follow_a_replaced_block_size():
    for replace in replacements(nsa.NSAConfig(compress_block_size=64)):
        assert replace(compress_block_size=32) == nsa.NSAConfig(compress_block_size=32)
        once_more = dataclasses.replace(replace(window_size=7), compress_block_size=32)
        assert once_more == nsa.NSAConfig(compress_block_size=32, window_size=7)
    token = nsa.NSAConfig(selection="token", compress_block_size=64)
    for replace in replacements(token):
        config = replace(compress_block_size=128)
        assert (config.compress_stride, config.select_block_size) == (128, 128)


def test_fields_are_saved_as_plain_values(tmp_path):
    config = nsa.NSAConfig(compress_block_size=32)
    torch.save(dataclasses.asdict(config), tmp_path / "config.pt")
    settings = torch.load(tmp_path / "config.pt", weights_only=True)
    assert nsa.NSAConfig(**settings) == config
    assert type(settings["compress_stride"]) is int
    assert type(copy.deepcopy(config.compress_stride)) is int
    torch.save({f.name: getattr(config, f.name) for f in dataclasses.fields(config)},
               tmp_path / "config.pt")  # fmt: skip
    assert torch.load(tmp_path / "config.pt", weights_only=True) == settings


def test_members_of_enums_are_kept_as_plain_values(tmp_path):
    class Mode(enum.StrEnum):
        TOKEN = "token"

    class Size(enum.IntEnum):
        LARGE = 64

    sizes = dict(window_size=Size.LARGE, compress_block_size=Size.LARGE, compress_stride=Size.LARGE)
    config = nsa.NSAConfig(selection=Mode.TOKEN, num_cmp_selected_blocks=None, **sizes)
    settings = dataclasses.asdict(config)
    assert {type(x) for x in settings.values()} == {str, int, bool, type(None)}
    torch.save(settings, tmp_path / "config.pt")
    assert nsa.NSAConfig(**torch.load(tmp_path / "config.pt", weights_only=True)) == config


def test_given_sizes_do_not_follow():
    token = nsa.NSAConfig(selection="token", compress_block_size=64)
    for replace in replacements(token):
        # The value of the default, but given.
        config = replace(compress_block_size=128, compress_stride=64, select_block_size=64)
        assert (config.compress_stride, config.select_block_size) == (64, 64)
    config = nsa.NSAConfig.paper(
        compress_block_size=128,
        compress_stride=token.compress_stride,
        select_block_size=token.select_block_size,
    )
    assert (config.compress_stride, config.select_block_size) == (64, 64)
    config = dataclasses.replace(nsa.NSAConfig.paper(), compress_block_size=64)
    assert (config.compress_stride, config.select_block_size) == (16, 64)
    again = nsa.NSAConfig(**(dataclasses.asdict(token) | {"compress_block_size": 128}))
    assert (again.compress_stride, again.select_block_size) == (64, 64)


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (2, 2.0), (1.0, True + 0.0)])
def test_equal_configs_have_equal_hashes(one, other):
    one, other = nsa.NSAConfig(scale=one), nsa.NSAConfig(scale=other)
    assert one == other
    assert hash(one) == hash(other)
    assert one.encoded == other.encoded
    assert nsa.NSAConfig.decode(one.encoded) == other


@pytest.mark.parametrize("value", [2**31 - 1, 2**31, 2**31 + 1, 2**63 - 1, 2**63, 2**100])
@pytest.mark.parametrize("name", SIZES + FORCED)
def test_huge_values_are_valid_or_refused(name, value):
    settings = {name: value}
    if name == "compress_block_size":
        settings["selection"] = "token"
    elif name in ("compress_stride", "select_block_size"):
        settings |= dict(compress_block_size=value, selection="token")
    elif name in FORCED:
        settings["num_selected_blocks"] = value
    if name in BOUNDED and value >= 2**31:
        with pytest.raises(ValueError, match=rf"must be at most {2**31 - 1}, got {value}"):
            nsa.NSAConfig(**settings)
    else:
        assert getattr(nsa.NSAConfig(**settings), name) == value


def test_configs_are_frozen_hashable_and_comparable():
    config = nsa.NSAConfig()
    assert config == nsa.NSAConfig(compress_stride=64)
    assert hash(config) == hash(nsa.NSAConfig())
    assert config != nsa.NSAConfig(window_size=1)
    assert dataclasses.replace(config, window_size=1) == nsa.NSAConfig(window_size=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window_size = 3


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_are_at_least_one(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be at least 1, got {value}"):
        nsa.NSAConfig(**{name: value})


@pytest.mark.parametrize("name", FORCED)
def test_forced_counts_are_not_negative(name):
    with pytest.raises(ValueError, match=rf"{name} must be at least 0, got -1"):
        nsa.NSAConfig(**{name: -1})


@pytest.mark.parametrize("name", SIZES + FORCED)
@pytest.mark.parametrize("value", [4.0, "4", True, [4]], ids=repr)
def test_sizes_are_ints(name, value):
    with pytest.raises(TypeError, match=rf"{name} must be an int, got "):
        nsa.NSAConfig(**{name: value})


@pytest.mark.parametrize("name", ["num_selected_blocks", "window_size", "q_tile_size"])
def test_none_is_no_size(name):
    with pytest.raises(TypeError, match=rf"{name} must be an int, got None"):
        nsa.NSAConfig(**{name: None})


@pytest.mark.parametrize("name", ["selection", "tile_summary", "compressed_visibility"])
@pytest.mark.parametrize("value", ["both", None, 3, ["tile"]], ids=repr)
def test_choices_list_what_is_valid(name, value):
    with pytest.raises(
        (ValueError, TypeError), match=rf"{name} must be one of .*'.*got {re.escape(repr(value))}"
    ):
        nsa.NSAConfig(**{name: value})


@pytest.mark.parametrize("value", [1, None, "yes"], ids=repr)
def test_causal_is_a_bool(value):
    with pytest.raises(TypeError, match=rf"causal must be a bool, got {value!r}"):
        nsa.NSAConfig(causal=value)


@pytest.mark.parametrize("value", ["1", True, [1.0]], ids=repr)
def test_scale_is_a_number(value):
    with pytest.raises(TypeError, match="scale must be a float or None, got "):
        nsa.NSAConfig(scale=value)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 0.0, -1.0, 10**400], ids=lambda x: str(x)[:5]
)
def test_scale_is_finite_and_positive(value):
    with pytest.raises(ValueError, match=rf"scale must be finite and positive, got {value}"):
        nsa.NSAConfig(scale=value)


@pytest.mark.parametrize("value", [1e300, 1e39, 1e-39, 1e-300])
def test_scale_is_in_the_range_of_float32(value):
    message = f"scale must lie in [1.18e-38, 3.40e+38], the range of float32, got {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        nsa.NSAConfig(scale=value)


RELATIONS = {
    "stride does not divide l": (
        dict(selection="token", compress_block_size=30, compress_stride=16, select_block_size=64),
        r"compress_stride must divide compress_block_size.*16.*30",
    ),
    "stride does not divide l'": (
        dict(selection="token", compress_block_size=32, compress_stride=16, select_block_size=40),
        r"compress_stride must divide select_block_size.*16.*40",
    ),
    "more forced than selected": (
        dict(num_selected_blocks=3, num_initial_blocks=2, num_local_blocks=2),
        r"num_selected_blocks must be at least num_initial_blocks \+ num_local_blocks = 4, got 3",
    ),
    "overlapping blocks in tile mode": (
        dict(compress_block_size=32, compress_stride=16, select_block_size=64),
        r"compress_stride must equal compress_block_size=32 with selection='tile', got 16",
    ),
    "l does not divide l' in tile mode": (
        dict(compress_block_size=32, select_block_size=48),
        r"compress_stride must divide select_block_size|select_block_size must be a multiple",
    ),
    "sparse compressed branch in token mode": (
        dict(selection="token", num_cmp_selected_blocks=2),
        r"num_cmp_selected_blocks must be None with selection='token', got 2",
    ),
}


@pytest.mark.parametrize("case", RELATIONS)
def test_fields_must_agree(case):
    settings, message = RELATIONS[case]
    with pytest.raises(ValueError, match=message):
        nsa.NSAConfig(**settings)


def test_forced_blocks_may_fill_the_selection():
    config = nsa.NSAConfig(num_selected_blocks=3, num_initial_blocks=1, num_local_blocks=2)
    assert config.num_selected_blocks == 3
