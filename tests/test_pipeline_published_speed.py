"""The published measurements give the paper's headline numbers back, so they were copied as they stand."""

import pytest

from labkit.pipeline import published_speed as speed

FULL = speed.MODELS[:4]  # those that are trained whole


def test_the_headline():
    """1.66, 1.48, 2.16, 2.16 on eight RTX 4090, and 1.15 to 1.63 with synchronous updates; 235B has no rival there."""
    late, strict = speed.gain(speed.TOKENS_4090, "RoundPipe"), speed.gain(speed.TOKENS_4090, "RoundPipe-sync")
    assert set(late) == set(FULL)
    assert [late[model] for model in FULL] == pytest.approx([1.66, 1.48, 2.16, 2.16], abs=0.005)
    assert (min(strict.values()), max(strict.values())) == pytest.approx((1.15, 1.63), abs=0.005)


def test_other_cards_and_lengths():
    """0.98 to 1.47 on A800 for models trained whole; 4.7 to 7.3 times the length, if Megatron-TP does not count."""
    card = speed.gain(speed.TOKENS_A800, "RoundPipe")
    assert set(card) == set(speed.MODELS)
    assert [min(card[m] for m in FULL), max(card[m] for m in FULL)] == pytest.approx([0.975, 1.473], abs=0.001)
    length = speed.gain(speed.LENGTHS_4090, "RoundPipe", leave_out=("Megatron-TP",))
    assert (min(length.values()), max(length.values())) == pytest.approx((4.67, 7.3), abs=0.01)
    assert speed.gain(speed.LENGTHS_4090, "RoundPipe")["Qwen3-1.7B"] == pytest.approx(73 / 62)


def test_every_table_has_the_five_models():
    for table in (speed.TOKENS_4090, speed.TOKENS_A800, speed.LENGTHS_4090):
        assert all(len(row) == len(speed.MODELS) for row in table.values())
    assert tuple(speed.SCALING) == tuple(speed.WIDTHS) == speed.MODELS
    for place, model in enumerate(speed.MODELS):
        assert len(speed.SCALING[model]) == 8 and speed.SCALING[model][-1] == speed.TOKENS_4090["RoundPipe"][place]
        assert list(speed.SCALING[model]) == sorted(speed.SCALING[model])
