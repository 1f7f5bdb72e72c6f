"""What drafts save on a GPU: sessions that draft beside one that does not, in turns.

    python -m benchmarks.speculative                            # 0.6b, a draft of 2 layers
    python -m benchmarks.speculative --algorithm ngram --ways plain,always
    python -m benchmarks.speculative --algorithm eagle --ways plain,always --num-steps 3
    python -m benchmarks.speculative --draft trained            # on the text, not by kit.make_draft
    python -m benchmarks.speculative --shape tiny --device cpu  # to try the benchmark itself

A model with the shape of Qwen3-0.6B is trained on text that can be predicted
(`benchmarks.gpu_parts.predictable`), and `kit.make_draft` makes a draft of two of its layers from
what it writes, or an EAGLE head (`--algorithm eagle`); the session that does not draft starts
meanwhile. (`--draft trained` trains a model of two layers, or the head, on the same text instead.)
Then sessions start on one card, all at once: one that always drafts, and one that does where it
pays (`standalone` only). In turns, by each of them:

made        the draft: seconds, and what is accepted at the beginning and at the end
decoded     8, 32, 64 and 256 requests of 1,024 tokens: tokens a second, and their ratio; which of
            the drafted tokens were right, and so about what fewer of them would give
rollout     256 requests, most of them of some hundred tokens and some of 1,800: seconds of all,
            twice: in the first, kernels that no session on this machine has had are compiled
syncs       of the policy alone, and of policy and draft
greedy      64 responses, token by token; where two differ, how far apart the tokens' log-probs are
seeded      64 responses at temperature 1: of how many the first tokens are plain decoding's
sampled     10,000 responses: their first tokens against the model's own probabilities (chi-square)
sleep       the engine asleep and awake: the draft's checksums, and what is accepted after it
learned     training steps of the session that always drafts, in which its draft learns along

Each is printed as it comes.
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
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.comparison import alike, chi_square, differences, shown
from benchmarks.gpu_parts.predictable import Text

REQUESTS = (8, 32, 64, 256)
PROMPTS = 32
"""Of a training step."""
WAYS = {"plain": 43.0, "always": 54.0, "auto": 36.0}
"""Sessions, and the GiB of each; together they fit a card of 140."""
GREEDY = 64
DRAWN = 10_000
SEQUENCES = (2, 4)
"""First tokens of a response that are compared as one."""
MEDIAN, SPREAD = 250, 0.9
"""Tokens of the responses of a rollout with a long tail: those of a log-normal distribution."""
SYNC_TURNS, SYNCS = 4, 5
"""Turns of so many syncs each, of which the first one does not count."""
ROLLOUTS = 2
MARK = "@found "
"""Begins the line with which a session's process answers."""


def scale(shape: str) -> dict[str, Any]:
    """Sizes: of a GPU, or of a laptop that tries the benchmark itself."""
    from benchmarks.gpu_parts.workload import QWEN3_06B, TINY

    if shape == "tiny":
        tiny = {"response": 40, "tokens": 64, "most": 128, "greedy": 32, "rows": 8, "length": 128}
        tiny |= {"made": 20, "made_rows": 16, "layers": 1}
        return tiny | {"steps": 60, "shape": dict(TINY), "requests": (2, 8), "drawn": 400}
    whole = {
        "response": 256,
        "tokens": 1024,
        "most": 2048,
        "greedy": 256,
        "rows": 16,
        "length": 512,
        "made": 12,
        "made_rows": 64,
        "layers": 2,
    }
    return whole | {"steps": 120, "shape": dict(QWEN3_06B), "requests": REQUESTS, "drawn": DRAWN}


# ---- a session's process -----------------------------------------------------------------------


