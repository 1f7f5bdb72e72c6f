"""The command, the machine it looks at, and how it shows what it found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession
from kit.cluster import folder, lease
from kit.config import SessionConfig
from kit.doctor import diagnose, machine, stacks
from kit.errors import ConfigError, SessionError
from kit.models.adapters import AdapterShape
from kit.utils.hardware import Card, GpuProcess

GIB = 1 << 30


# ---- the command --------------------------------------------------------------------------------


def test_the_tiny_model_can_start_and_the_exit_code_says_so(kit_doctor: Any) -> None:
    said = kit_doctor()
    assert said.code == 0, said.text
    assert said.text.startswith("tiny can start here")
    for name in ("Python", "packages", "model", "prompts", "held-out prompts", "reward"):
        assert said.level(name) == "ok"
    assert "sglang 0.5.16" in said.words
    assert "5,892 rows of tiny:addition" in said.words


@pytest.mark.slow
def test_a_model_that_is_nowhere_is_a_problem_with_the_command_that_fetches_it(
    kit_doctor: Any, home: Path
) -> None:
    said = kit_doctor("qwen3-0.6b-gsm8k")
    assert said.code == 1
    assert "cannot start here yet" in said.text
    assert said.level("model") == said.level("prompts") == "problem"
    assert f"is not in the Hugging Face cache {home / 'hub'}" in said.words
    assert re.search(r"^ +\$ (\S+/)?hf download Qwen/Qwen3-0\.6B$", said.text, re.M)
    assert "$ hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B" in said.text
    assert "load_dataset('openai/gsm8k', 'main')" in said.text
    assert "$ hf download openai/gsm8k --repo-type dataset --local-dir gsm8k" in said.text
    assert "set data.source and data.eval_source to gsm8k/main" in said.words


def test_a_wrong_call_exits_with_2_and_the_way_out(kit_doctor: Any, tmp_path: Path) -> None:
    assert kit_doctor("qwen3").code == 2
    assert "Did you mean" in kit_doctor("tinny").text
    (tmp_path / "wrong.yaml").write_text("trainning: {}")
    said = kit_doctor("wrong.yaml")
    assert said.code == 2
    assert "Did you mean 'training'?" in said.text


def test_the_command_that_it_names_exists_with_its_options() -> None:
    words = [str(Path(sys.executable).parent / "hf"), "download", "--help"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "--repo-type" in shown
    assert "--local-dir" in shown


def test_it_loads_nothing_of_the_stack_and_asks_no_network() -> None:
    code = """
import socket, sys
asked = []
def hook(event, args):  # stacks on this machine are asked through a file
    if event == "socket.connect" and args[0].family != socket.AF_UNIX:
        asked.append(args)
sys.addaudithook(hook)
from kit.doctor import diagnose
for preset in ("tiny", "qwen3-0.6b-gsm8k"):
    diagnose(preset)
heavy = {"torch", "sglang", "ray", "transformers", "datasets", "matplotlib"}
print(sorted(heavy & set(sys.modules)), asked)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"


# ---- packages, memory and disks -----------------------------------------------------------------


def test_packages_are_compared_with_their_pins() -> None:
    pins = {"torch": "2.11.0", "ray": "2.60.0"}
    right = machine.compare_versions({"torch": "2.11.0+cu130", "ray": "2.60.0"}, pins)
    assert right.level == "ok"
    wrong = machine.compare_versions({"torch": "2.9.1", "ray": None}, pins)
    assert wrong.level == "problem"
    assert "torch has to be 2.11.0" in wrong.found
    assert "ray is not installed" in wrong.found
    assert any("requirements.lock" in command for command in wrong.commands)
    assert machine.compare_versions({"torch": "2.11.0"}, {}).level == "note"


def test_the_pins_are_those_of_the_project() -> None:
    assert machine.pins().keys() - {machine.ADAPTERS} == set(machine.STACK)


def test_of_adapters_no_disk_is_asked_for_that_a_whole_model_would_take() -> None:
    weights = 8 * GIB
    whole = {found.name: found.found for found in machine.room("cpu", weights)}
    unknown = {found.name: found.found for found in machine.room("cpu", weights, adapts=True)}
    assert "checkpoints" in whole
    assert "checkpoints" not in unknown  # the model is not here to tell how large they are
    shape = AdapterShape(252, 33_030_144)
    known = {found.name: found.found for found in machine.room("cpu", weights, shape, adapts=True)}
    assert "a checkpoint takes about 396.4 MB" in known["checkpoints"]
    assert whole["host memory"] != unknown["host memory"]


