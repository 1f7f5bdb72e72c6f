"""`kit doctor`: what it says of machines as they are, and of numbers as they could be."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession
from kit.config import SessionConfig
from kit.doctor import Finding, device, diagnose, driver, files, machine, stacks
from kit.doctor.driver import Card, Driver, Program
from kit.errors import ConfigError
from kit.tiny import MODEL_DIR
from tests.hub import drop, put

GIB = 1 << 30
NAME = "somebody/Qwen3-0.5B"
H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, "0000:1E:00.0", 79 * GIB)


@dataclass(frozen=True)
class Said:
    """One call of `kit doctor`."""

    code: int
    text: str

    @property
    def words(self) -> str:
        """On one line, however the terminal wrapped it."""
        return " ".join(self.text.split())

    def level(self, name: str) -> str:
        (found,) = re.findall(rf"^. (ok|note|problem) +{re.escape(name)}  ", self.text, re.M)
        return str(found)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty HF_HOME."""
    return tmp_path / "home"


@pytest.fixture
def kit_doctor(tmp_path: Path, home: Path) -> Any:
    """Calls the command with settings, in a folder and with a Hugging Face home of its own."""

    def call(config: str | dict[str, Any] = "tiny", **env: str) -> Said:
        if isinstance(config, dict):
            config = str(SessionConfig(**config).dump(tmp_path / "config.yaml"))
        done = subprocess.run(
            [sys.executable, "-m", "kit", "doctor", config],
            env={k: v for k, v in os.environ.items() if not k.startswith("HF_")}
            | {"HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])}
            | env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Said(done.returncode, done.stdout + done.stderr)

    return call


# ---- the command -------------------------------------------------------------------------------


def test_the_tiny_model_can_start_and_the_exit_code_says_so(kit_doctor: Any) -> None:
    said = kit_doctor()
    assert said.code == 0, said.text
    assert said.text.startswith("tiny can start here")
    for name in ("Python", "packages", "model", "prompts", "held-out prompts", "reward"):
        assert said.level(name) == "ok"
    assert "sglang 0.5.16" in said.words
    assert "5,892 rows of tiny:addition" in said.words


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
import sys
asked = []
sys.addaudithook(lambda event, args: event == "socket.connect" and asked.append(args))
from kit.doctor import diagnose
for preset in ("tiny", "qwen3-0.6b-gsm8k"):
    diagnose(preset)
heavy = {"torch", "sglang", "ray", "transformers", "datasets", "matplotlib"}
print(sorted(heavy & set(sys.modules)), asked)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"


# ---- weights -----------------------------------------------------------------------------------


def shards(folder: Path) -> None:
    """The tiny model in several files with an index, as larger ones come."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        part = {name: weights[name] for name in names[number::3]}
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory of several files."""
    folder = Path(shutil.copytree(MODEL_DIR, tmp_path / "copy"))
    shards(folder)
    return folder


HUB = {"model": {"name": NAME}, "data": {"source": "tiny:addition"}}


def test_a_model_in_the_cache_is_whole(kit_doctor: Any, home: Path, model: Path) -> None:
    snapshot = put(home, NAME, model)
    said = kit_doctor(HUB)
    assert said.level("model") == "ok"
    assert f"3.6 MB; whole, in {snapshot}" in said.words


def test_shards_that_a_cache_lacks_are_named_with_the_command_that_fetches_them(
    kit_doctor: Any, home: Path, model: Path
) -> None:
    snapshot = put(home, NAME, model)
    (snapshot / "model-00003-of-00003.safetensors").unlink()  # not yet downloaded
    drop(snapshot, "model-00002-of-00003.safetensors")  # copied without its blob
    said = kit_doctor(HUB)
    assert said.code == 1
    assert said.level("model") == "problem"
    assert "model-00002-of-00003.safetensors is a link to a file that is gone" in said.words
    assert "model-00003-of-00003.safetensors is missing" in said.words
    assert "model-00001" not in said.text
    assert re.search(rf"\$ (\S+/)?hf download {NAME}$", said.text, re.M)
    assert "copy all of models--somebody--Qwen3-0.5B" in said.words


def test_a_directory_whose_copy_was_cut_off_is_a_problem(kit_doctor: Any, model: Path) -> None:
    file = model / "model-00001-of-00003.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    said = kit_doctor({"model": {"name": str(model)}, "data": {"source": "tiny:addition"}})
    assert said.level("model") == "problem"
    assert f"is cut off: {size - 100:,} of {size:,} bytes are there" in said.words


def test_pointers_of_git_lfs_are_no_weights(kit_doctor: Any, model: Path) -> None:
    for file in model.glob("*.safetensors"):
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    said = kit_doctor({"model": {"name": str(model)}, "data": {"source": "tiny:addition"}})
    assert "no safetensors file" in said.words


def test_a_directory_that_is_not_there_is_a_problem(kit_doctor: Any, tmp_path: Path) -> None:
    gone = tmp_path / "some" / "model"
    said = kit_doctor({"model": {"name": str(gone)}, "data": {"source": "tiny:addition"}})
    assert said.level("model") == "problem"
    assert str(gone) in said.text


def test_a_directory_without_tokenizer_or_chat_template_is_told(
    kit_doctor: Any, model: Path
) -> None:
    config = {"model": {"name": str(model)}, "data": {"source": "tiny:addition"}}
    (model / "chat_template.jinja").unlink()
    assert kit_doctor(config).level("chat template") == "problem"
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "there is no tokenizer" in kit_doctor(config).words


# ---- prompts -----------------------------------------------------------------------------------


def test_a_file_of_prompts_that_is_missing_or_malformed_is_told_with_its_row(
    kit_doctor: Any, tmp_path: Path
) -> None:
    config = {"data": {"source": "train.jsonl", "eval_source": "test.jsonl"}}
    said = kit_doctor(config)
    assert said.code == 1
    assert said.level("prompts") == said.level("held-out prompts") == "problem"
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n{"question": "x"}\n')
    said = kit_doctor(config)
    assert "line 2: there is no field 'prompt'" in said.words
    rows = [{"question": "1 + 1?", "answer": "1 + 1 is 2.\n#### 2"}]
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) for row in rows))
    keys = {"input_key": "question", "label_key": "answer"}
    said = kit_doctor({"data": config["data"] | keys})
    assert said.code == 0, said.text
    assert "1 rows of train.jsonl" in said.words
    assert re.search(r"^✓ ok +reward +gsm8k$", said.text, re.M)