def settings(asked: argparse.Namespace) -> Any:
    """The session's settings: the policy stays as it is."""
    from kit import SessionConfig

    size, drafts = scale(asked.shape), asked.one != "plain"
    samples = max(size["requests"])
    tree: dict[str, Any] = {
        "model": {"name": str(asked.folder / "model"), "compile": False},
        "data": {"shuffle": False},
        "rollout": {"max_response_len": size["response"]},
        "training": {
            "rollout_batch_size": min(PROMPTS, samples),
            "n_samples_per_prompt": 4,
            "learning_rate": 0.0,
            "lr_schedule": "constant",
        },
        "engine": {
            "max_running_requests": samples,
            # The one that drafts where it pays is asked for less.
            "max_total_tokens": samples
            * (size["tokens"] + 64)
            // (2 if asked.one == "auto" else 1),
        },
    }
    tree["model"]["context_length"] = size["most"] + 64
    if asked.device == "cuda":
        tree["memory"] = {"device_gib": WAYS[asked.one]}
    if drafts and asked.algorithm == "ngram":
        tree["engine"]["speculative"] = {"algorithm": "ngram"}
    elif drafts:
        tree["training"]["draft"] = {"learning_rate": asked.draft_rate}
        own = {"algorithm": asked.algorithm, "draft_model": str(asked.folder / "draft")}
        own |= {"num_steps": asked.num_steps, "when": asked.one}
        if asked.eagle_topk > 1:
            own["eagle_topk"] = asked.eagle_topk
        tree["engine"]["speculative"] = own
    return SessionConfig(name=f"spec-{asked.one}", device=asked.device, **tree)


def rows() -> list[dict[str, Any]]:
    """Prompts of training steps."""
    draw, words = random.Random(3), Text().words
    return [{"prompt": draw.choice(words), "label": str(i)} for i in range(64 * PROMPTS)]


class Asked:
    """What a session's process does when it is asked."""

    def __init__(self, session: Any, asked: argparse.Namespace) -> None:
        """`session` is running."""
        self.session, self.size = session, scale(asked.shape)
        self.stack, self.words = session.debug.stack, Text().words
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

    def write(
        self, prompts: list[list[int]], tokens: int | list[int], temperature: float
    ) -> dict[str, Any]:
        """Responses of so many tokens: seconds, tokens, tokens a pass, and what was written."""
        from kit.messages import SamplingSettings
        from kit.stack.engines import Request

        self.session.sync()  # the engine forgets its prefixes, as after each update
        self.stack.prepare_engines()
        begin = time.perf_counter()
        budgets = tokens if isinstance(tokens, list) else [tokens] * len(prompts)
        asked = zip(prompts, budgets, strict=True)
        requests = [Request(i, prompt, i, budget) for i, (prompt, budget) in enumerate(asked)]
        sampling, written = SamplingSettings(temperature, max(budgets)), {}
        for part in self.stack.open_stream(sampling, "all", requests):
            written.update(part)
        seconds = time.perf_counter() - begin
        counts: Counter[str] = Counter()
        for each in written.values():
            counts.update(each.spec_info or {})
        passes = counts["tokens"] / counts["verify_ct"] if counts["verify_ct"] else 1.0
        right = Counter(place for each in written.values() for place in each.drafted or ())
        places = range(len(prompts))
        return {
            "seconds": seconds,
            "drafted": counts["verify_ct"] / max(counts["passes"], 1),
            "estimate": counts["plain_us"] / max(counts["us"], 1),
            "count": sum(len(each.tokens) for each in written.values()),
            "passes": passes,
            # Of the passes that drafted: in how many the first token was right, the first two, …
            "right": [right[i] / counts["verify_ct"] for i in sorted(right) if i],
            "tokens": [written[i].tokens for i in places],
            "log_probs": [written[i].log_probs for i in places],
        }

    def prompt(self, number: int, answer: str = "") -> list[int]:
        """Token ids of a prompt, and of the beginning of its answer."""
        turns = [{"role": "user", "content": self.words[number % len(self.words)]}]
        how = {"tokenize": False, "add_generation_prompt": True}
        whole = self.tokenizer.apply_chat_template(turns, **how) + answer
        return list(self.tokenizer(whole, add_special_tokens=False).input_ids)

    def decode(self, requests: int, tokens: int) -> dict[str, float]:
        """Tokens a second of requests that are decoded together, and tokens a pass."""
        found = self.write([self.prompt(i) for i in range(requests)], tokens, 1.0)
        kept = {name: found[name] for name in ("passes", "drafted", "estimate", "right")}
        return kept | {"rate": found["count"] / found["seconds"]}

    def greedy(self) -> dict[str, Any]:
        """Tokens and log-probs at temperature 0."""
        found = self.write([self.prompt(i) for i in range(GREEDY)], self.size["greedy"], 0.0)
        return {name: found[name] for name in ("tokens", "log_probs", "passes")}

    def seeded(self) -> list[list[int]]:
        """Tokens at temperature 1, each response by a seed of its own."""
        prompts = [self.prompt(i) for i in range(GREEDY)]
        tokens: list[list[int]] = self.write(prompts, self.size["greedy"], 1.0)["tokens"]
        return tokens

    def sampled(self, *lengths: int) -> list[list[list[Any]]]:
        """First tokens of many responses to one prompt: (tokens, how many, log-prob), by length."""
        prompts = [self.prompt(0)] * self.size["drawn"]
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
        normal, most, count = statistics.NormalDist(), self.size["most"], max(self.size["requests"])
        places = [(i + 0.5) / count for i in range(count)]
        lengths = [MEDIAN * math.exp(SPREAD * normal.inv_cdf(place)) for place in places]
        budgets = [min(round(length), most) for length in lengths]
        random.Random(0).shuffle(budgets)
        found = self.write([self.prompt(i) for i in range(count)], budgets, 1.0)
        kept = {name: found[name] for name in ("seconds", "passes", "drafted", "estimate")}
        return kept | {"tokens": found["count"], "longest": max(budgets)}

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

    def syncs(self) -> list[float]:
        """Seconds of syncs, of the draft too where it learns along."""
        seconds = []
        for _ in range(SYNCS):
            self.stack.sending.draft_version = None  # as after an update
            seconds.append(self.session.sync().seconds)
        return seconds[1:]

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

    def reward(sample: Any) -> float:
        return float(sample.index % 3 == 0)

    with RLSession.start(settings(asked), data=rows(), reward=reward) as session:
        answer(round(session.start_seconds))
        does = Asked(session, asked)
        for line in sys.stdin:
            method, arguments = json.loads(line)
            try:
                found = getattr(does, method)(*arguments)
            except Exception:  # the other rows are worth having
                traceback.print_exc()
                found = None
            answer(found)


