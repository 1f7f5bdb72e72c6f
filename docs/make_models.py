"""Make the table of families in `docs/models.md`, of what sessions with each have measured.

    .venv/bin/python docs/make_models.py                      the table, of docs/models.json
    .venv/bin/python docs/make_models.py --measure [FAMILY]   measure first; half an hour for all
    ... --measure --device cuda --at-once 6                   on a GPU, six sessions at a time

A tiny model of random weights (`tests/small_models.py`) is started on a CPU in float32 in each way
that there is for it, is updated once, and synced. Measured is the mean |difference| of log-probs,
in nats a token, from Transformers (eager attention, one sequence after the other) with the same
weights: those of the start, and those that the session exports after the sync.

On a GPU the model has heads of 64 numbers, and the session computes in bfloat16; the results are
those whose names begin with `gpu`.

What is measured need not be in the family's record yet: the record's own refusals are off here.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

RESULTS, PAGE = ROOT / "docs" / "models.json", ROOT / "docs" / "models.md"
BEGIN, END = "<!-- made by docs/make_models.py -->", "<!-- end -->"
ROWS = [{"prompt": f"{a}+{a + 1}=", "label": str(2 * a + 1)} for a in range(12, 20)]
BOUND = 1e-4
WAYS = ("plain", "merged", "adapter", "replay", "drafts", "exact")
"""`merged` and `adapter` train adapters, which reach the engine so; `exact` is true_on_policy;
`drafts` of n-grams are verified by the model."""
ON_GPU = ("plain", "merged", "adapter", "replay", "exact")
"""Of them, those that run on a GPU."""
CARD_GIB = 14.0
"""Memory of a GPU that one session may take."""
Result = dict[str, Any]


# ---- measuring ---------------------------------------------------------------------------------


def settings(folder: Path, way: str, device: str) -> Result:
    """Settings of a session of this model in this way."""
    config: Result = {
        "model": {"name": str(folder)},
        "device": device,
        "rollout": {"max_response_len": 24},
        "engine": {"replicas": 1},
        "training": {
            "rollout_batch_size": 2,
            "n_samples_per_prompt": 2,
            "learning_rate": 1e-2,
        },
    }
    if device == "cuda":
        config["memory"] = {"device_gib": CARD_GIB}
    if way in ("merged", "adapter"):
        config["model"]["lora"] = {"r": 4, "target_modules": adapted(folder)}
        config["engine"]["lora"] = way
    if way == "replay":
        config["training"]["use_rollout_routing_replay"] = True
    if way == "drafts":
        config["engine"]["speculative"] = {"algorithm": "ngram"}
    if way == "exact":
        config["training"]["true_on_policy"] = True
    return config


def adapted(folder: Path) -> list[str] | str:
    """What gets adapters: every linear layer, and beside experts those of attention."""
    from kit.models.source import ExpertLayout, stored_shapes
    from kit.utils.reading import read_json

    if ExpertLayout.read(folder, read_json(folder / "config.json", unique=False)) is None:
        return "all-linear"
    named = stored_shapes(folder).items()
    paths = [name.removesuffix(".weight") for name, shape in named if len(shape) == 2]
    return sorted({path.rpartition(".")[2] for path in paths if "attn" in path})


@contextmanager
def without_refusals() -> Iterator[None]:
    """Start families that their records do not know yet; `refused` ones stay refused."""
    from kit.models.families import Family

    check: Any = Family.check
    kind: Any = Family

    def of_known(family: Any, config: Any, path: str, device: str) -> None:
        from dataclasses import replace

        known = replace(family, adapts=True, engine_adapts=True, replays=True, drafts=True)
        check(known, config, path, device)

    kind.check = of_known
    try:
        yield
    finally:
        kind.check = check


def measured(folder: Path, way: str, device: str, cache: Path) -> Result:
    """What a session with a model gives; `refused`, if it does not start.

    `cache` is the user's cache, where a start notes what it saw.
    """
    from kit import RLSession, SessionConfig
    from kit.errors import KitError

    notes = cache / "kit" / "agreement"
    shutil.rmtree(notes, ignore_errors=True)
    try:
        with (
            without_refusals(),
            RLSession.start(SessionConfig(**settings(folder, way, device)), data=ROWS) as session,
        ):
            found = trained(session, folder.with_name(f"{way}-export"))
            session.close()
    except KitError as error:
        print(error)
        lines = str(error).replace(str(folder), "The model").splitlines()
        return {"refused": lines[0], "why": "\n".join(lines[1:])[:2000]}
    for note in notes.glob("*.json"):
        seen = json.loads(note.read_text())
        found |= {key: seen[key] for key in ("trainer", "prefill", "decode", "rounding")}
    return found


def trained(session: Any, export: Path) -> Result:
    """One update and a sync; how far both sides are off the model that is exported then."""
    rollout = session.score(session.generate(), reward=lambda sample: float(sample.index % 2))
    metrics = session.update(session.advantages(rollout)).metrics
    report = session.sync(verify=True)
    rollout = session.generate()
    mismatch = session.check_mismatch(rollout)
    session.export_hf(export, dtype="float32")
    expected = by_transformers(export, rollout)
    found = {
        "updated": gap([value for each in rollout for value in each.rollout_log_probs], expected),
        "mismatch": mismatch.mean_abs_diff,
        "synced": report.verified,
        "moved": metrics["train/grad_norm"],
    }
    if session.config.device == "cuda":
        found["updated rounding"] = gap(by_transformers(export, rollout, "bfloat16"), expected)
    if any(sample.rollout_routed_experts for sample in rollout):
        found["overlap"] = metrics["train/routing/overlap"]
    return found


def gap(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean |difference| of two rows of numbers."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def by_transformers(folder: Path, rollout: Any, dtype: str = "float32") -> list[float]:
    """Log-probs of the responses by the model in a directory, computed in a dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    from kit.models import own

    own.register(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
    values: list[float] = []
    with torch.no_grad():
        for sample in rollout:
            row, count = sample.tokens, sample.response_length
            logits = model(torch.tensor([row])).logits[0, len(row) - count - 1 : -1]
            logp = logits.float().log_softmax(-1)
            values += logp[torch.arange(count), row[-count:]].tolist()
    return values


def ways_of(family: str, folder: Path) -> list[str]:
    """The ways in which a family can be measured."""
    from kit.models.families import find
    from kit.utils.reading import read_json

    config = read_json(folder / "config.json", unique=False)
    record = find(config["architectures"][0])
    experts = any(key in config for key in ("num_experts", "n_routed_experts", "num_local_experts"))
    left_out = set() if experts else {"replay"}
    if not record.exact or "window" in family or "rope" in family or "yarn" in family:
        left_out.add("exact")
    return [way for way in WAYS if way not in left_out]


def measure(families: Sequence[str], ways: Sequence[str], device: str, file: Path) -> None:
    """Measure families in some ways, and write each result to a file as it comes."""
    import torch

    from tests.small_models import larger, make_model

    cache = Path(tempfile.mkdtemp())
    os.environ["XDG_CACHE_HOME"] = str(cache)
    prefix = "gpu " if device == "cuda" else ""
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            if device == "cuda":
                model = make_model(path, family, dtype=torch.bfloat16, **larger(family))
            else:
                model = make_model(path, family)
            for way in [way for way in ways_of(family, model) if way in ways]:
                found = measured(model, way, device, cache)
                print(family, way, found, flush=True)
                write(file, {family: {prefix + way: found}})
                if way == "plain" and "refused" in found:
                    break


def measure_at_once(
    families: Sequence[str], ways: Sequence[str], device: str, count: int, minutes: float
) -> None:
    """Measure families, each in a process of its own, so many at a time; as far as time allows."""
    end = time.monotonic() + 60 * minutes
    cards = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")

    def one(family: str, place: int) -> None:
        file = RESULTS.with_name(f"{family.replace(', ', '-')}.part.json")
        command = [sys.executable, __file__, "--measure", family, "--ways", *ways]
        command += ["--device", device, "--results", str(file)]
        log = RESULTS.with_name(f"{family.replace(', ', '-')}.log")
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": cards[place % len(cards)]}
        with log.open("w") as out, suppress(subprocess.TimeoutExpired):
            left = max(1.0, end - time.monotonic())
            subprocess.run(command, env=environment, stdout=out, stderr=out, timeout=left)

    free: queue.Queue[int] = queue.Queue()
    for place in range(count):
        free.put(place)

    def in_a_place(family: str) -> None:
        place = free.get()
        try:
            if time.monotonic() < end:
                one(family, place)
        finally:
            free.put(place)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(in_a_place, families))
    for part in sorted(RESULTS.parent.glob("*.part.json")):
        write(RESULTS, json.loads(part.read_text()))
        part.unlink()