def test_evaluating_every_few_steps_without_held_out_prompts_is_a_problem(
    kit_doctor: Any, tmp_path: Path
) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n')
    config: dict[str, Any] = {"data": {"source": "train.jsonl"}}
    assert kit_doctor(config).level("held-out prompts") == "note"
    config["evaluation"] = {"interval": 5}
    assert kit_doctor(config).level("held-out prompts") == "problem"


SUMS = {
    "source": "somebody/sums:main",
    "eval_source": "somebody/sums:main",
    "input_key": "question",
    "label_key": "answer",
}
PREPARE = """
import sys
from datasets import load_dataset_builder
files = {split: f"{sys.argv[1]}/{split}.jsonl" for split in ("train", "test")}
builder = load_dataset_builder("json", "main", data_files=files)
builder.dataset_name, builder.repo_id, builder.config_id = "sums", "somebody/sums", "main"
builder._output_dir = builder._cache_dir = builder._build_cache_dir()
builder.download_and_prepare()
"""
READ = """
import sys
from kit.config import DataConfig
from kit.data import load_prompts
config = DataConfig(source=sys.argv[1], eval_source=sys.argv[1], input_key="question",
                    label_key="answer")
for split in ("train", "eval"):
    prompts = load_prompts(config, split=split, model_name="any")
    print(len(prompts), prompts.default_reward, prompts[0].label.splitlines()[-1])
"""


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """A dataset with the fields and splits of GSM8K, one row and two."""
    folder = tmp_path / "sums" / "main"
    folder.mkdir(parents=True)
    row = json.dumps({"question": "What is 1 + 1?", "answer": "1 + 1 is 2.\n#### 2"})
    (folder / "train.jsonl").write_text(f"{row}\n{row}\n")
    (folder / "test.jsonl").write_text(row)
    return folder


