"""Recipes: the presets field by field, and refusals of what no implementation could tell apart or compute."""

from dataclasses import FrozenInstanceError, fields

import pytest

from nbfmha.recipe import PRESETS, Recipe, resolve_recipe

FP4_PV = {"pv": "nvfp4", "v_axis": "tokens"}
ROWS = {"scale_per": "row", "pv": "e4m3", "v_axis": "tokens"}
FOUR_OVER_SIX = {f"scale_{x}": "four_over_six" for x in "qkv"}


def test_presets():
    expected = {
        "naive": FP4_PV,
        "sage3": FP4_PV | {"smooth_k": True, "smooth_q": 128},
        "fast": FP4_PV | FOUR_OVER_SIX | {"smooth_k": True, "smooth_q": 64, "diagonal_tiles": 0, "sink_tokens": 64},
        "accurate": FOUR_OVER_SIX
        | {"pv": "f16", "v_axis": "tokens", "smooth_k": True, "smooth_q": 64, "diagonal_tiles": 1, "sink_tokens": 64},
        "legacy": ROWS | {"smooth_k": True},
    }
    assert list(PRESETS) == list(expected)
    for name, changed in expected.items():
        for field in fields(Recipe):
            assert getattr(PRESETS[name], field.name) == changed.get(field.name, field.default), (name, field.name)
    assert {name: recipe.has_windows for name, recipe in PRESETS.items()} == {
        "naive": False, "sage3": False, "fast": True, "accurate": True, "legacy": False,
    }  # fmt: skip


def test_a_recipe_is_a_value():
    assert Recipe(**FP4_PV) == PRESETS["naive"]
    assert {Recipe(): 1}[Recipe(smooth_k=False)] == 1
    with pytest.raises(FrozenInstanceError):
        Recipe().pv = "nvfp4"


@pytest.mark.parametrize(
    "change",
    [
        {"smooth_k": True},
        {"smooth_q": 64},
        {"smooth_q": 128},
        {"scale_q": "four_over_six"},
        {"scale_k": "four_over_six"},
        {"scale_v": "four_over_six"},
        {"v_format": "f16"},
        {"v_axis": "tokens"},
        {"diagonal_tiles": 0},
        {"diagonal_tiles": 3},
        {"sink_tokens": 128},
        {"qk": "f16"},
        {"qk": "f16", "v_format": "f16"},
        {"qk": "f16", "row_sum": "rounded", **FP4_PV},
        ROWS,
        {**ROWS, "smooth_q": 64, "row_sum": "rounded", "sink_tokens": 64, "diagonal_tiles": 1},
    ],
    ids=str,
)
def test_every_option_stands_alone(change):
    recipe = Recipe(**change)
    assert {name: getattr(recipe, name) for name in change} == change
    assert recipe.is_quantized == (change != {"qk": "f16", "v_format": "f16"})
    assert recipe.has_windows == ("diagonal_tiles" in change or "sink_tokens" in change)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"qk": "fp8"}, ValueError, "qk must be one of 'nvfp4', 'f16', got 'fp8'"),
        ({"pv": None}, ValueError, "pv must be one of 'f16', 'nvfp4', 'e4m3', got None"),
        ({"scale_per": "tensor"}, ValueError, "scale_per must be one of 'block', 'row', got 'tensor'"),
        ({"pv": "e4m3"}, ValueError, "scale_per must be 'row' with pv='e4m3', got 'block'; .*; pv='nvfp4' has"),
        ({"scale_per": "row"}, ValueError, "pv must be 'e4m3' with scale_per='row', got 'f16'; scale_per='block' takes"),
        ({**ROWS, "v_axis": "head_dim"}, ValueError, "v_axis must be 'tokens' with scale_per='row', got 'head_dim'"),
        ({**ROWS, "qk": "f16"}, ValueError, "qk must be 'nvfp4' with scale_per='row', got 'f16'"),
        ({**ROWS, "v_format": "f16"}, ValueError, "v_format must be 'nvfp4' with scale_per='row', got 'f16'"),
        ({**ROWS, "scale_k": "four_over_six"}, ValueError, "scale_k must be 'amax' with scale_per='row', got 'four"),
        ({"scale_v": "4/6"}, ValueError, "scale_v must be one of 'amax', 'four_over_six', got '4/6'"),
        ({"row_sum": "both"}, ValueError, "row_sum must be one of 'exact', 'rounded', got 'both'"),
        ({"smooth_k": 1}, TypeError, "smooth_k must be True or False, got 1"),
        ({"smooth_q": True}, TypeError, "smooth_q must be an integer, got True"),
        ({"smooth_q": 32}, ValueError, "smooth_q must be 64, 128 or None, got 32"),
        (
            {"diagonal_tiles": -1},
            ValueError,
            "diagonal_tiles must be >= 0 or None, got -1; 0 keeps the diagonal tile alone",
        ),
        ({"diagonal_tiles": 0.5}, TypeError, "diagonal_tiles must be an integer, got 0.5"),
        ({"sink_tokens": None}, TypeError, "sink_tokens must be an integer, got None; 0 keeps no key in 16 bits"),
        ({"sink_tokens": 16}, ValueError, "sink_tokens must be a multiple of 64, >= 0, got 16"),
        ({"sink_tokens": -64}, ValueError, "sink_tokens must be a multiple of 64, >= 0, got -64"),
        ({"pv": "nvfp4"}, ValueError, "v_axis must be 'tokens' with pv='nvfp4', got 'head_dim'; the block-scale MMA sums"),
        (
            {**FP4_PV, "v_format": "f16"},
            ValueError,
            "v_format must be 'nvfp4' with pv='nvfp4', got 'f16'; pv='f16' takes both",
        ),
        ({"qk": "f16", "smooth_k": True}, ValueError, "smooth_k must be False with qk='f16': nothing is .*, got True"),
        ({"qk": "f16", "smooth_q": 64}, ValueError, "smooth_q must be None with qk='f16'"),
        ({"qk": "f16", "scale_k": "four_over_six"}, ValueError, "scale_k must be 'amax' with qk='f16'"),
        ({"v_format": "f16", "scale_v": "four_over_six"}, ValueError, "scale_v must be 'amax' with v_format='f16'"),
        ({"v_format": "f16", "v_axis": "tokens"}, ValueError, "v_axis must be 'head_dim' with v_format='f16'"),
        ({"row_sum": "rounded"}, ValueError, "row_sum must be 'exact' with pv='f16', got 'rounded'"),
        (
            {"qk": "f16", "v_format": "f16", "sink_tokens": 64},
            ValueError,
            "sink_tokens must be 0 with everything in 16 bits",
        ),
    ],
)
def test_refusals(change, error, text):
    with pytest.raises(error, match=text):
        Recipe(**change)


def test_names():
    assert resolve_recipe("accurate") is PRESETS["accurate"]
    recipe = Recipe(smooth_k=True)
    assert resolve_recipe(recipe) is recipe
    with pytest.raises(ValueError, match=r"recipe must be one of 'naive', 'sage3', .*'legacy', got 'sage2'"):
        resolve_recipe("sage2")
    with pytest.raises(TypeError, match="recipe must be a Recipe or the name of a preset, got NoneType"):
        resolve_recipe(None)