def answer(found: Any) -> None:
    """Answer what was asked."""
    print(MARK + json.dumps(found), flush=True)


def say(words: str) -> None:
    """Tell on stderr what happens; stdout is for results."""
    print(words, file=sys.stderr, flush=True)


# ---- all of them -------------------------------------------------------------------------------


class Child:
    """A session in a process of its own."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        """Start it; the first answer says how long that took."""
        command = [sys.executable, "-m", "benchmarks.speculative", "--one", name, *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.name = name

    def answer(self) -> Any:
        """Wait for its next answer; None where it has ended."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        say(f"the session {self.name} has ended")
        return None

    def ask(self, method: str, *arguments: Any) -> Any:
        """Have it do something; what comes of it, None where it has ended."""
        assert self.process.stdin
        if self.process.poll() is not None:
            return None
        print(json.dumps([method, arguments]), file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        """Have the session end."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


Put = Callable[[str, Any], None]


def measure(children: dict[str, Child], asked: argparse.Namespace, put: Put) -> None:
    """Everything, in turns; the most telling first."""
    size, begin = scale(asked.shape), time.monotonic()
    few = size["requests"][: max(len(size["requests"]) // 2, 1)]

    def turn(method: str, *arguments: Any, few: bool = True) -> dict[str, Any]:
        asked = {name: child for name, child in children.items() if few or name != "auto"}
        found = {name: child.ask(method, *arguments) for name, child in asked.items()}
        return {name: answer for name, answer in found.items() if answer is not None}

    def against_plain(compare: Callable[[Any, Any], Any], found: dict[str, Any]) -> dict[str, Any]:
        others = [name for name in found if name != "plain"] if "plain" in found else []
        return {name: compare(found["plain"], found[name]) for name in others}

    def decode(requests: int, number: int) -> None:
        all_fit = requests < max(size["requests"])
        found = turn("decode", requests, size["tokens"], few=all_fit)
        put(f"decoded/{requests}/{number}", found)

    for requests in few:
        decode(requests, 0)
    for number in range(ROLLOUTS):
        put(f"rollout/{number}", turn("rollout"))
    syncs: dict[str, list[float]] = {name: [] for name in children}
    for _ in range(SYNC_TURNS):
        for name, seconds in turn("syncs").items():
            syncs[name] += seconds
    put("syncs", syncs)
    for requests in size["requests"][len(few) :]:
        decode(requests, 0)
    put("greedy", against_plain(differences, turn("greedy")))
    put("seeded", against_plain(alike, turn("seeded")))
    tables = turn("sampled", *SEQUENCES)
    for place, length in enumerate(SEQUENCES):
        these = {name: table[place] for name, table in tables.items()}
        put(f"sampled/{length}", against_plain(chi_square, these))
    put("verified", turn("verify"))
    put("memory", turn("memory"))
    for number in range(1, asked.repeats):
        if time.monotonic() - begin > asked.limit:
            break
        for requests in size["requests"]:
            decode(requests, number)
    if asked.algorithm != "ngram" and "always" in children:
        if asked.device == "cuda":
            put("sleep", children["always"].ask("sleep"))
        put("learned", children["always"].ask("learn", asked.draft_steps))


def run(asked: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Train the models, start the sessions and ask them."""
    found: dict[str, Any] = {}
    begin = time.monotonic()

    def put(name: str, value: Any) -> None:
        found[name] = value
        since = time.monotonic() - begin
        print(f"[{since:.0f} s]", shown(name, value), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(found), encoding="utf-8")

    command = [sys.executable, "-m", "benchmarks.speculative", "--one"]
    needs_draft = asked.algorithm != "ngram"
    files = {name: asked.folder / f"{name}.json" for name in ("model", "draft")[: 1 + needs_draft]}

    def make(*names: str) -> None:
        made = [
            subprocess.Popen([*command, name, *arguments])
            for name in names
            if name in files and not files[name].exists()
        ]
        if any(process.wait() for process in made):
            raise SystemExit("the models could not be made")

    ways = asked.ways.split(",")
    alone = asked.draft == "trained" and asked.algorithm == "standalone"  # needs no model
    make("model", *(["draft"] if alone else []))
    children = {name: Child(name, arguments) for name in ways if name == "plain"}
    try:
        make("draft")
        put("made", {name: json.loads(file.read_text()) for name, file in files.items()})
        children |= {name: Child(name, arguments) for name in ways if name != "plain"}
        put("started", {name: child.answer() for name, child in children.items()})
        measure(children, asked, put)
    finally:
        for child in children.values():
            child.close()


def make_model(asked: argparse.Namespace) -> None:
    """Make the model, or what drafts for it; what is known of it is a file that is written last."""
    begin = time.perf_counter()
    if asked.one == "draft" and asked.draft == "made":
        known = draft_made(asked)
    elif asked.one == "draft" and asked.algorithm == "eagle":
        known = head_trained(asked)
    else:
        known = trained(asked)
    known["seconds"] = time.perf_counter() - begin
    (asked.folder / f"{asked.one}.json").write_text(json.dumps(known))


def trained(asked: argparse.Namespace) -> dict[str, float]:
    """Train the model, or a smaller one, on the text: its loss at the end, in nats a token."""
    from benchmarks.gpu_parts.predictable import make, train

    size = scale(asked.shape)
    shape, steps, rate = size["shape"], asked.train_steps or size["steps"], 5e-4
    if asked.one == "draft":  # small enough for more steps in the same time
        shape, steps, rate = (
            shape | {"num_hidden_layers": asked.layers or size["layers"]},
            2 * steps,
            1e-3,
        )
    how = {"rows": size["rows"], "length": size["length"], "say": say}
    model = make(shape, asked.device)
    return {"loss": train(model, asked.folder / asked.one, steps=steps, rate=rate, **how)}


def head_trained(asked: argparse.Namespace) -> dict[str, Any]:
    """Train an EAGLE head for the model on the text: its loss at the end, in nats a token."""
    from benchmarks.gpu_parts.predictable import train_head

    size = scale(asked.shape)
    how = {"rows": size["rows"] // 2, "length": size["length"], "say": say}
    model, head = asked.folder / "model", asked.folder / "draft"
    return {"loss": train_head(model, head, asked.device, steps=size["steps"], rate=1e-3, **how)}


def draft_made(asked: argparse.Namespace) -> dict[str, Any]:
    """Make a draft of the model's layers by `kit.make_draft`: what was accepted, step by step.

    Each rollout makes eight optimizer steps: writing takes longer than learning.
    """
    from kit import make_draft
    from kit.drafts import LENGTH, RATE

    size, prompts = scale(asked.shape), asked.folder / "prompts.jsonl"
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows()), encoding="utf-8")
    config = settings(argparse.Namespace(**vars(asked) | {"one": "plain"}))
    for name, value in {
        "name": "spec-draft",
        "data.source": str(prompts),
        "reward.name": "exact",
        # An eighth of what it is to draft, which it drafts less and less well: see "On a GPU" in
        # docs/speculative.md. Longer ones take longer, and none was measured to its end.
        "rollout.max_response_len": size["response"] // 2,
        "training.rollout_batch_size": size["made_rows"] // 4,
        "training.global_batch_size": size["made_rows"] // 4,
        "training.epochs_per_rollout": 2,
        "engine.max_running_requests": size["made_rows"],
        "engine.max_total_tokens": None,
    }.items():
        config = config.replace(name, value)
    begin, by_step = time.perf_counter(), []
    eagle = asked.algorithm == "eagle"

    def note(report: Any) -> None:
        metrics, seconds = report.metrics, time.perf_counter() - begin
        row = {n: metrics[n] for n in (RATE, LENGTH, "train/draft_loss") if n in metrics}
        by_step.append({"seconds": seconds} | row)
        say(f"draft: {seconds:.0f} s: " + ", ".join(f"{n} {v:.3f}" for n, v in row.items()))

    steps = asked.made_steps or size["made"]
    how = {"algorithm": asked.algorithm, "layers": 1 if eagle else asked.layers or size["layers"]}
    report = make_draft(config, asked.folder / "draft", steps=steps, on_step=note, **how)
    say(str(report))
    return {"steps": by_step}