def offline(home: Path, code: str, argument: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(argument)],
        env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_dataset_that_was_loaded_before_is_found_and_can_be_read_without_a_network(
    kit_doctor: Any, home: Path, sums: Path
) -> None:
    config = {"data": SUMS}
    assert kit_doctor(config).level("prompts") == "problem"
    offline(home, PREPARE, sums)
    said = kit_doctor(config)
    assert said.level("prompts") == said.level("held-out prompts") == "ok"
    read = offline(home, READ, "somebody/sums:main").splitlines()[-2:]
    assert read == ["2 gsm8k #### 2", "1 gsm8k #### 2"]


def test_a_dataset_that_is_only_downloaded_is_named_by_the_folder_that_can_be_read(
    kit_doctor: Any, home: Path, sums: Path
) -> None:
    snapshot = put(home, "somebody/sums", sums.parent, repo_type="dataset")
    said = kit_doctor({"data": SUMS})
    assert said.level("prompts") == said.level("held-out prompts") == "note"
    folder = snapshot / "main"
    assert f"set data.source and data.eval_source to {folder}" in said.words
    said = kit_doctor({"data": SUMS | {"source": str(folder), "eval_source": str(folder)}})
    assert said.level("prompts") == said.level("held-out prompts") == "ok"
    assert offline(home, READ, folder).splitlines() == ["2 gsm8k #### 2", "1 gsm8k #### 2"]


# ---- devices -----------------------------------------------------------------------------------


def look(found: Driver, wanted: str = "auto", size: int | None = 1_500_000_000) -> list[Finding]:
    return list(device.findings(found, wanted, "Qwen/Qwen3-0.6B", size))


def test_a_machine_without_a_driver_is_a_problem_for_a_large_model_only() -> None:
    nothing = Driver("the driver's library libcuda.so.1 is not here")
    (large,) = look(nothing)
    assert large.level == "problem"
    assert "hours a step" in large.found
    assert look(nothing, size=4_000_000)[0].level == "ok"
    assert look(nothing, wanted="cpu")[0].level == "note"
    assert look(nothing, wanted="cuda", size=4_000_000)[0].level == "problem"
    assert device.would_take("auto", nothing) == "cpu"


def test_a_card_on_the_bus_without_a_driver_says_that_the_driver_is_missing() -> None:
    (found,) = look(Driver("the driver's library libcuda.so.1 is not here", installed=1))
    assert "1 NVIDIA card sits on this machine's bus" in found.fix
    assert "--gpus all" in found.fix


def test_a_driver_whose_cards_do_not_answer_is_not_taken_for_a_missing_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    (found,) = look(Driver("the driver shows no card to this process", (13, 0), installed=1))
    assert "CUDA_VISIBLE_DEVICES is '7': unset it" in found.fix
    assert "restart the machine" in found.fix


def test_a_driver_too_old_for_torch_is_a_problem_and_a_slightly_older_one_a_note() -> None:
    needs = device.torch_cuda()
    assert needs is not None
    levels = {
        version: look(Driver("", version, (H100,), "570.86"))[1].level
        for version in [(needs[0] - 1, 8), needs, (needs[0], needs[1] + 1)]
    }
    assert list(levels.values()) == ["problem", "ok", "ok"]
    assert device._driver(Driver("", (12, 4), (H100,)), (12, 8)).level == "note"
    old = look(Driver("", (needs[0] - 1, 8), (H100,), "570.86"))[1]
    assert f"CUDA {needs[0]}.{needs[1]}" in old.found
    assert "570.86" in old.found


def test_a_card_says_who_else_holds_its_memory() -> None:
    others = (Program(4711, "python3.11", 9 * GIB), Program(12, "not visible from here", None))
    busy = Card(H100.name, (9, 0), 80 * GIB, H100.bus, 70 * GIB, others)
    _, _, first, second = look(Driver("", (99, 0), (busy, H100)))
    assert first.level == "note"
    assert "process 4711 (python3.11, 9.0 GiB), process 12 (not visible from here)" in first.found
    assert "CUDA_VISIBLE_DEVICES" in first.fix
    assert second.level == "ok"
    assert "leaves it alone" in second.found


