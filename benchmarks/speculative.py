"""What drafts save on a GPU: a session that drafts beside one that does not, in turns.

    python -m benchmarks.speculative                            # 0.6b, a draft of 2 layers
    python -m benchmarks.speculative --algorithm ngram
    python -m benchmarks.speculative --shape tiny --device cpu  # to try the benchmark itself

A model with the shape of Qwen3-0.6B is trained on text that can be predicted
(`benchmarks.gpu_parts.predictable`). Then two sessions start on one card. In the one that drafts,
the draft is made as `kit.make_draft` makes it: some of the model's layers, which learn from what it
writes in some steps while it stays as it is. Then in turns, by one and by the other:

decoded     8, 32, 64 and 256 requests of 1,024 tokens: tokens a second, and their ratio
rollout     256 responses, most of them short and some of 1,700 tokens: seconds of the whole call
syncs       those of steps, the draft's weights included, and of steps without a draft
greedy      64 responses, token by token; where two differ, how far apart the tokens' log-probs are
sampled     10,000 responses: their first tokens against the model's own probabilities (chi-square)
sleep       the engine asleep and awake: the draft's checksums, and what is accepted after it
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.predictable import MOST, number_for

REQUESTS = (8, 32, 64, 256)
PROMPTS, GROUP = 32, 8
GREEDY = 64
DRAWN = 10_000
SEQUENCES = (2, 4)
"""First tokens of a response that are compared as one."""
MEDIAN, SPREAD = 250, 0.9
"""Tokens of the responses of a rollout with a long tail: those of a log-normal distribution."""
MARK = "@found "
"""Begins the line with which a session's process answers."""


def scale(shape: str) -> dict[str, Any]:
    """Sizes: of a GPU, or of a laptop that tries the benchmark itself."""
    from benchmarks.gpu_parts.workload import QWEN3_06B, TINY

    if shape == "tiny":
        tiny = {"longest": 96, "tokens": 64, "greedy": 32, "rows": 8, "length": 128, "steps": 60}
        return tiny | {"shape": dict(TINY), "requests": (2, 8), "drawn": 400}
    whole = {"longest": 2048, "tokens": 1024, "greedy": 256, "rows": 16, "length": 512}
    return whole | {"steps": 200, "shape": dict(QWEN3_06B), "requests": REQUESTS, "drawn": DRAWN}


# ---- a session's process -----------------------------------------------------------------------


def settings(asked: argparse.Namespace, draft: Path | None) -> Any:
    """The session's settings: the policy stays as it is."""
    from kit import SessionConfig

    size = scale(asked.shape)
    samples = max(size["requests"])
    tree: dict[str, Any] = {
        "model": {"name": str(asked.folder / "model"), "compile": False},
        "data": {"shuffle": False},
        "rollout": {"max_response_len": size["longest"]},
        "training": {
            "rollout_batch_size": min(PROMPTS, samples),
            "n_samples_per_prompt": 4,
            "global_batch_size": min(PROMPTS, samples) // 2,  # more updates of the draft
            "learning_rate": 0.0,
            "lr_schedule": "constant",
        },
        "engine": {
            "max_running_requests": samples,
            "max_total_tokens": samples * (size["tokens"] + 64),
        },
    }
    tree["model"]["context_length"] = size["longest"] + 256
    if asked.device == "cuda":
        tree["memory"] = {"device_gib": asked.gib}
    if draft:
        tree["training"]["draft"] = {"learning_rate": asked.draft_rate}
        speculative = {"algorithm": "standalone", "draft_model": str(draft)}
        tree["engine"]["speculative"] = speculative | {"num_steps": asked.num_steps}
    elif asked.one == "drafts":
        tree["engine"]["speculative"] = {"algorithm": "ngram"}
    return SessionConfig(name=f"spec-{asked.one}", device=asked.device, **tree)


def rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Prompts whose responses have some 250 tokens, from which the draft learns."""
    draw, tokens = random.Random(3), 250 if asked.device == "cuda" else 40
    middle = number_for(tokens)
    numbers = [draw.randint(max(0, middle - 2), middle + 2) for _ in range(64 * PROMPTS)]
    return [{"prompt": f"{n:02d}", "label": str(i)} for i, n in enumerate(numbers)]


class Asked:
    """What a session's process does when it is asked."""

    def __init__(self, session: Any, asked: argparse.Namespace) -> None:
        """`session` is running."""
        self.session, self.size = session, scale(asked.shape)
        self.stack = session.debug.stack
        self.tokenizer = session.debug.sampler.tokenizer

    def learn(self, steps: int) -> list[dict[str, float]]:
        """Metrics of training steps."""
        kept = ("perf/", "rollout/spec", "train/draft", "rollout/response_len/mean")
        found = []
        for number in range(steps):
            metrics = self.session.step().metrics
            found.append({n: v for n, v in metrics.items() if n.startswith(kept)})
            say(f"step {number}: " + ", ".join(f"{n} {v:.3g}" for n, v in found[-1].items()))
        return found

    def write(self, prompts: list[list[int]], tokens: int, temperature: float) -> dict[str, Any]:
        """Responses of so many tokens: seconds, tokens, tokens a pass, and what was written."""
        from kit.messages import SamplingSettings

        self.session.sync()  # the engine forgets its prefixes, as after each update
        begin = time.perf_counter()
        sampling = SamplingSettings(temperature, tokens)
        seeds, written = list(range(len(prompts))), {}
        for part in self.stack.generate(prompts, sampling, seeds, at_once=True):
            written.update(part)
        seconds = time.perf_counter() - begin
        counts: Counter[str] = Counter()
        for each in written.values():
            counts.update(each.spec_info or {})
        passes = counts["tokens"] / counts["verify_ct"] if counts["verify_ct"] else 1.0
        return {
            "seconds": seconds,
            "count": sum(len(each.tokens) for each in written.values()),
            "passes": passes,
            "tokens": [written[i].tokens for i in seeds],
            "log_probs": [written[i].log_probs for i in seeds],
        }

    def prompt(self, text: str = f"{MOST - 1:02d}", answer: str = "") -> list[int]:
        """Token ids of a prompt, and of the beginning of its answer."""
        turns = [{"role": "user", "content": text}]
        how = {"tokenize": False, "add_generation_prompt": True}
        whole = self.tokenizer.apply_chat_template(turns, **how) + answer
        return list(self.tokenizer(whole, add_special_tokens=False).input_ids)

    def decode(self, requests: int, tokens: int) -> dict[str, float]:
        """Tokens a second of requests that are decoded together, and tokens a pass."""
        prompts = [self.prompt(f"{MOST - 1 - i % 8:02d}") for i in range(requests)]
        found = self.write(prompts, tokens, 1.0)
        return {"rate": found["count"] / found["seconds"], "passes": found["passes"]}

    def greedy(self) -> dict[str, Any]:
        """Tokens and log-probs at temperature 0."""
        prompts = [self.prompt(f"{MOST - 1 - i:02d}") for i in range(GREEDY)]
        found = self.write(prompts, self.size["greedy"], 0.0)
        return {name: found[name] for name in ("tokens", "log_probs", "passes")}

    def sampled(self, *lengths: int) -> list[list[list[Any]]]:
        """First tokens of many responses to one prompt: (tokens, how many, log-prob), by length."""
        prompts = [self.prompt("50", "50 ")] * self.size["drawn"]
        found = self.write(prompts, max(lengths) + 1, 1.0)
        tables = []
        for length in lengths:
            firsts = [tuple(tokens[:length]) for tokens in found["tokens"]]
            sums = (sum(values[:length]) for values in found["log_probs"])
            known = dict(zip(firsts, sums, strict=True))
            tables.append([[list(n), count, known[n]] for n, count in Counter(firsts).items()])
        return tables

    def rollout(self) -> dict[str, float]:
        """Seconds of a rollout with a long tail, its tokens and its longest response."""
        normal, most = statistics.NormalDist(), self.size["longest"]
        lengths = [
            min(MEDIAN * math.exp(SPREAD * normal.inv_cdf((i + 0.5) / PROMPTS)), most)
            for i in range(PROMPTS)
        ]
        prompts = [f"{number_for(round(length)):02d}" for length in lengths]
        self.session.sync()
        begin = time.perf_counter()
        rollout = self.session.generate(prompts, n_samples_per_prompt=GROUP)
        found = [sample.response_length for sample in rollout]
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "tokens": sum(found), "longest": max(found)}

    def sleep(self) -> dict[str, Any]:
        """Whether the draft is the same after a sleep, and what is accepted then."""
        before = self.stack.engines.ask("draft_checksums")
        self.stack.offload.make_room_for_engine()
        self.stack.offload.sleep_engine()
        self.stack.offload.wake_engine()
        same = self.stack.engines.ask("draft_checksums") == before
        return {"same": same, "weights": len(before[0])} | self.decode(
            min(self.size["requests"]), self.size["tokens"] // 4
        )

    def verify(self) -> int:
        """Number of weights whose checksums agree, of policy and draft."""
        return int(self.session.sync(verify=True).verified)

    def memory(self) -> list[list[Any]]:
        """Of the plan: (phase, bytes planned, bytes measured, parts)."""
        phases = self.session.memory_plan().phases
        return [[p.name, p.total, p.measured, dict(p.parts)] for p in phases]