def write(file: Path, found: dict[str, Result]) -> None:
    """Put results of families beside those that a file has."""
    results = json.loads(file.read_text()) if file.is_file() else {}
    for family, own in found.items():
        results[family] = {**results.get(family, {}), **own}
    file.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")


# ---- the table ---------------------------------------------------------------------------------


def named(family: str) -> tuple[str, Any]:
    """A family of `tests/small_models.py` as the page calls it, and its record."""
    from kit.models.families import find

    kind, _, variant = family.partition(",")
    record = find(f"{kind}ForCausalLM")
    return (record.name or kind) + (f",{variant}" if variant else ""), record


def number(results: Result, way: str, *keys: str) -> str:
    """The largest of some measured numbers, with one digit; empty where nothing was measured."""
    if "refused" in results.get(way, {}):
        return "refused"
    values = [results.get(way, {}).get(key) for key in keys]
    known = [value for value in values if value is not None]
    return f"{max(known):.0e}".replace("e-0", "e-").replace("0e+00", "0") if known else ""


def table(results: dict[str, Result]) -> str:
    """The rows of the page, and below them who is refused."""
    head = [
        "family",
        "differs from Llama by",
        "trainer",
        "engine",
        "updated",
        "adapters, merged",
        "of SGLang",
        "replay",
        "drafts",
        "true_on_policy",
    ]
    seen_on_gpu = any("gpu plain" in own for own in results.values())
    head += ["GPU"] if seen_on_gpu else []
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    from kit.models.families import all_families

    tried = {named(family)[1].architecture for family in results}
    refused = [
        f"| {record.name} | {record.refused} |"
        for record in all_families()
        if record.refused and record.architecture not in tried
    ]
    for family, own in sorted(results.items(), key=lambda item: named(item[0])[0].lower()):
        name, record = named(family)
        if "plain" not in own:
            continue
        if why := own["plain"].get("refused"):
            further = own["plain"].get("why", "").splitlines()
            refused.append(f"| {name} | {record.refused or ' '.join([why, *further[:1]])} |")
            continue
        cells = [
            name,
            record.differs,
            number(own, "plain", "trainer"),
            number(own, "plain", "prefill", "decode"),
            number(own, "plain", "updated"),
            number(own, "merged", "updated"),
            number(own, "adapter", "updated"),
            number(own, "replay", "updated"),
            number(own, "drafts", "updated"),
            "0" if own.get("exact", {}).get("mismatch") == 0 else "",
        ]
        cells += [on_gpu(own.get("gpu plain", {}))] if seen_on_gpu else []
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, "", "| refused | why |", "|---|---|", *sorted(refused), ""])


def on_gpu(found: Result) -> str:
    """The largest difference in bfloat16, and what rounding does to Transformers itself."""
    if "refused" in found:
        return "refused"
    if not found:
        return ""
    largest = max(found[key] for key in ("trainer", "prefill", "decode", "updated"))
    return f"{largest:.3f} ({found['rounding']:.3f})"


def main() -> None:
    """Measure if asked, and write the table."""
    from tests.small_models import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs="*", metavar="FAMILY")
    parser.add_argument("--ways", nargs="*", default=WAYS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        families = arguments.measure or sorted(FAMILIES)
        device = arguments.device
        ways = [way for way in arguments.ways if device == "cpu" or way in ON_GPU]
        if arguments.at_once > 1:
            measure_at_once(families, ways, device, arguments.at_once, arguments.minutes)
        else:
            measure(families, ways, device, arguments.results)
    if arguments.results != RESULTS:
        return
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    rows = table(json.loads(RESULTS.read_text()))
    PAGE.write_text(f"{before}{BEGIN}\n{rows}{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
