"""Level 1: measure the published weights again on the held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openelm.errors import VerificationError
from openelm.model.folder import load_model
from openelm.model.transformer import OpenELM
from openelm.release.findings import OTHER_NUMERICS, Findings
from openelm.release.ground import LOSS_TOLERANCE, Ground, compare_numbers, use_threads
from openelm.release.probes import final_score, held_out_probe
from openelm.release.publication import Evaluation, Publication, Start, read_json
from openelm.train.checkpoint import load_checkpoint
from openelm.train.start import model_of_checkpoint


def check_scores(publication: Publication, ground: Ground, findings: Findings) -> None:
    """Compare every score whose weights are published.

    Raises:
        VerificationError: one is another number, or none.
    """
    for file in sorted((publication.folder / "eval").glob("*")):
        if file.name != "final.json":
            findings.skip(f"eval/{file.name}", "not known here")
    claimed = [line for line in publication.valid if isinstance(line, Evaluation)]
    final = _claims(publication)
    if ground.run.held_out is None:
        if claimed or final:
            findings.run("scores", lambda: _no_text(publication))
        findings.skip("held-out score", "the run names no held-out text")
        return
    if claimed:
        findings.run("scores in the ledger", lambda: _ledger_scores(publication, ground, claimed, findings))
    else:
        findings.skip("scores in the ledger", "there are none")
    if final:
        findings.run("score of the published model", lambda: _final(publication, ground, final, findings))
        findings.skip("baselines", "they were not fitted again")
    else:
        findings.skip("score of the published model", "none is published")


def _no_text(publication: Publication) -> str:
    raise VerificationError("scores without held-out text to repeat them on", file=publication.folder / "run.json")


def _claims(publication: Publication) -> dict[str, tuple[Path, Mapping[str, Any]]]:
    """Collect what `eval/final.json` and `result.json` say about the held-out score."""
    places = (("eval/final.json", "bits_per_byte"), ("result.json", "held_out_bits_per_byte"))
    found = {}
    for name, key in places:
        path = publication.folder / name
        if path.exists():
            value = read_json(path)
            if not isinstance(value, dict) or not isinstance(value.get(key), dict):
                raise VerificationError(f"{key} is not a score", file=path)
            found[name] = (path, value[key])
    return found


def _ledger_scores(publication: Publication, ground: Ground, claimed: list[Evaluation], findings: Findings) -> str:
    known = [line for line in claimed if line.step in publication.checkpoints]
    if missing := len(claimed) - len(known):
        findings.skip(f"{missing} of {len(claimed)} scores in the ledger", "no checkpoint of their steps is there")
    changed = [line for line in known if not publication.same_settings(line.step)]
    if changed:
        findings.skip(f"{len(changed)} of {len(claimed)} scores in the ledger", "they were made with other settings")
    known = [line for line in known if line not in changed]
    for line in known:
        weights = load_checkpoint(publication.folder, line.step).weights
        model = model_of_checkpoint(ground.run.config, ground.run.model_config, weights)
        compare_score(publication, ground, line, model.to(ground.run.device), findings)
    return f"{len(known)} of {len(claimed)}, the last of step {claimed[-1].step}, measured again"


def compare_score(
    publication: Publication, ground: Ground, line: Evaluation, model: OpenELM, findings: Findings
) -> None:
    """Measure a step's weights on the held-out text and compare with an `evaluation` line.

    Raises:
        VerificationError: the score is another.
    """
    tolerant = is_tolerant(ground, publication.start_of[line.step], findings)
    use_threads(publication.start_of[line.step])
    found = held_out_probe(ground.run).measure(model, line.step)
    what = f"step {line.step}: bits_per_byte"
    compare_numbers(what, line.bits_per_byte, found["bits_per_byte"], tolerant, publication.ledger)
    if line.documents != found["documents"]:
        raise VerificationError(f"step {line.step}: documents is {found['documents']}", file=publication.ledger)


def is_tolerant(ground: Ground, start: Start, findings: Findings) -> bool:
    """Tell whether numbers are compared with tolerances, and note it if so."""
    reasons = ground.differences(start)
    if reasons:
        findings.weaken(OTHER_NUMERICS)
        known = findings.numerics.setdefault("differences", [])
        known += [reason for reason in reasons if reason not in known]
    return bool(reasons)


def _final(
    publication: Publication,
    ground: Ground,
    claims: Mapping[str, tuple[Path, Mapping[str, Any]]],
    findings: Findings,
) -> str:
    if not (publication.folder / "model").exists():
        raise VerificationError("a score without a published model", file=publication.folder / "model")
    assert ground.run.held_out is not None
    tolerant = is_tolerant(ground, publication.starts[-1], findings)
    use_threads(publication.starts[-1])
    score = final_score(load_model(publication.folder / "model"), ground.run.tokenizer, ground.run.held_out)
    found = score.to_json()
    for name, (path, claim) in claims.items():
        if "value" not in claim:
            raise VerificationError("the score has no value", file=path)
        _compare(name, claim, {key: found.get(key) for key in claim}, path, tolerant)
    return f"{score.value:.4f} bits per byte on {score.documents} documents, as in {' and '.join(claims)}"


def _compare(what: str, claimed: Any, found: Any, path: Path, tolerant: bool) -> None:
    """Compare plain data; names of documents may differ, for they are paths of another machine."""
    if isinstance(claimed, dict) and isinstance(found, dict):
        for key in claimed.keys() - {"name"}:
            _compare(f"{what}: {key}", claimed[key], found.get(key), path, tolerant)
    elif isinstance(claimed, list | tuple) and isinstance(found, list | tuple) and len(claimed) == len(found):
        for index, (theirs, mine) in enumerate(zip(claimed, found, strict=True)):
            _compare(f"{what}: {index}", theirs, mine, path, tolerant)
    elif isinstance(claimed, float) and isinstance(found, float) and tolerant:
        if not abs(claimed - found) <= LOSS_TOLERANCE * abs(found):
            raise VerificationError(f"{what} is {found!r}, recorded is {claimed!r}", file=path)
    elif type(claimed) is not type(found) or claimed != found:
        raise VerificationError(f"{what} is {found!r}, recorded is {claimed!r}", file=path)
