"""TurboConfig: valid choices, helpful errors, and the environment variable HF_TURBO."""

from dataclasses import fields

import pytest

from hf_turbo import TurboConfig

NAMES = [field.name for field in fields(TurboConfig)]
CHOICES = ("max_tokens_per_pass", "memory", "memory_budget", "bf16_weights", "optim")
SWITCHES = [name for name in NAMES if name not in CHOICES]


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", [True, False])
def test_every_feature_can_be_asked_for_and_turned_off(name, value):
    assert getattr(TurboConfig(**{name: value}), name) is value


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", ["fast", "True", "", 1, 0, None, 1.0, [], {}])
def test_other_values_raise_and_name_the_choices(name, value):
    """1 == True, but a switch that takes numbers would take any number: 0 and 1 are refused as well."""
    with pytest.raises(ValueError, match=rf"{name}=.*choose one of .*True, False"):
        TurboConfig(**{name: value})


def test_a_number_of_tokens():
    assert TurboConfig().max_tokens_per_pass is None
    assert TurboConfig(max_tokens_per_pass=4096).max_tokens_per_pass == 4096
    for value in (True, 0, -1, 1.0, "4096"):
        with pytest.raises(ValueError, match=r"max_tokens_per_pass=.*a number of tokens"):
            TurboConfig(max_tokens_per_pass=value)


def test_memory():
    for choice in ("auto", "as_is", "max_speed", "min_memory"):
        assert TurboConfig(memory=choice).memory == choice
    for value in (True, False, None, "fast", 1, []):
        with pytest.raises(ValueError, match=r"memory=.*choose one of 'auto', 'as_is', 'max_speed', 'min_memory'"):
            TurboConfig(memory=value)


def test_bf16_weights():
    assert TurboConfig().bf16_weights == "as_is"
    assert TurboConfig(bf16_weights="exact_master").bf16_weights == "exact_master"
    for value in (True, False, None, "auto", "exact"):
        with pytest.raises(ValueError, match=r"bf16_weights=.*'as_is', 'exact_master', 'stochastic_rounding'"):
            TurboConfig(bf16_weights=value)


def test_optim():
    assert TurboConfig().optim == "auto"
    assert TurboConfig(optim="paged_adamw_8bit").optim == "paged_adamw_8bit"
    for value in (True, False, None, "sgd", "lomo"):
        with pytest.raises(ValueError, match=r"optim=.*choose one of 'auto', 'adamw_torch'.*'paged_adamw_8bit'"):
            TurboConfig(optim=value)


def test_memory_budget():
    assert TurboConfig().memory_budget is None
    for value in ("8GiB", 0.6, "0.6", 10**9):
        assert TurboConfig(memory_budget=value).memory_budget == value
    for value in (True, False, "big", 0, -1, 0.0, 100, []):
        with pytest.raises(ValueError, match=r"memory_budget=.*'8GiB'"):
            TurboConfig(memory_budget=value)


def test_a_number_of_numpy_is_no_switch():
    numpy = pytest.importorskip("numpy")
    with pytest.raises(ValueError, match="choose one of"):
        TurboConfig(norms=numpy.True_)


def test_unknown_option_lists_the_valid_ones_and_the_nearest():
    with pytest.raises(TypeError) as caught:
        TurboConfig.from_options(rop=False)
    assert "Did you mean 'rope'?" in str(caught.value)
    assert all(name in str(caught.value) for name in NAMES)


def test_unknown_option_unlike_any_valid_one_has_no_guess():
    with pytest.raises(TypeError, match=r"no option 'zzz'\. Valid options"):
        TurboConfig.from_options(zzz=1)


def test_every_field_is_documented():
    for name in NAMES:
        assert f"\n        {name}: " in TurboConfig.__doc__


@pytest.mark.parametrize("value", [None, "", "  ", "0", "false", "False", "OFF", "no"])
def test_environment_says_off(value):
    assert TurboConfig.from_env(value) is None


@pytest.mark.parametrize("value", ["1", "true", "True", "ON", "yes", " 1 ", "{}"])
def test_environment_says_on(value):
    assert TurboConfig.from_env(value) == TurboConfig()


def test_environment_names_options():
    assert TurboConfig.from_env('{"rope": false, "loss": true}') == TurboConfig(rope=False, loss=True)


@pytest.mark.parametrize("value", ["2", "yess", "[]", "null", '"1"', "{rope: false}", '{"rope": false'])
def test_environment_neither_switch_nor_options(value):
    with pytest.raises(ValueError, match=r"HF_TURBO=.*use 1, 0 or a JSON object"):
        TurboConfig.from_env(value)


@pytest.mark.parametrize(("value", "error"), [('{"rop": true}', TypeError), ('{"rope": "no"}', ValueError)])
def test_environment_with_wrong_options(value, error):
    with pytest.raises(error, match="rope"):
        TurboConfig.from_env(value)