def test_short_memory_and_disks_are_told_by_how_short_they_are() -> None:
    memory = [machine.host_memory(free * GIB, 8 * GIB).level for free in (9, 6, 3)]
    assert memory == ["ok", "note", "problem"]
    shared = [machine.shared_memory(free, 512 << 20, GIB) for free in (2 * GIB, GIB, 64 << 20)]
    assert [found.level for found in shared] == ["ok", "note", "problem"]
    assert "--shm-size=3g" in shared[1].fix
    disks = [machine.temporary("/tmp", free << 20, 0.5).level for free in (9000, 1000, 100)]
    assert disks == ["ok", "note", "problem"]
    assert machine.temporary("/tmp", 90 * GIB, 0.97).level == "note"
    assert machine.checkpoints("/home", 8 * GIB, 9 * GIB).level == "note"


def test_a_temporary_folder_whose_path_is_too_long_for_sockets_is_told() -> None:
    found = machine.temporary("/tmp", 90 * GIB, 0.1, wanted="/tmp/" + "x" * 60)
    assert found.level == "ok"
    assert "65 characters" in found.found


# ---- stacks -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_living_stack_is_listed_and_left_alone(session: RLSession, kit_doctor: Any) -> None:
    own = [
        f for f in session.doctor().findings if "process" in f.found and f.name == "other stacks"
    ]
    assert any("the session of this process" in finding.found for finding in own)
    stack = next(each for each in stacks.living() if each.client == os.getpid())
    assert stack.processes > 2
    sockets = [str(path) for path in stack.directory.rglob("plasma_store")]
    expected = len(str(stack.directory.parent)) + len(folder.SOCKET)
    assert all(len(path) <= expected for path in sockets)
    assert sockets

    said = kit_doctor()
    assert f"session {session.config.name!r} is alive in {stack.directory}" in said.words
    assert f"driven by process {os.getpid()}, in {os.getcwd()}" in said.words
    assert f"doctor --stop {stack.stack}" in said.words
    assert len(stack.ports) > 2
    assert session.generate(["1+1="], n_samples_per_prompt=1)


def test_folders_of_dead_stacks_are_listed_and_others_are_not(tmp_path: Path) -> None:
    for name in ("kit-dead", "kit-alive", "kit-other"):
        (tmp_path / name).mkdir()
    for name in ("kit-dead", "kit-alive"):
        (tmp_path / name / "head.log").touch()
    alive = stacks.LivingStack(tmp_path / "kit-alive", 3, 1, 1)
    assert stacks.abandoned([alive], tmp_path) == [tmp_path / "kit-dead"]
    # Between its folder and its process, a head that is being started has a socket only.
    with lease.listen(tmp_path / "kit-dead"):
        assert stacks.abandoned([alive], tmp_path) == []
    assert stacks.abandoned([alive], tmp_path) == [tmp_path / "kit-dead"]


# ---- in a notebook ------------------------------------------------------------------------------


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_sessions_of_other_users_are_counted_without_names_and_cannot_be_ended() -> None:
    before = stacks.others()
    head = ["sh", "-c", "echo; while :; do :; done", stacks.HEAD, "/tmp/kit-secretname"]
    somebody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    process = subprocess.Popen(
        [*somebody, *head], stdout=subprocess.PIPE, start_new_session=True, cwd="/"
    )
    try:
        assert process.stdout
        assert process.stdout.readline()
        card = Card("card", 80 << 30, processes=(GpuProcess(process.pid, "sh", 3 << 30),))
        use = stacks.others([card])
        assert use is not None
        assert use.sessions == 1 + (before.sessions if before else 0)
        assert (use.processes >= use.sessions, use.device) == (True, 3 << 30)
        assert use.cores > 0
        assert all(stack.directory.name != "kit-secretname" for stack in stacks.living())
        (finding, *_) = stacks.findings([], replace(use, sessions=1, processes=1))
        assert finding.name == "other users"
        assert re.match(
            r"1 session of other users: 1 process, .* of \d+ cores busy, 3\.0 GiB of GPU memory",
            finding.found,
        )
        assert "secretname" not in repr(finding)
        with pytest.raises(SessionError, match="of yours"):
            stacks.stop("secretname")
    finally:
        process.kill()
        process.wait()


def test_a_diagnosis_shows_itself_with_words_beside_every_sign() -> None:
    report = diagnose("tiny")
    shown = report._repr_mimebundle_()
    for finding in report.findings:
        assert finding.name in shown["text/html"]
    assert "✓ ok" in shown["text/html"]
    assert str(report) == shown["text/plain"]
    assert report.ready is not bool(report.problems)


@pytest.mark.slow
def test_commands_are_never_broken_over_lines(kit_doctor: Any) -> None:
    lines = kit_doctor("qwen3-0.6b-gsm8k").text.splitlines()
    (load,) = [line for line in lines if "load_dataset" in line]
    assert load.endswith("load_dataset('openai/gsm8k', 'main')\"")


def test_diagnose_takes_what_start_takes_and_refuses_the_same() -> None:
    assert diagnose(SessionConfig.preset("tiny")).name == "tiny"
    with pytest.raises(ConfigError, match="Did you mean 'tiny'"):
        diagnose("tinny")