def test_a_card_without_bfloat16_is_a_problem() -> None:
    card = Card("Tesla T4", (7, 5), 15 * GIB, "0000:00:04.0", 15 * GIB)
    assert look(Driver("", (99, 0), (card,)))[2].level == "problem"


def test_what_a_session_would_hold_is_compared_with_what_is_free() -> None:
    config = SessionConfig.preset("tiny")
    source = files.source(config.model)
    assert source is not None
    assert device.memory(config, source, H100).level == "ok"
    full = Card(H100.name, H100.capability, H100.total, H100.bus, free=GIB // 2)
    found = device.memory(config, source, full)
    assert found.level == "problem"
    assert "memory.device_gib: 0.5" in found.fix
    small = Card("small", (9, 0), GIB, H100.bus, GIB)
    assert device.memory(config, source, small).level == "problem"


def test_the_driver_of_this_machine_answers_or_says_why_not() -> None:
    found = driver.ask()
    assert bool(found.cards) != bool(found.trouble)
    for card in found.cards:
        assert card.name
        assert 0 < (card.free or card.total) <= card.total


# ---- packages, memory and disks ----------------------------------------------------------------


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
    assert machine._pins().keys() == set(machine.STACK)


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


def test_a_temporary_folder_whose_path_is_too_long_for_sockets_is_a_problem() -> None:
    found = machine.temporary("/tmp/" + "x" * 60, 90 * GIB, 0.1)
    assert found.level == "problem"
    assert "65 characters" in found.found
    longest = int(re.findall(r"path of (\d+)", found.fix)[0])
    assert machine.temporary("/" * longest, 90 * GIB, 0.1).level == "ok"


# ---- stacks ------------------------------------------------------------------------------------


def test_a_living_stack_is_listed_and_left_alone(session: RLSession, kit_doctor: Any) -> None:
    own = [
        f for f in session.doctor().findings if "process" in f.found and f.name == "other stacks"
    ]
    assert any("the session of this process" in finding.found for finding in own)
    stack = next(each for each in stacks.living() if each.client == os.getpid())
    assert stack.processes > 2
    sockets = [str(path) for path in stack.directory.rglob("plasma_store")]
    expected = len(str(stack.directory.parent)) + len(machine.SOCKET)
    assert all(len(path) <= expected for path in sockets)
    assert sockets

    said = kit_doctor()
    assert f"one is alive in {stack.directory}" in said.words
    assert f"started by process {os.getpid()}" in said.words
    assert session.generate(["1+1="], n_samples_per_prompt=1)


def test_folders_of_dead_stacks_are_listed_and_others_are_not(tmp_path: Path) -> None:
    for name in ("kit-dead", "kit-alive", "kit-other"):
        (tmp_path / name).mkdir()
    for name in ("kit-dead", "kit-alive"):
        (tmp_path / name / "head.log").touch()
    alive = stacks.LivingStack(tmp_path / "kit-alive", 3, 1, 1)
    assert stacks.abandoned([alive], tmp_path) == [tmp_path / "kit-dead"]


# ---- in a notebook -----------------------------------------------------------------------------


def test_a_diagnosis_shows_itself_with_words_beside_every_sign() -> None:
    report = diagnose("tiny")
    shown = report._repr_mimebundle_()
    for finding in report.findings:
        assert finding.name in shown["text/html"]
    assert "✓ ok" in shown["text/html"]
    assert str(report) == shown["text/plain"]
    assert report.ready is not bool(report.problems)


def test_commands_are_never_broken_over_lines(kit_doctor: Any) -> None:
    lines = kit_doctor("qwen3-0.6b-gsm8k").text.splitlines()
    (load,) = [line for line in lines if "load_dataset" in line]
    assert load.endswith("load_dataset('openai/gsm8k', 'main')\"")


def test_diagnose_takes_what_start_takes_and_refuses_the_same() -> None:
    assert diagnose(SessionConfig.preset("tiny")).name == "tiny"
    with pytest.raises(ConfigError, match="Did you mean 'tiny'"):
        diagnose("tinny")
