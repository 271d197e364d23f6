"""A receiver that speaks the hub's protocol gets exactly a model's files, or a message says why not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from openelm.cli import main
from openelm.convert.convert import Options, open_source, write
from openelm.convert.push import publication
from openelm.errors import CheckpointError
from openelm.files.published import verify_folder
from openelm.model.folder import load_model

from .conftest import Publish
from .hub import TOKEN, Hub, Refusal

constants = pytest.importorskip("huggingface_hub.constants")
pytestmark = pytest.mark.filterwarnings("default")  # it uses what its own HTTP client calls old


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on the loopback, which this process takes for the only one, with a token that it accepts."""
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.shutdown()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def received(hub: Hub, repo: str = "me/model", branch: str = "main") -> dict[str, bytes]:
    files = dict(hub.repositories[repo].branches[branch])
    assert files.pop(".gitattributes") == b"* -text\n"
    return files


def sharded(folder: Path, out: Path) -> Path:
    with open_source(folder) as source:
        write(source, out, Options(to="hf", shard_bytes=20_000, self_contained=True))
    return out


def failed(folder: Path, repo: str, code: int, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Push in vain; returns what was said, of which none is the token."""
    capsys.readouterr()
    assert main(["push", str(folder), repo, *options]) == code
    shown = capsys.readouterr()
    assert TOKEN not in shown.out + shown.err
    return shown.err


def test_the_command_sends_every_file_byte_for_byte_and_nothing_else(
    hub: Hub, publish: Publish, tmp_path: Path
) -> None:
    folder = publish()
    (folder / ".env").write_text("SECRET=1")
    (folder / "notes.txt").write_text("not for others")
    command = [sys.executable, "-m", "openelm", "push", str(folder), "me/model", "--private", "--message", "First"]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    sent = {name: data for name, data in contents(folder).items() if name not in (".env", "notes.txt")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "manifest.json"} <= sent.keys()
    assert received(hub) == sent
    assert hub.repositories["me/model"].private and hub.repositories["me/model"].commits == ["First"]
    assert f"{sum(map(len, sent.values())):,}" in done.stdout and f"{hub.url}/me/model, commit " in done.stdout
    assert "left out: .env, notes.txt" in done.stdout
    assert TOKEN not in done.stdout + done.stderr


def test_what_arrived_is_the_same_model(hub: Hub, publish: Publish, tmp_path: Path) -> None:
    folder = sharded(publish(), tmp_path / "sharded")
    assert main(["push", str(folder), "me/model"]) == 0
    sent, held = received(hub), contents(folder)
    assert sent | {"manifest.json": b""} == held | {"manifest.json": b""}
    again = tmp_path / "downloaded"
    again.mkdir()
    for name, data in sent.items():
        (again / name).write_bytes(data)
    (again / "README.md").write_text("edited on the hub")
    verify_folder(again, names=held.keys() - {"README.md", "manifest.json"})
    expected = load_model(folder).state_dict()
    assert all((tensor == expected[name]).all() for name, tensor in load_model(again).state_dict().items())


def test_a_second_model_takes_the_place_of_the_first_and_other_files_stay(
    hub: Hub, publish: Publish, tmp_path: Path
) -> None:
    """An index of the first would make readers load its shards."""
    single = publish()
    assert main(["push", str(sharded(single, tmp_path / "sharded")), "me/model"]) == 0
    hub.repositories["me/model"].branches["main"] |= {"LICENSE": b"mine", "gguf/model.safetensors": b"elsewhere"}
    assert main(["push", str(single), "me/model"]) == 0
    others = {"LICENSE": b"mine", "gguf/model.safetensors": b"elsewhere"}
    card = {"README.md": (tmp_path / "sharded" / "README.md").read_bytes()}
    assert received(hub) == others | card | contents(single)


def test_weights_that_are_there_are_not_sent_again(hub: Hub, publish: Publish) -> None:
    folder = publish()
    for _ in range(2):
        assert main(["push", str(folder), "me/model"]) == 0
    assert hub.uploads == 1


def test_a_branch_is_made_and_the_main_one_is_left_alone(hub: Hub, publish: Publish) -> None:
    first, second = publish(name="first"), publish(name="second", seed=1)
    assert main(["push", str(first), "me/model"]) == 0
    for _ in range(2):
        assert main(["push", str(second), "me/model", "--revision", "steps/200"]) == 0
    assert received(hub) == contents(first)
    assert received(hub, branch="steps/200") == contents(second)


def test_a_card_of_ones_own_takes_the_place_of_the_other(hub: Hub, publish: Publish, tmp_path: Path) -> None:
    folder, card = sharded(publish(), tmp_path / "sharded"), tmp_path / "card.md"
    card.write_text("# Mine\n")
    assert main(["push", str(folder), "me/model", "--card", str(card)]) == 0
    changed = {"README.md": b"# Mine\n", "manifest.json": received(hub)["manifest.json"]}
    assert received(hub) == contents(folder) | changed


def test_a_folder_of_others_gives_the_files_of_a_model(publish: Publish) -> None:
    folder = publish()
    expected = contents(folder)
    del expected["manifest.json"]
    (folder / "manifest.json").unlink()
    (folder / "optimizer.pt").write_bytes(b"")
    found = publication(folder)
    assert found.files.keys() == expected.keys() and found.left_out == ("optimizer.pt",) and not found.vouched


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "README.md"])
def test_damage_is_not_published(
    hub: Hub, publish: Publish, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sharded(publish(), tmp_path / "m") if name == "README.md" else publish()
    data = bytearray((folder / name).read_bytes())
    data[-5] ^= 1
    (folder / name).write_bytes(data)
    said = failed(folder, "me/model", 4, capsys)
    assert name in said and ("--card" in said) == (name == "README.md")
    assert hub.repositories == {}


def test_other_layouts_are_refused_with_what_to_do(
    hub: Hub, publish: Publish, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx")
    with open_source(publish()) as source:
        for to in ("corenet", "onnx"):
            write(source, tmp_path / to, Options(to=to))
    for folder in (tmp_path / "corenet", tmp_path / "onnx", tmp_path / "nothing"):
        assert "not a Hugging Face folder" in (said := failed(folder, "me/model", 4, capsys)) and "--to hf" in said
    assert hub.repositories == {}


def test_a_link_is_not_followed_to_a_file_that_nobody_should_see(publish: Publish, tmp_path: Path) -> None:
    folder = publish()
    (folder / "manifest.json").unlink()
    (tmp_path / "key").write_text("private")
    (folder / "LICENSE").symlink_to(tmp_path / "key")
    with pytest.raises(CheckpointError, match="a link"):
        publication(folder)


@pytest.mark.parametrize("repo", ["model", "me/", "/model", "a/b/c", "me/mo del", "me/model.git", "me/-model", "me/.."])
def test_a_name_is_checked_before_anything_else(repo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "OWNER/NAME" in failed(Path("nowhere"), repo, 2, capsys)


def test_a_private_model_is_not_put_where_everybody_sees_it(
    hub: Hub, publish: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = publish()
    assert main(["push", str(folder), "me/model"]) == 0
    before = received(hub)
    assert "everybody can see" in failed(publish(name="other", seed=1), "me/model", 2, capsys, "--private")
    assert received(hub) == before


def test_no_token_and_wrong_ones_and_foreign_names_are_explained(
    hub: Hub, publish: Publish, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = publish()
    assert "you may not create a model under you" in failed(folder, "you/model", 2, capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    said = failed(folder, "me/model", 2, capsys)
    assert "401" in said and "write access" in said and "hf_wrong" not in said, "the server repeats it"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "hf auth login" in failed(folder, "me/model", 2, capsys)
    assert hub.repositories == {}


def test_a_bad_card_is_refused_before_weights_are_sent(
    hub: Hub, publish: Publish, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "card.md"
    card.write_text("---\nnot: [closed\n---\n")
    said = failed(publish(), "me/model", 2, capsys, "--card", str(card))
    assert "README.md" in said and "never closed" in said
    assert hub.uploads == 0
    assert "no card" in failed(publish(name="other"), "me/model", 2, capsys, "--card", str(tmp_path / "none.md"))


@pytest.mark.parametrize("failing", ["/api/repos/create", "/preupload/", "/store/", "/commit/"])
def test_a_hub_that_breaks_leaves_the_old_files_and_the_same_command_goes_on(
    hub: Hub, publish: Publish, failing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = publish(), publish(name="other", seed=1)
    assert main(["push", str(folder), "me/model"]) == 0
    hub.failing = failing
    assert "out of order" in (said := failed(other, "me/model", 75, capsys)) and "same command" in said
    assert received(hub) == contents(folder)
    hub.failing = ""
    assert main(["push", str(other), "me/model"]) == 0
    assert received(hub) == contents(other)


def test_without_a_network_it_says_so(
    hub: Hub, publish: Publish, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{reserved.getsockname()[1]}")
        assert "E_NETWORK" in failed(publish(), "me/model", 75, capsys)


def test_the_receiver_of_these_tests_refuses_other_bytes_than_were_announced(hub: Hub) -> None:
    with pytest.raises(Refusal):
        hub.store("0" * 64, b"")
