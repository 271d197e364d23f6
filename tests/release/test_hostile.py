"""Hostile publications: whatever they contain is data, and the verifier's machine is not theirs to use."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from openelm.errors import DataError
from openelm.files.published import write_manifest

from .conftest import read_lines, rechain
from .test_forgeries import assert_caught


@pytest.mark.parametrize("setting", ["held_out", "data.sources"])
def test_an_address_that_a_publication_names_is_not_asked(workshop: Any, forged: Path, setting: str) -> None:
    description = json.loads((forged / "run.json").read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/text.jsonl"
        table = description["config"]
        for name in setting.split("."):
            table = table[name]
        table[0]["paths"] = [address]
        (forged / "run.json").write_text(json.dumps(description))
        rechain(forged)
        with pytest.raises(DataError, match="--data OLD=NEW") as caught:
            workshop.verify(forged, 2)
        assert caught.value.file == address
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("name", ["eval", "result.json", "tensorboard", "model", "tokenizer", "checkpoints"])
def test_a_link_anywhere_in_the_folder_is_refused(workshop: Any, forged: Path, name: str) -> None:
    if (forged / name).exists():
        (forged / name).rename(forged.parent / "elsewhere")
    (forged / name).symlink_to(forged.parent / "elsewhere")
    assert_caught(workshop, forged, 0, "link", name)


BROKEN: list[tuple[str, Any]] = [
    ("step", -1), ("step", "5"), ("step", 10**30), ("step", None), ("event", 3), ("event", "unheard-of"),
    ("loss", 1.5), ("loss", "0x"), ("loss", [1]), ("batch_sha256", "short"), ("tokens", 1e300), ("to", -3),
    ("folder", "../../elsewhere"), ("environment", []), ("environment", {"threads": "9" * 5000}),
    ("manifest_sha256", None), ("parameters", True), ("processes", 0),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BROKEN)
def test_a_hostile_line_is_a_failed_verification_and_never_a_crash(
    workshop: Any, rewound: Path, tmp_path: Path, field: str, value: Any
) -> None:
    run = Path(shutil.copytree(rewound, tmp_path / "run"))
    events = read_lines(run)
    index = next(index for index in (0, *range(3, len(events))) if field in events[index])
    lines = (run / "ledger.jsonl").read_text().splitlines()
    head, broken = "0" * 64, []
    for number_of_line, line in enumerate(lines):
        content = {**json.loads(line), "prev": head} | ({field: value} if number_of_line == index else {})
        broken.append(json.dumps(content))
        head = hashlib.sha256(broken[-1].encode()).hexdigest()
    (run / "ledger.jsonl").write_text("\n".join(broken) + "\n")
    assert workshop.verify(run, 0).verdict == "failed"


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"NaN"])
@pytest.mark.parametrize(
    "name", ["run.json", "data.json", "held-out.json", "result.json", "checkpoints/step-00000006/state.json"]
)
def test_a_hostile_file_is_a_failed_verification_and_never_a_crash(
    workshop: Any, forged: Path, name: str, content: bytes
) -> None:
    (forged / name).write_bytes(content)
    if "checkpoints" in name:
        write_manifest((forged / name).parent)
    assert workshop.verify(forged, 0).verdict == "failed"
