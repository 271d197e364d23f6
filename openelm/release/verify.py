"""Check a published run as a stranger: how far its files, scores, batches and updates follow from what it declares."""

from __future__ import annotations

from pathlib import Path

import torch

from openelm.errors import CheckpointError, VerificationError
from openelm.release.findings import Findings, Note, Progress
from openelm.release.ground import (
    LOSS_TOLERANCE,
    WEIGHTS_TOLERANCE,
    Ground,
    Replacements,
    stand_on,
    with_base,
    with_data,
    with_held_out,
)
from openelm.release.integrity import check_integrity
from openelm.release.publication import Publication, Suite, read_publication
from openelm.release.replay import check_batches, check_tokenizer, replay_segments
from openelm.release.rescore import check_scores
from openelm.release.segments import all_segments, choose_segments

LEVELS = ("integrity", "scores", "batches", "segments replayed", "everything replayed")


def verify_run(
    folder: Path,
    *,
    level: int,
    segments: int,
    seed: int,
    data: Replacements = (),
    progress: Progress = lambda what, done, total: None,
) -> Findings:
    """Check a run up to a level; each level includes the ones below it.

    Args:
        level: index in `LEVELS`.
        segments: how many random segments level 3 replays besides the mandatory ones.
        seed: chooses them; drawn by the verifier, so that the publisher cannot know it.
        data: (beginning of a path in run.json or data.json, what it is here).

    Returns:
        What was checked and what not; `difference` is set if something did not agree, and then nothing after it
        was checked.

    Raises:
        CheckpointError: the folder holds no run.
        DataError: the verifier's copy of the data is missing or another.
    """
    if not (folder / "run.json").exists():
        raise CheckpointError("run.json is missing", file=folder, fix="give a run folder")
    findings = Findings(level=0, seed=seed)
    threads = torch.get_num_threads()
    try:
        _verify(folder, findings, level, segments, data, progress)
    except VerificationError as error:  # it is in the findings
        published, here = (findings.numerics.get(side, {}).get("code") for side in ("published", "here"))
        if findings.level > 0 and published != here:
            error.what += "; but the run was made with other code of openelm than this"
            error.fix = "verify it with the code that made it: run.json has its git_commit"
    finally:
        torch.set_num_threads(threads)
    for missing in range(findings.level + 1, len(LEVELS)):
        why = "the check ended before it" if findings.difference else "not asked for: give a higher --level"
        findings.not_checked.append(Note(missing, LEVELS[missing], why))
    return findings


def _verify(
    folder: Path, findings: Findings, level: int, segments: int, data: Replacements, progress: Progress
) -> None:
    found: list[Publication] = []
    findings.run("run.json and the chain of the ledger", lambda: _read(folder, found))
    publication = found[0]
    tokenizer = check_integrity(publication, findings)
    ground = stand_on(publication, tokenizer, data)
    _note_numerics(publication, ground, findings)
    if level >= 1:
        findings.level = 1
        ground = with_base(with_held_out(ground, publication), publication)
        if suites := sum(isinstance(line, Suite) for line in publication.valid):
            findings.skip(f"{suites} results of suites", "their questions were not answered again")
        check_scores(publication, ground, findings)
    if level >= 2:
        findings.level = 2
        ground = with_data(ground, publication)
        findings.run("batches", lambda: check_batches(publication, ground, progress))
    if level >= 3:
        findings.level = level
        chosen = all_segments(publication)
        if level == 3:
            chosen = choose_segments(publication, ground, segments, findings.seed)
            if left := len(all_segments(publication)) - len(chosen):
                findings.skip(f"{left} of {left + len(chosen)} segments", "not drawn: a forged one could be among them")
        replay_segments(publication, ground, chosen, findings, progress)
    if level >= 4:
        if publication.config.tokenizer.path is None and publication.config.tune is None:
            findings.run("tokenizer", lambda: check_tokenizer(publication, ground))
        else:
            findings.skip("origin of the tokenizer", "it was given to the run, not trained by it")


def _read(folder: Path, found: list[Publication]) -> str:
    found.append(read_publication(folder))
    head = found[0].hashes[-1] if found[0].hashes else "of nothing"
    return f"every line is chained to the one before it; SHA-256 of the last one: {head}"


def _note_numerics(publication: Publication, ground: Ground, findings: Findings) -> None:
    findings.numerics.update(
        published=dict(publication.starts[-1].environment),
        here=ground.here,
        differences=[],
        tolerances={"loss_and_gradient_norm": LOSS_TOLERANCE, "weights": WEIGHTS_TOLERANCE},
    )
