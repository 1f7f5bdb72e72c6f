"""`kit import nanochat`: the same numbers, the same ids, and nothing of a pickle is run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from typer.testing import CliRunner

from kit.checkpoint import manifest, nanochat_tokenizer
from kit.checkpoint.nanochat import import_nanochat
from kit.cli.app import app
from kit.config import ModelConfig, SessionConfig
from kit.data.chat_template import render
from kit.drafts import make_draft
from kit.errors import DataError, KitError, ModelError
from kit.models import own
from kit.models.packing import pack
from kit.models.policy import load
from kit.models.source import find
from kit.rollout.drafts import find_draft
from kit.tiny import MODEL_DIR
from tests import nanochats
from tests.nanochats import SIZES, STEP, encoding

MODEL, META = f"model_{STEP:06d}.pt", f"meta_{STEP:06d}.json"
SIZE, LAYERS = SIZES["n_embd"], SIZES["n_layer"]
BETWEEN = {
    "scales its residual stream": {"resid_lambdas": torch.full((LAYERS,), 1.1)},
    "scales its residual stream by layer": {"x0_lambdas": torch.full((LAYERS,), 0.1)},
    "adds embeddings to the values": {"value_embeds.0.weight": torch.zeros(320, 32)},
    "has engram.weight, which nanochat does not": {"engram.weight": torch.zeros(1)},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nanochat")


@pytest.fixture(scope="module")
def checkpoint(base: Path) -> Path:
    return nanochats.make(base)


@pytest.fixture(scope="module")
def of_2026(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of 2026, and what it was imported as."""
    base = tmp_path_factory.mktemp("nanochat-2026")
    folder = nanochats.make_2026(base)
    return folder, import_nanochat(folder, base / "out").path