def serve(asked: argparse.Namespace) -> None:
    """Run a session, and do what is asked on stdin, a line each: [method, arguments]."""
    from kit import RLSession
    from kit.drafts import shorten

    draft = None
    if asked.one == "drafts" and asked.algorithm == "standalone":
        draft = asked.folder / "draft"
        shorten(asked.folder / "model", draft, asked.layers)

    def reward(sample: Any) -> float:
        return float(sample.index % 3 == 0)

    with RLSession.start(settings(asked, draft), data=rows(asked), reward=reward) as session:
        answer(round(session.start_seconds))
        does = Asked(session, asked)
        for line in sys.stdin:
            method, arguments = json.loads(line)
            answer(getattr(does, method)(*arguments))


def answer(found: Any) -> None:
    """Answer what was asked."""
    print(MARK + json.dumps(found), flush=True)


def say(words: str) -> None:
    """Tell on stderr what happens; stdout is for results."""
    print(words, file=sys.stderr, flush=True)


# ---- both of them ------------------------------------------------------------------------------


class Child:
    """A session in a process of its own."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        """Start it; the first answer says how long that took."""
        command = [sys.executable, "-m", "benchmarks.speculative", "--one", name, *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.name = name

    def answer(self) -> Any:
        """Wait for its next answer."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise SystemExit(f"the session of {self.name} has ended")

    def ask(self, method: str, *arguments: Any) -> Any:
        """Have it do something; what comes of it."""
        assert self.process.stdin
        print(json.dumps([method, arguments]), file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        """Have the session end."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def differences(plain: dict[str, Any], drafts: dict[str, Any]) -> dict[str, Any]:
    """How many greedy responses are the same, and how close the rest were where they parted.

    Two tokens that one engine or the other takes in the same place have nearly the same log-prob
    where rounding decided; passes of one token and of several round differently.
    """
    same, gaps = 0, []
    pairs = zip(plain["tokens"], drafts["tokens"], strict=True)
    for row, (ours, theirs) in enumerate(pairs):
        parted = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
        if not parted:
            same += ours == theirs
            continue
        place = parted[0]
        gap = plain["log_probs"][row][place] - drafts["log_probs"][row][place]
        gaps.append([place, abs(gap)])
    written = sum(map(len, plain["tokens"]))
    return {"same": same, "of": len(plain["tokens"]), "tokens": written, "gaps": gaps}


def chi_square(plain: list[list[Any]], drafts: list[list[Any]]) -> dict[str, float]:
    """Draws with drafts against the probabilities that plain decoding says.

    What is expected fewer than five times is one cell.
    """
    import torch

    draws = sum(count for _, count, _ in drafts)
    counts = {tuple(first): count for first, count, _ in drafts}
    cells, rest, left = [], draws, float(draws)
    for first, _, log_prob in plain:
        expected = draws * math.exp(log_prob)
        if expected >= 5:
            seen = counts.get(tuple(first), 0)
            cells.append((seen, expected))
            rest, left = rest - seen, left - expected
    if left >= 5:
        cells.append((rest, left))
    total = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    half = torch.tensor([(len(cells) - 1) / 2, total / 2], dtype=torch.float64)
    chance = float(torch.special.gammaincc(half[0], half[1]))
    return {"cells": len(cells), "chi_square": total, "p": chance, "rest": rest, "expected": left}


def measure(
    plain: Child, drafts: Child, asked: argparse.Namespace, put: Callable[[str, Any], None]
) -> None:
    """Everything, in turns; the most telling first."""
    size, begin = scale(asked.shape), time.monotonic()
    learned = asked.algorithm == "standalone"
    put("learned", drafts.ask("learn", asked.draft_steps if learned else 4))
    put("verified", [child.ask("verify") for child in (plain, drafts)])
    put("greedy", differences(*(child.ask("greedy") for child in (plain, drafts))))
    for child in (plain, drafts):
        child.ask("decode", min(size["requests"]), 32)
    for turn in range(asked.repeats):
        for requests in size["requests"]:
            pair = [child.ask("decode", requests, size["tokens"]) for child in (plain, drafts)]
            put(f"decoded/{requests}/{turn}", pair)
        put(f"rollout/{turn}", [child.ask("rollout") for child in (plain, drafts)])
        if time.monotonic() - begin > asked.limit:
            break
    tables = zip(*(child.ask("sampled", *SEQUENCES) for child in (plain, drafts)), strict=True)
    for length, pair in zip(SEQUENCES, tables, strict=True):
        put(f"sampled/{length}", chi_square(*pair))
    put("plain_steps", plain.ask("learn", 4))
    put("drafts_steps", drafts.ask("learn", 4))
    if asked.device == "cuda" and learned:
        put("sleep", drafts.ask("sleep"))
    put("memory", drafts.ask("memory"))
    put("memory_plain", plain.ask("memory"))


def shown(found: dict[str, Any]) -> str:
    """What was found, as lines."""
    lines = [f"model: {found['loss']:.3f} nats a token"]
    for name in sorted(found, key=lambda n: [int(p) if p.isdigit() else p for p in n.split("/")]):
        kind = name.split("/")[0]
        if kind == "decoded":
            plain, drafts = found[name]
            lines.append(
                f"{name}: {plain['rate']:.0f} tokens/s plain, {drafts['rate']:.0f} with drafts: "
                f"{drafts['rate'] / plain['rate']:.2f} x, {drafts['passes']:.2f} tokens a pass"
            )
        elif kind == "rollout":
            plain, drafts = found[name]
            ratio = plain["seconds"] / plain["tokens"] * drafts["tokens"] / drafts["seconds"]
            lines.append(f"{name}: {plain}, {drafts}: {ratio:.2f} x")
        elif kind == "learned":
            keys = ("rollout/spec_accept_length", "rollout/spec_accept_rate")
            first, last = (
                [row.get(key, 0.0) for key in keys] for row in (found[name][0], found[name][-1])
            )
            lines.append(f"{name}: {len(found[name])} steps, {first} -> {last}")
        elif kind in ("plain_steps", "drafts_steps"):
            times = [row["perf/update_weights_time"] for row in found[name]]
            lines.append(f"syncs, {name}: {', '.join(f'{t * 1000:.1f}' for t in times)} ms")
        elif kind in ("greedy", "sampled", "verified", "sleep", "started"):
            lines.append(f"{name}: {found[name]}")
        elif kind.startswith("memory"):
            for phase, planned, measured, _ in found[name]:
                if measured:
                    gib = f"planned {planned / 2**30:.2f} GiB, measured {measured / 2**30:.2f}"
                    lines.append(f"{name}, {phase}: {gib}")
    return "\n".join(lines)


def run(asked: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Train the model, start the sessions and ask them."""
    found: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        found[name] = value
        say(f"{name}: {json.dumps(value)[:400]}")
        if asked.json:
            asked.json.write_text(json.dumps(found), encoding="utf-8")

    loss = asked.folder / "loss"
    if not loss.exists():
        command = [sys.executable, "-m", "benchmarks.speculative", "--one", "model", *arguments]
        subprocess.run(command, check=True)
    put("loss", float(loss.read_text()))
    plain, drafts = Child("plain", arguments), Child("drafts", arguments)
    try:
        put("started", [plain.answer(), drafts.answer()])
        measure(plain, drafts, asked, put)
    finally:
        plain.close()
        drafts.close()
    return found


def options() -> argparse.ArgumentParser:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="0.6b", choices=("0.6b", "tiny"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--algorithm", default="standalone", choices=("standalone", "ngram"))
    parser.add_argument("--layers", type=int, default=2, help="of the draft")
    parser.add_argument("--num-steps", type=int, default=4, help="tokens of a draft")
    parser.add_argument("--draft-steps", type=int, default=12, help="from which the draft learns")
    parser.add_argument("--draft-rate", type=float, default=1e-3, help="its learning rate")
    parser.add_argument("--train-steps", type=int, help="of the model")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600, help="seconds until no turn begins")
    parser.add_argument("--gib", type=float, default=60.0, help="of each session")
    parser.add_argument("--json", type=Path, help="a file for what is found, written as it comes")
    parser.add_argument("--folder", type=Path, help="where the model is, or is written to")
    parser.add_argument("--one", choices=("model", "plain", "drafts"), help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Measure, and print what was found."""
    asked = options().parse_args()
    if asked.one == "model":
        from benchmarks.gpu_parts.predictable import train

        size = scale(asked.shape)
        steps, how = asked.train_steps or size["steps"], {k: size[k] for k in ("rows", "length")}
        model = asked.folder / "model"
        loss = train(size["shape"], model, asked.device, steps=steps, say=say, **how)
        (asked.folder / "loss").write_text(f"{loss}")
    elif asked.one:
        serve(asked)
    else:
        with tempfile.TemporaryDirectory() as folder:
            asked.folder = asked.folder or Path(folder)
            # The last one counts.
            print(shown(run(asked, [*sys.argv[1:], f"--folder={asked.folder}"])), flush=True)


if __name__ == "__main__":
    main()
