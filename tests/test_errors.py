"""An error says what happened, why, and what to do, and keeps that on its way out of an actor."""

import pickle

import pytest

import kit
from kit.errors import KitError, did_you_mean

KINDS = sorted(
    (
        kind
        for name in kit.__all__
        if isinstance(kind := getattr(kit, name), type) and issubclass(kind, KitError)
    ),
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_error_crosses_to_another_process_with_its_parts(
    kind: type[KitError],
) -> None:
    error = kind("The rate is 7.", why="Rates end at 1.", fix="set training.eps_clip to 0.2.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.what, copy.why, copy.fix) == (error.what, error.why, error.fix)
    assert str(copy) == str(error)


def test_every_error_the_kit_exports_is_a_kit_error() -> None:
    assert {kind.__name__ for kind in KINDS} == {n for n in kit.__all__ if n.endswith("Error")}


def test_the_message_is_what_why_and_the_way_out_on_lines_of_their_own() -> None:
    error = KitError("It broke.", why="It was old.", fix="buy a new one.")
    assert str(error) == "It broke.\nIt was old.\nWhat to do: buy a new one."


def test_parts_that_are_not_given_leave_no_trace_in_the_message() -> None:
    assert str(KitError("It broke.")) == "It broke."
    assert str(KitError("It broke.", fix="mend it.")) == "It broke.\nWhat to do: mend it."


def test_a_near_word_is_suggested_and_a_far_one_gets_the_list_in_order() -> None:
    assert did_you_mean("rewrad", ["reward", "model"]) == "Did you mean 'reward'?"
    assert did_you_mean("zzz", ["reward", "model"]) == "Known: model, reward."


def test_the_message_of_an_error_can_be_sent_to_a_notebook_whatever_it_quotes() -> None:
    error = KitError("No number in 'half \ud800 a pair'.")
    assert str(error).encode("utf-8") == b"No number in 'half \\ud800 a pair'."