@pytest.fixture(scope="module")
def imported(checkpoint: Path, base: Path) -> Path:
    return import_nanochat(checkpoint, base / "out").path


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    own.register(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_transformers_computes_with_it_what_nanochat_does(checkpoint: Path, imported: Path) -> None:
    tokens = torch.randint(SIZES["vocab_size"], (90,)).tolist()
    with torch.no_grad():
        found = loaded(imported)(torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = nanochats.log_probs(checkpoint, tokens)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("share", [False, True])
def test_nanochat_of_2026_is_computed_as_its_formula_says_alone_and_packed(
    of_2026: tuple[Path, Path], share: bool
) -> None:
    one, other = (torch.randint(SIZES["vocab_size"], (n,)).tolist() for n in (200, 60))
    rows = [one, other, one[:150] + other[:20], one[:160] + other[:7]]
    counts = [60, 59, 20, 17]
    by_formula = [nanochats.log_probs(of_2026[0], row) for row in rows]
    expected = torch.cat(
        [
            logp[len(row) - count - 1 : -1].gather(-1, torch.tensor(row[-count:])[:, None])[:, 0]
            for row, count, logp in zip(rows, counts, by_formula, strict=True)
        ]
    )
    with torch.no_grad():
        found, _ = load(str(of_2026[1])).eval()(pack(rows, counts, share=share), 1.0)
        alone = loaded(of_2026[1])(torch.tensor([one])).logits[0].log_softmax(-1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(alone.double(), by_formula[0], rtol=0, atol=2e-5)


def test_its_gradients_are_those_of_transformers(of_2026: tuple[Path, Path]) -> None:
    rows = [torch.randint(SIZES["vocab_size"], (n,)).tolist() for n in (150, 9)]
    rows.append(rows[0][:140] + rows[1])
    policy, model = load(str(of_2026[1])).eval(), loaded(of_2026[1])
    policy(pack(rows, [20, 8, 9]), 1.0)[0].sum().backward()
    for row, count in zip(rows, (20, 8, 9), strict=True):
        logp = model(torch.tensor([row])).logits[0].log_softmax(-1)
        targets = torch.tensor(row[-count:])
        logp[len(row) - count - 1 : -1].gather(-1, targets[:, None]).sum().backward()
    theirs = dict(model.named_parameters())
    for name, value in policy.model.named_parameters():
        torch.testing.assert_close(
            value.grad, theirs[name].grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_it_writes_token_by_token_what_it_reads_at_once(of_2026: tuple[Path, Path]) -> None:
    tokens, model = torch.randint(SIZES["vocab_size"], (1, 180)), loaded(of_2026[1])
    with torch.no_grad():
        whole = model(tokens).logits
        output = model(tokens[:, :100], use_cache=True)
        parts = [output.logits]
        for place in range(100, 180):
            step = tokens[:, place : place + 1]
            output = model(step, past_key_values=output.past_key_values, use_cache=True)
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_transformers_alone_loads_it_with_the_code_beside_it(of_2026: tuple[Path, Path]) -> None:
    ask = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert 'kit' not in sys.modules\n"
        "print(float(model(torch.arange(40)[None]).logits.detach().double().abs().sum()))"
    )
    command = [sys.executable, "-c", ask, str(of_2026[1])]
    with tempfile.TemporaryDirectory() as cache:
        told = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd="/",
            env=os.environ | {"HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        )  # fmt: skip
    with torch.no_grad():
        logits = loaded(of_2026[1])(torch.arange(40)[None]).logits
    assert float(told.stdout) == pytest.approx(float(logits.double().abs().sum()), rel=1e-5)


@pytest.mark.slow
def test_its_tokenizer_is_loaded_without_a_word_of_a_model_that_is_not_known(
    of_2026: tuple[Path, Path],
) -> None:
    assert own.config_for_tokenizer(MODEL_DIR) is None
    ask = (
        "import sys\n"
        "from kit.models import own\n"
        "from transformers import AutoTokenizer\n"
        "given = own.config_for_tokenizer(sys.argv[1])\n"
        "print(AutoTokenizer.from_pretrained(sys.argv[1], config=given)('the sum').input_ids)"
    )
    command = [sys.executable, "-c", ask, str(of_2026[1])]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stderr == ""
    assert told.stdout.strip() == str(encoding().encode("the sum"))


def test_drafts_are_refused_since_a_token_needs_the_one_before_it(
    of_2026: tuple[Path, Path], tmp_path: Path
) -> None:
    config = SessionConfig(
        model={"name": str(of_2026[1])}, engine={"speculative": {"algorithm": "ngram"}}
    )
    with pytest.raises(ModelError, match="neither drafts nor is drafted for"):
        find_draft(config, find(config.model))
    plain = SessionConfig(model={"name": str(of_2026[1])})
    with pytest.raises(ModelError, match="neither drafts nor is drafted for"):
        make_draft(plain, tmp_path / "draft")


def test_every_number_is_kept_and_the_padding_of_the_vocabulary_is_not(
    checkpoint: Path, imported: Path
) -> None:
    from safetensors.torch import load_file

    theirs = torch.load(checkpoint / MODEL, weights_only=True)
    ours = load_file(imported / "model.safetensors")
    embedding = theirs["transformer.wte.weight"]
    assert len(embedding) == 320
    assert embedding.dtype is torch.bfloat16
    assert torch.equal(ours["model.embed_tokens.weight"], embedding[:300].float())
    assert torch.equal(ours["lm_head.weight"], theirs["lm_head.weight"][:300])
    assert manifest.peek(imported)["step"] == STEP


def test_a_session_ends_answers_where_nanochat_does(imported: Path) -> None:
    source, special = find(ModelConfig(name=str(imported))), encoding().encode_single_token
    assert source.eos_token_ids == {special("<|assistant_end|>"), special("<|bos|>")}
    assert (source.context_length, source.vocabulary) == (256, 300)


def test_a_session_on_the_checkpoint_itself_is_told_how_to_import_it(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="kit import nanochat"):
        find(ModelConfig(name=str(checkpoint)))


def test_names_of_a_compiled_model_and_neutral_scalars_are_taken(
    tmp_path: Path, imported: Path
) -> None:
    folder = nanochats.make(
        tmp_path, resid_lambdas=torch.ones(LAYERS), x0_lambdas=torch.zeros(LAYERS)
    )
    with_windows(folder, "L")  # without any
    weights = torch.load(folder / MODEL, weights_only=True)
    torch.save({f"_orig_mod.{name}": value for name, value in weights.items()}, folder / MODEL)
    out = import_nanochat(folder, tmp_path / "out").path
    assert (out / "model.safetensors").read_bytes() == (imported / "model.safetensors").read_bytes()


@pytest.mark.parametrize("what", BETWEEN)
def test_versions_whose_constants_nobody_wrote_down_are_refused_by_what_they_have(
    tmp_path: Path, what: str
) -> None:
    folder = nanochats.make(tmp_path, **BETWEEN[what])
    with pytest.raises(ModelError, match=what):
        import_nanochat(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pattern", ["SSSL", "ls"])
def test_so_are_windows_of_theirs(tmp_path: Path, pattern: str) -> None:
    folder = nanochats.make(tmp_path)
    with_windows(folder, pattern)
    with pytest.raises(ModelError, match=f"has windows .window_pattern {pattern.upper()}"):
        import_nanochat(folder, tmp_path / "out")


def with_windows(folder: Path, pattern: str) -> None:
    meta = json.loads((folder / META).read_text())
    meta["model_config"]["window_pattern"] = pattern
    (folder / META).write_text(json.dumps(meta))


# ---- the tokenizer ---------------------------------------------------------------------------


def test_text_gets_the_ids_of_tiktoken_and_comes_back(imported: Path) -> None:
    tokenizer, theirs = tokenizer_of(imported), encoding()
    for text in nanochat_tokenizer.HOSTILE:
        ids = tokenizer(text)["input_ids"]  # which adds nothing
        assert ids == theirs.encode(text, allowed_special="all")
        assert tokenizer.decode(ids) == text
        plain = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert plain == theirs.encode_ordinary(text)


def test_a_tokenizer_of_other_ids_is_found_and_refused(checkpoint: Path, imported: Path) -> None:
    read = nanochat_tokenizer.read(checkpoint.parents[1] / "tokenizer" / "tokenizer.pkl")
    assert nanochat_tokenizer.compare(read, tokenizer_of(imported)) > 5_000
    swapped = dict(read.ranks) | {b"a": read.ranks[b"b"], b"b": read.ranks[b"a"]}
    letters_apart = read.pattern.replace(r"?+\p{L}+", r"?+\p{L}")
    for other in (replace(read, ranks=swapped), replace(read, pattern=letters_apart)):
        with pytest.raises(ModelError, match="other ids than tiktoken"):
            nanochat_tokenizer.compare(other, tokenizer_of(imported))


def rendered(*parts: str) -> list[int]:
    """Ids of texts and special tokens, each by itself, as nanochat renders a conversation."""
    ids: list[int] = []
    for part in parts:
        special = part in nanochat_tokenizer.SPECIAL
        ids += (
            [encoding().encode_single_token(part)] if special else encoding().encode_ordinary(part)
        )
    return ids


USER, ASSISTANT = ("<|user_start|>", "<|user_end|>"), ("<|assistant_start|>", "<|assistant_end|>")


def test_conversations_are_rendered_as_nanochat_does(imported: Path) -> None:
    tokenizer = tokenizer_of(imported)
    found = render("  1+1\n", tokenizer, system_prompt="Be the sum. ")
    asked = "Be the sum. \n\n  1+1\n"
    assert found == rendered("<|bos|>", USER[0], asked, USER[1], ASSISTANT[0])
    messages = [
        {"role": "user", "content": "the"},
        {"role": "assistant", "content": " sum "},
        {"role": "user", "content": "<b>"},
    ]
    assert render(messages, tokenizer) == rendered(
        "<|bos|>", USER[0], "the", USER[1], ASSISTANT[0], " sum ", ASSISTANT[1],
        USER[0], "<b>", USER[1], ASSISTANT[0],
    )  # fmt: skip
    tool = [
        {"type": "text", "text": "it is "},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
    ]
    messages = [messages[0], {"role": "assistant", "content": tool}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == rendered(
        "<|bos|>", USER[0], "the", USER[1], ASSISTANT[0], "it is ", "<|python_start|>", "1+1",
        "<|python_end|>", "<|output_start|>", "2", "<|output_end|>", ASSISTANT[1],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("roles", "why"),
    [
        ("user user", "takes turns"),
        ("user system", "takes turns"),
        ("system", "followed by a user"),
        ("system assistant user", "takes turns"),
        ("user tool", "takes turns"),
    ],
)
def test_turns_that_nanochat_does_not_know_are_refused(
    imported: Path, roles: str, why: str
) -> None:
    messages = [{"role": role, "content": "x"} for role in roles.split()]
    with pytest.raises(DataError, match=why):
        render(messages, tokenizer_of(imported))


# ---- what is not run, and what is refused ----------------------------------------------------


class Attack:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("which", ["tokenizer", "weights", "inside"])
def test_nothing_that_a_pickle_asks_for_is_run(tmp_path: Path, which: str) -> None:
    folder, trace = nanochats.make(tmp_path), tmp_path / "trace"
    attack = Attack(trace)
    if which == "weights":
        torch.save({"lm_head.weight": attack}, folder / MODEL)
    else:
        held = pickle.dumps(attack) if which == "tokenizer" else pickled(states(pat_str=attack))
        (tmp_path / "tokenizer" / "tokenizer.pkl").write_bytes(held)
    with pytest.raises(ModelError, match="data only"):
        import_nanochat(folder, tmp_path / "out")
    assert not trace.exists()
    if which == "tokenizer":
        pickle.loads((tmp_path / "tokenizer" / "tokenizer.pkl").read_bytes())
        assert trace.exists()  # so it is one


def states(**changes: Any) -> dict[str, Any]:
    state: dict[str, Any] = encoding().__getstate__()
    return state | changes


def without(mapping: dict[Any, int], key: Any) -> dict[Any, int]:
    return {name: number for name, number in mapping.items() if name != key}


WRONG: dict[str, Callable[[], Any]] = {
    "has no <|python_end|>": lambda: states(
        special_tokens=without(states()["special_tokens"], "<|python_end|>")
    ),
    "no token for some byte": lambda: states(
        mergeable_ranks=without(states()["mergeable_ranks"], b"a")
    ),
    "without a gap": lambda: states(mergeable_ranks=states()["mergeable_ranks"] | {b"zz": 299}),
    "tiktoken's own encoding 'gpt2'": lambda: "gpt2",
    "its pattern is no text": lambda: states(pat_str=3),
    "not bytes with an id": lambda: states(mergeable_ranks={"a": 1}),
    "it has no": lambda: {"pat_str": "x"},
}


@pytest.mark.parametrize("why", WRONG)
def test_a_tokenizer_that_is_not_nanochats_is_refused_with_the_reason(
    tmp_path: Path, why: str
) -> None:
    file = tmp_path / "tokenizer.pkl"
    file.write_bytes(pickled(WRONG[why]()))
    with pytest.raises(ModelError, match=why.replace("|", r"\|")):
        nanochat_tokenizer.read(file)


def pickled(state: Any) -> bytes:
    """A tiktoken encoding with this state, as pickle writes it."""

    class Encoding:
        def __getstate__(self) -> Any:
            return state

    Encoding.__module__, Encoding.__qualname__ = "tiktoken.core", "Encoding"
    patch = pytest.MonkeyPatch()
    patch.setattr(tiktoken.core, "Encoding", Encoding)
    try:
        return pickle.dumps(Encoding())
    finally:
        patch.undo()


def spoil(folder: Path, how: str) -> dict[str, Any]:
    """Make something wrong with a checkpoint; further arguments of the import."""
    weights = torch.load(folder / MODEL, weights_only=True)
    meta = json.loads((folder / META).read_text())
    sizes = meta["model_config"]
    if how == "shape":
        weights["lm_head.weight"] = weights["lm_head.weight"][:299]
    elif how == "layer":
        del weights["transformer.h.1.mlp.c_fc.weight"]
    elif how == "sizes":
        sizes["n_embd"] = 60.5
    elif how == "heads":
        sizes["n_kv_head"] = 3
    elif how == "vocabulary":
        sizes["vocab_size"] = 301
    elif how == "truncated":
        data = (folder / MODEL).read_bytes()
        (folder / MODEL).write_bytes(data[: len(data) // 2])
        return {}
    elif how == "no tokenizer":
        (folder.parents[1] / "tokenizer" / "tokenizer.pkl").unlink()
    torch.save(weights, folder / MODEL)
    (folder / META).write_text(json.dumps(meta))
    return {"step": 3} if how == "step" else {}


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("shape", "lm_head.weight has the shape"),
        ("layer", "lacks transformer.h.1.mlp.c_fc.weight"),
        ("sizes", "does not describe a model"),
        ("heads", "heads do not divide"),
        ("vocabulary", "tokenizer has 300 tokens, the model 301"),
        ("truncated", "holds no weights"),
        ("no tokenizer", "no tokenizer.pkl for"),
        ("step", "(?s)no model_.*of step 3.*steps are 7"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    tmp_path: Path, how: str, what: str
) -> None:
    folder = nanochats.make(tmp_path)
    with pytest.raises(KitError, match=what):
        import_nanochat(folder, tmp_path / "out", **spoil(folder, how))
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_wrote_and_where_checkpoints_are(
    tmp_path: Path, checkpoint: Path, base: Path
) -> None:
    runner, out = CliRunner(), tmp_path / "out"
    told = runner.invoke(
        app, ["import", "nanochat", str(checkpoint), str(out), "--dtype", "bfloat16"]
    )
    assert told.exit_code == 0, told.output
    assert "step 7" in told.output
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    told = runner.invoke(app, ["import", "nanochat", str(base), str(out)])
    assert told.exit_code == 2
    assert str(checkpoint) in "".join(told.output.split())
