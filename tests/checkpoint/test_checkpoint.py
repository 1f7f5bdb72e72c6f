"""Checkpoints on the real stack: whole or not there, and never continued from in silence."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from kit import RLSession, SessionConfig
from kit.checkpoint import checkpoint, manifest
from kit.errors import CheckpointError
from tests.cases import slow
from tests.small_models import mixture_of_experts
from tests.steps import responses_and_metrics
from tests.trainer.test_state import RunsCode


def weights(session: RLSession) -> Any:
    return session.debug.stack.probe("checksums")


def load(session: RLSession, folder: Path) -> None:
    """As `RLSession.load` does, into the session that runs."""
    _, state = checkpoint.read(folder)
    checkpoint.restore(session.debug.state, session.debug.stack, folder, state)


@pytest.mark.slow
def test_a_session_that_is_resumed_gives_the_same_next_ten_metrics_lines(
    session: RLSession, tmp_path: Path
) -> None:
    session.train(2, show=False)
    path = session.save(tmp_path / "two")
    expected = responses_and_metrics(session.train(10, show=False).steps)
    session.restore("first")
    session.step()
    load(session, path)
    assert (session.step_count, session.weight_version, len(session.history)) == (2, 2, 2)
    assert session.last_rollout is not None
    assert session.last_batch is not None
    assert responses_and_metrics(session.train(10, show=False).steps) == expected


def test_a_checkpoint_says_what_it_is_and_what_is_in_it(session: RLSession, tmp_path: Path) -> None:
    session.step()
    path = session.save(tmp_path / "one")
    said = json.loads((path / "manifest.json").read_text())
    assert said["format"] == manifest.FORMAT
    assert (said["step"], said["weight_version"], said["num_trainers"]) == (1, 1, 1)
    assert said["versions"].keys() >= {"kit", "python", "torch", "ray", "sglang", "transformers"}
    files = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    assert files == {*said["files"], "manifest.json"}
    assert files >= {"config.yaml", "state.json", "last_rollout.jsonl", "last_batch.json"}
    assert {Path(f).suffix for f in files} == {".yaml", ".json", ".jsonl", ".safetensors"}
    assert manifest.read(path) == said


HARMS: list[tuple[Any, str]] = [
    (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
    (lambda p: (p / "manifest.json").write_text("{"), "is damaged"),
    (lambda p: (p / "manifest.json").write_text("[]"), "holds no mapping"),
    (lambda p: (p / "manifest.json").write_text('{"format": 1}'), "format 1; this version"),
    (lambda p: (p / "manifest.json").write_text('{"format": 2}'), "lists no files"),
    (lambda p: (p / "state.json").write_text("{}"), "state.json is of another length"),
    (lambda p: (p / "trainer" / "trainer.json").unlink(), "trainer.json is missing"),
    (lambda p: (p / "trainer" / "more.safetensors").touch(), "more.safetensors is not of it"),
    (lambda p: (p / ".metadata").write_bytes(pickle.dumps(1)), ".metadata is not of it"),
    (lambda p: flip_a_bit(next((p / "trainer").glob("*.safetensors"))), "has changed"),
    (lambda p: as_link(p / "state.json"), "is no plain file"),
    (shutil.rmtree, "no manifest.json"),
]


@pytest.mark.slow
def test_what_is_not_as_it_was_written_is_refused_and_changes_nothing(
    session: RLSession, tmp_path: Path
) -> None:
    written = session.save(tmp_path / "one")
    session.step()
    before = weights(session)
    for number, (harm, says) in enumerate(HARMS):
        path = shutil.copytree(written, tmp_path / str(number))
        harm(path)
        with pytest.raises(CheckpointError, match=says):
            session.restore(path)
        with pytest.raises(CheckpointError, match=says):
            RLSession.load(path)  # before any process is started
    assert (session.step_count, weights(session)) == (1, before)
    session.step()


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def as_link(file: Path) -> None:
    target = file.rename(file.parent.parent / "elsewhere")
    file.symlink_to(target)


@pytest.mark.slow
def test_a_hostile_checkpoint_with_a_manifest_to_match_runs_no_code(
    session: RLSession, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    for place in (".metadata", "trainer/.metadata", "trainer/model.safetensors", "state.json"):
        path = session.save(tmp_path / "hostile")
        (path / place).write_bytes(pickle.dumps(RunsCode(mark)))
        reseal(path)
        with suppress(CheckpointError):  # some of them are never looked at
            session.restore(path)
        assert not mark.exists(), place
        shutil.rmtree(path)
    session.step()


def reseal(path: Path) -> None:
    said = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").unlink()
    manifest.seal(path, "checkpoint", {k: v for k, v in said.items() if k in ("session", "step")})


@pytest.mark.parametrize("key", ["model.trust_remote_code", "engine.extra"])
def test_a_checkpoint_that_asks_for_a_models_code_is_refused_until_it_is_trusted(
    session: RLSession, tmp_path: Path, key: str
) -> None:
    path = session.save(tmp_path / "one")
    section, name = key.split(".")
    tree = yaml.safe_load((path / "config.yaml").read_text())
    tree[section][name] = {"trust_remote_code": True} if name == "extra" else True
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    reseal(path)
    with pytest.raises(CheckpointError, match=r"asks for Python code(.|\n)*trust_remote_code=True"):
        RLSession.load(path)


@pytest.mark.parametrize(
    ("settings", "network"),
    [
        ({"advantage_estimator": "ppo"}, "a critic"),
        *slow(
            ({"kl_loss_coef": 0.1}, "a reference model"),
            ({"kl_coef": 0.1, "ref_update_interval": 2}, "a reference model"),
        ),
    ],
)
def test_a_checkpoint_with_a_network_that_the_session_lacks_is_refused_and_changes_nothing(
    session: RLSession, tmp_path: Path, settings: dict[str, Any], network: str
) -> None:
    session.step()
    path = session.save(tmp_path / "one")
    tree = yaml.safe_load((path / "config.yaml").read_text())
    tree["training"] |= settings
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    reseal(path)
    before, config = weights(session), session.config
    with pytest.raises(CheckpointError, match=rf"has {network}(.|\n)*RLSession\.load"):
        session.restore(path)
    assert (session.config, weights(session)) == (config, before)
    assert session.step().step == 1


def test_what_trainers_were_started_with_is_no_other_after_a_checkpoint_of_another_session(
    session: RLSession, tmp_path: Path
) -> None:
    path = session.save(tmp_path / "one")
    tree = yaml.safe_load((path / "config.yaml").read_text())
    tree["training"] |= {"max_tokens_per_gpu": 4321, "learning_rate": 7e-5}
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    reseal(path)
    own = session.config.training.max_tokens_per_gpu
    session.restore(path)
    training = session.config.training
    assert (training.max_tokens_per_gpu, training.learning_rate) == (own, 7e-5)


def test_a_damaged_state_leaves_the_session_as_it_was(session: RLSession, tmp_path: Path) -> None:
    path = session.save(tmp_path / "one")
    state = json.loads((path / "state.json").read_text())
    session.step()
    before, stood = weights(session), session.debug.state.stream.state()
    for harm in ({"history": None}, {"step_count": "x"}, {"stream": {}}, {"buffer": [[{"a": 1}]]}):
        (path / "state.json").write_text(json.dumps(state | harm))
        reseal(path)
        with pytest.raises(Exception, match=r"damaged|no state"):
            session.restore(path)
        assert (session.step_count, session.weight_version) == (1, 1)
        assert (weights(session), session.debug.state.stream.state()) == (before, stood)


def with_tensor(path: Path, change: Callable[[str, Any], Any]) -> str:
    """Change the first of the policy's tensors in the files of a checkpoint; returns its name."""
    for file in sorted((path / "trainer").glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            facts = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        found = {name: change(name, tensor) for name, tensor in tensors.items()}
        changed = [name for name, tensor in found.items() if tensor is not None]
        if changed:
            first = {changed[0]: found[changed[0]]}
            save_file(tensors | first, file, metadata=facts)
            return changed[0]
    raise AssertionError("no such tensor")


def poisoned(value: float) -> Callable[[str, Any], Any]:
    def change(name: str, tensor: Any) -> Any:
        if not name.startswith("policy/"):
            return None
        tensor.view(-1)[3] = value
        return tensor

    return change


def negative(name: str, tensor: Any) -> Any:
    return -torch.ones_like(tensor) if name.endswith("exp_avg_sq") else None


WRONG_TENSORS: dict[str, tuple[Callable[[str, Any], Any], str]] = {
    "NaN": (poisoned(math.nan), "has 1 numbers that are not finite"),
    "infinity": (poisoned(-math.inf), "not finite"),
    "float16": (lambda n, x: x.half() if n.startswith("policy/") else None, "is of type F16"),
    "a negative square": (negative, "numbers below 0"),
}


@pytest.mark.parametrize("kind", ["NaN", *slow("float16", "infinity", "a negative square")])
def test_weights_that_cannot_be_are_refused_before_anything_changes(
    session: RLSession, tmp_path: Path, kind: str
) -> None:
    change, why = WRONG_TENSORS[kind]
    session.step()
    path = session.save(tmp_path / "one")
    name = with_tensor(path, change)
    reseal(path)
    before = weights(session)
    for load in (session.restore, RLSession.load):
        with pytest.raises(CheckpointError, match="holds what cannot be") as caught:
            load(path)
        assert why in str(caught.value)
        assert name in str(caught.value)
    assert weights(session) == before
    assert session.step().step == 1


WRONG_STATES: list[dict[str, Any]] = [
    {"step_count": math.inf}, {"step_count": -1}, {"step_count": 1e30}, {"step_count": 10**30},
    {"step_count": True}, {"step_count": "1"}, {"generations": -1}, {"weight_version": 0.5},
    {"history": [{"a": "b"}]}, {"history": [[1]]}, {"changes": [1]}, {"inputs": []},
    {"evaluated": "x"}, {"stream": []}, {"buffer": {}},
]  # fmt: skip


@pytest.mark.slow
def test_counters_that_cannot_be_are_refused_before_anything_changes(
    session: RLSession, tmp_path: Path
) -> None:
    path = session.save(tmp_path / "one")
    state = json.loads((path / "state.json").read_text())
    before = weights(session), session.step_count
    for harm in WRONG_STATES:
        (path / "state.json").write_text(json.dumps(state | harm))
        reseal(path)
        with pytest.raises(CheckpointError, match=r"state\.json is damaged") as caught:
            session.restore(path)
        assert len(str(caught.value)) < 1000, harm
        assert (weights(session), session.step_count) == before
    (path / "state.json").write_text(json.dumps(state))
    for text in ('{"optimizer_steps": 1e999, "updates": 0}', "[" * 9000, "{}"):
        (path / "trainer" / "trainer.json").write_text(text)
        reseal(path)
        with pytest.raises(CheckpointError, match="holds what cannot be"):
            session.restore(path)
    assert (weights(session), session.step_count) == before


@pytest.mark.slow
def test_of_numbered_checkpoints_the_newest_stay(
    session: RLSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session.configure({"checkpoint.interval": 1, "checkpoint.keep_last": 2})
    other = Path("checkpoints") / f"{session.config.name}-step-000000"
    other.mkdir(parents=True)
    (other / "thesis.txt").write_text("not ours")
    session.train(4, show=False)
    names = sorted(path.name for path in Path("checkpoints").iterdir())
    assert names == [f"tiny-step-{n:06d}" for n in (0, 3, 4)]
    assert (other / "thesis.txt").exists()
    session.save(keep_last=1)
    assert sorted(path.name for path in Path("checkpoints").iterdir()) == [other.name, names[-1]]
    session.save("checkpoints/by-name")
    assert checkpoint.read(session.save())[1]["step_count"] == 4
    assert Path("checkpoints/by-name").is_dir()


@pytest.mark.slow
def test_training_goes_on_where_a_checkpoint_on_its_way_cannot_be_written_and_says_so(
    session: RLSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").write_text("in the way")
    session.configure({"checkpoint.interval": 2})
    with pytest.warns(
        RuntimeWarning, match=r"goes on without a checkpoint(.|\n)*cannot be written"
    ):
        assert len(session.train(3, show=False)) == 3
    (tmp_path / "checkpoints").unlink()
    session.step()
    assert checkpoint.read("checkpoints/tiny-step-000004")[1]["step_count"] == 4


@pytest.mark.slow
def test_a_checkpoint_takes_the_place_of_the_one_before_in_one_move(
    session: RLSession, tmp_path: Path
) -> None:
    """Somebody looks all the time: there is always a whole one, of before or of after."""
    path, seen, stop = session.save(tmp_path / "latest"), set(), threading.Event()
    problems: list[str] = []

    def look() -> None:
        while not stop.is_set():
            try:
                seen.add(json.loads((path / "manifest.json").read_text())["step"])
            except OSError as error:
                problems.append(str(error))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(3):
            session.step()
            session.save(path)
    finally:
        stop.set()
        thread.join()
    assert not problems
    assert seen <= {0, 1, 2, 3}
    assert checkpoint.read(path)[1]["step_count"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes: room for one checkpoint of the first moment."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_costs_neither_the_session_nor_the_checkpoint_before(
    session: RLSession, small_disk: Path
) -> None:
    first = session.save(small_disk / "latest")
    session.train(2, show=False)
    before = weights(session)
    (small_disk / "ballast").write_bytes(bytes(room(small_disk) - 100_000))
    with pytest.raises(CheckpointError, match="No space left") as caught:
        session.save(first)
    assert "free space" in str(caught.value)
    assert sorted(p.name for p in small_disk.iterdir()) == ["ballast", "latest"]
    assert checkpoint.read(first)[1]["step_count"] == 0
    assert (session.step_count, weights(session)) == (2, before)
    for free in (1000, 0):  # it is the client's own files that find no room
        (small_disk / "ballast").write_bytes(b"")
        (small_disk / "ballast").write_bytes(bytes(room(small_disk) - free))
        with pytest.raises(CheckpointError):
            session.save(small_disk / "other")
        assert sorted(p.name for p in small_disk.iterdir()) == ["ballast", "latest"]
    session.step()
    load(session, first)
    assert session.step_count == 0


def room(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def test_a_folder_that_cannot_be_written_is_named_and_costs_nothing(
    session: RLSession, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot be written(.|\n)*the session is unchanged"):
        session.save(tmp_path / "file" / "checkpoint")
    with pytest.raises(CheckpointError, match="cannot be written"):
        session.save("/proc/checkpoint")
    session.step()


@pytest.mark.slow
def test_an_interrupted_save_leaves_the_checkpoint_before_and_nothing_half(
    session: RLSession, tmp_path: Path
) -> None:
    path = session.save(tmp_path / "latest")
    for delay in (0.0, 0.01, 0.03, 0.06, 0.1):
        session.step()
        main = threading.main_thread().ident
        assert main is not None
        timer = threading.Timer(delay, signal.pthread_kill, (main, signal.SIGINT))
        done = session.step_count
        with pytest.raises(KeyboardInterrupt):
            save_until_the_end_of(timer, session, path)
        timer.join()
        assert [p.name for p in tmp_path.iterdir()] == ["latest"]
        assert checkpoint.read(path)[1]["step_count"] in (0, *range(done + 1))
        assert session.step_count == done
    session.step()


def save_until_the_end_of(timer: threading.Timer, session: RLSession, path: Path) -> None:
    """The interrupt comes while it saves, or while it waits with all done."""
    timer.start()
    session.save(path)
    timer.join()


def test_what_a_killed_process_left_half_is_removed_by_the_next_save(
    session: RLSession, tmp_path: Path
) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = tmp_path / f"latest.partial-{ended.pid}"
    living = tmp_path / f"latest.partial-{os.getppid()}"
    for folder in (left, living):
        (folder / "trainer").mkdir(parents=True)
    session.save(tmp_path / "latest")
    assert not left.exists()
    assert living.exists()  # somebody writes there


@pytest.mark.slow
def test_a_new_process_goes_on_with_experts_critic_and_moving_reference_as_if_never_stopped(
    shared: Any, tmp_path: Path
) -> None:
    if shared.session:
        shared.session.close()
    training = {
        "advantage_estimator": "ppo",
        "critic": {"learning_rate": 1e-3},
        "kl_coef": 0.01,
        "ref_update_interval": 3,
        "learning_rate": 1e-4,
        "lr_schedule": "cosine",
        "warmup_steps": 4,
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 4,
        "global_batch_size": 8,
        "epochs_per_rollout": 2,
        "num_rollout": 12,
    }
    model = {"name": str(mixture_of_experts(tmp_path / "moe"))}
    data = {"source": "tiny:addition"}
    with RLSession.start(SessionConfig(model=model, data=data, training=training)) as session:
        session.train(2, show=False)
        path = session.save(tmp_path / "two")
        expected = responses_and_metrics(session.train(10, show=False).steps)
    with RLSession.load(path) as session:
        assert session.step_count == 2
        assert responses_and_metrics(session.train(10, show=False).steps) == expected
        assert session.check_mismatch(session.generate()).verdict == "pass"
