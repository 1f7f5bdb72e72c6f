"""What a start says of a model that is computed or synced wrongly."""

from dataclasses import replace

from kit.diagnostics.agreement import Agreement

RIGHT = Agreement(
    trainer=1e-6, prefill=1e-6, decode=1e-6, bound=1e-4, longest=64, lost=(),
    resynced=1e-6, resynced_bound=1e-3,
)  # fmt: skip


def test_an_engine_that_keeps_what_it_made_of_its_first_weights_is_told_from_a_wrong_one() -> None:
    assert RIGHT.agrees
    kept = replace(RIGHT, resynced=0.18)
    assert not kept.agrees
    text = str(kept.problem("m", []))
    assert text.startswith(
        "The engine goes on computing m with something that it made of its first"
    )
    assert "After a sync of other weights it is 0.18 nats a token off" in text
    assert "rounding may cause 0.001." in text
    assert "within the window" not in text
    both = str(replace(kept, decode=0.5).problem("m", []))
    assert both.startswith("m is computed otherwise than Transformers does: the engine, writing")
    assert "; the engine goes on computing m" in both
    assert "within the window" in both
    assert not replace(RIGHT, resynced=float("nan")).agrees


def test_a_weight_that_no_sync_brings_is_named() -> None:
    lost = replace(RIGHT, lost=("a", "b"))
    assert not lost.agrees
    assert "2 weights of m would not reach the engine after an update (a, b)" in str(
        lost.problem("m", [])
    )