def options() -> argparse.ArgumentParser:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="0.6b", choices=("0.6b", "tiny"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    kinds = ("standalone", "ngram", "eagle")
    parser.add_argument("--algorithm", default="standalone", choices=kinds)
    parser.add_argument("--ways", default="plain,always,auto", help="plain first")
    parser.add_argument("--layers", type=int, help="of the draft; half of a tiny model's, else 2")
    parser.add_argument(
        "--draft", default="made", choices=("made", "trained"), help="by kit.make_draft, or on text"
    )
    parser.add_argument("--made-steps", type=int, help="rollouts that a made draft learns from")
    parser.add_argument("--num-steps", type=int, default=4, help="tokens of a draft")
    parser.add_argument("--eagle-topk", type=int, default=1, help="more than 1 drafts trees")
    parser.add_argument("--draft-steps", type=int, default=4, help="training steps of each session")
    parser.add_argument("--draft-rate", type=float, default=1e-4, help="the draft's learning rate")
    parser.add_argument(
        "--train-steps", type=int, help="of the model; a trained draft gets twice as many"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600, help="seconds until no turn begins")
    parser.add_argument("--json", type=Path, help="a file for what is found, written as it comes")
    parser.add_argument("--folder", type=Path, help="where the models are, or are written to")
    parser.add_argument("--one", choices=("model", "draft", *WAYS), help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Measure, and print what was found."""
    asked = options().parse_args()
    if asked.one in ("model", "draft"):
        make_model(asked)
    elif asked.one:
        serve(asked)
    else:
        with tempfile.TemporaryDirectory() as folder:
            asked.folder = asked.folder or Path(folder)
            # The last one counts.
            run(asked, [*sys.argv[1:], f"--folder={asked.folder}"])


if __name__ == "__main__":
    main()
