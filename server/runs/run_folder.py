"""The run folder: the files that a run leaves behind, and needs to go on.

A round is finished once `last.safetensors`, which holds the model and the strategy's state, has
been renamed into place; whatever a crash left beyond it is dropped on resume.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from common.config.study import Study
from common.errors import RunError
from common.heads.read_out import ReadOut
from common.heads.sums import Sums
from common.metrics.counts import Floats
from common.protocol.tensors import Tensors
from common.support import files

_STATE, _BEST = "strategy-state/", "best/"
_META = "consilium"
_SUMS = ("counts", "totals", "second", "weights")
_LOCK = ".lock"
_LAST = "last.safetensors"


@dataclass(frozen=True, kw_only=True)
class Best:
    """The model that validates best of those since a solved head, beyond noise.

    Attributes:
      round: How many rounds it had; 0 is the solved head itself.
      score: The study's `select` metric on the validation patients of all sites that tell.
      noise: The standard error of that, by image.
      tensors: The model.
    """

    round: int
    score: float
    noise: float
    tensors: Tensors


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A finished round: the next one begins with it.

    Attributes:
      round: Its number; 0 before the first.
      tensors: The model after it.
      state: The state of the strategy.
      best: The model to release instead, where validation chooses one.
    """

    round: int
    tensors: Tensors
    state: Tensors
    best: Best | None = None

    @property
    def released(self) -> tuple[int, Tensors]:
        """The round and the model that are released if the study ends here."""
        chosen = self.best or self
        return chosen.round, chosen.tensors


class RunFolder:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path) -> Self:
        """Create a folder for a new run, of this user's alone; it must be new or empty.

        Raises:
          RunError: there is something in it, or it cannot be made.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            taken = any(path.iterdir())
            if not taken:
                path.chmod(0o700)
        except OSError as ex:
            raise RunError(path, expected="a folder to write", got=ex.strerror) from None
        if taken:
            remedy = f"Go on with --resume {path}, or choose another folder."
            expected, got = "a new or empty folder", "a run or other files"
            raise RunError(path, expected=expected, got=got, remedy=remedy)
        return cls(path)

    def write_study(self, study: Study) -> None:
        """Write the study, which makes the folder a run that can be resumed."""
        self.write("study.yaml", study.yaml())

    @classmethod
    def resume(cls, path: Path, study: Study | None = None) -> Self:
        """Open a run to go on with; raises `RunError` if there is none, or one of another study."""
        if not (path / "study.yaml").is_file():
            raise RunError(path, expected="a run folder", got="no study.yaml in it")
        folder = cls(path)
        if study is not None:
            folder._same(study)
        return folder

    def _same(self, study: Study) -> None:
        ours, theirs = self.study.model_dump(mode="json"), study.model_dump(mode="json")
        differ = [key for key in ours if ours[key] != theirs[key]]
        if differ:
            expected, got = "the study this run began with", f"another {', '.join(differ)}"
            remedy = "Resume without a study file, or start a new run."
            raise RunError(self.path, expected=expected, got=got, remedy=remedy)

    @property
    def study(self) -> Study:
        """The study as resolved when the run began."""
        return Study.read(self.path / "study.yaml")

    def read_last(self) -> Checkpoint | None:
        """Read the newest finished round, if there is any."""
        path = self.path / _LAST
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()[_META])
                loaded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as ex:
            raise RunError(path, expected="an intact checkpoint", got=ex) from None
        tensors = {k: v for k, v in loaded.items() if not k.startswith((_STATE, _BEST))}
        state, kept = (_strip(loaded, prefix) for prefix in (_STATE, _BEST))
        best = Best(**facts["best"], tensors=kept) if facts.get("best") else None
        return Checkpoint(round=facts["round"], tensors=tensors, state=state, best=best)

    def save_last(self, checkpoint: Checkpoint) -> None:
        """Save the checkpoint, which finishes its round."""
        facts: dict[str, Any] = {"round": checkpoint.round}
        kept = {f"{_STATE}{key}": tensor for key, tensor in checkpoint.state.items()}
        if best := checkpoint.best:
            facts["best"] = {"round": best.round, "score": best.score, "noise": best.noise}
            kept |= {f"{_BEST}{key}": tensor.clone() for key, tensor in best.tensors.items()}
        data = save({**checkpoint.tensors, **kept}, {_META: json.dumps(facts)})
        self.write(_LAST, data)
        # For people; the checkpoint itself holds the same.
        self.write("last.json", json.dumps(facts, indent=2), durable=False)

    def read_solved(self) -> dict[str, Any]:
        """Read how a head was solved, and from whose sums; nothing where no head was."""
        path = self.path / "solved.json"
        solved: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        return solved

    def read_solved_sites(self) -> set[str]:
        """Read whose sums are in the head that was solved; none where no head was."""
        return set(self.read_solved().get("sites", ()))

    def save_sums(self, sums: Sums) -> None:
        """Save the sums over all sites from which a head was solved."""
        numbers = {name: torch.from_numpy(getattr(sums, name)) for name in _SUMS}
        self.write("sums.safetensors", save(numbers))

    def read_sums(self) -> Sums:
        """Read them; raises `RunError` if there are none."""
        path = self.path / "sums.safetensors"
        try:
            found = load_file(path)
            return Sums(*(found[name].numpy() for name in _SUMS))
        except (SafetensorError, OSError, KeyError) as ex:
            raise RunError(path, expected="the sums of a solved head", got=ex) from None

    def keep_read_out(self, released: int, read_out: ReadOut) -> ReadOut:
        """How a model is read out: as was said before of the same one, or else as is said now."""
        path = self.path / "read_out.json"
        told = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if told.get("round") == released:
            return ReadOut(told["temperature"], tuple(told["log_prior"]))
        self.write(path.name, json.dumps({"round": released, **read_out.facts()}, indent=1))
        return read_out

    def keep_numbers(
        self, name: str, make: Callable[[], Mapping[str, Floats]]
    ) -> dict[str, Floats]:
        """Float64 arrays that must stay the same over a resume: those here, or else new ones."""
        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            numbers = {key: torch.from_numpy(array.copy()) for key, array in make().items()}
            self.write(path.name, save(numbers))
        return {key: tensor.numpy() for key, tensor in load_file(path).items()}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from running this run; the lock ends with the process."""
        lock = FileLock(self.path / _LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            expected, got = "no other process on this run", "one that runs it now"
            raise RunError(self.path, expected=expected, got=got) from None
        try:
            yield
        finally:
            lock.release()

    @property
    def busy(self) -> bool:
        """Whether a process is on this run."""
        return files.held(self.path / _LOCK)

    def append_history(self, lines: list[dict[str, Any]]) -> None:
        """Append a finished round's lines to `metrics.jsonl`; raises `RunError` on a full disk."""
        self._append("metrics.jsonl", lines)

    def read_history(self) -> list[dict[str, Any]]:
        """Read every line of `metrics.jsonl`."""
        return self._read_lines("metrics.jsonl")

    def append_journal(self, what: str, **facts: Any) -> None:
        """Append to `journal.jsonl` what happened just now, which no result depends on.

        Args:
          what: `joined`, `left out`, `round` or `finished`.
          facts: About it, as JSON.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._append("journal.jsonl", [{"time": now, "what": what, **facts}])

    def read_journal(self) -> list[dict[str, Any]]:
        """Read every line of `journal.jsonl`, those of rounds that were repeated as well."""
        return self._read_lines("journal.jsonl")

    def _append(self, name: str, lines: list[dict[str, Any]]) -> None:
        path = self.path / name
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as ex:
            raise _unwritable(path, ex) from None

    def _read_lines(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            return []
        lines: list[dict[str, Any]] = []
        for text in path.read_text(encoding="utf-8").splitlines():
            # A crash leaves half a line: the last of a history, any of a journal.
            with suppress(ValueError):
                lines.append(json.loads(text))
        return lines

    def forget_rounds_after(self, round_number: int) -> None:
        """Drop log lines of rounds that were not finished."""
        kept = [line for line in self.read_history() if line["round"] <= round_number]
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, name: str, content: bytes | str, *, durable: bool = True) -> None:
        """Replace one file of the run in one step; raises `RunError` if it cannot be written."""
        path = self.path / name
        try:
            files.write(path, content, durable=durable)
        except OSError as ex:
            raise _unwritable(path, ex) from None

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Write versions, weights, contract and sites to `run.yaml`."""
        self.write("run.yaml", yaml.safe_dump(dict(facts), sort_keys=False))

    def read_facts(self) -> dict[str, Any]:
        """Read the facts that `write_facts` wrote; there are none before the first join."""
        path = self.path / "run.yaml"
        facts: dict[str, Any] = yaml.safe_load(path.read_text("utf-8")) if path.exists() else {}
        return facts


def _strip(tensors: Tensors, prefix: str) -> Tensors:
    """Those under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _unwritable(path: Path, ex: OSError) -> RunError:
    remedy = "Free some space, then resume the run."
    return RunError(path, expected="a file to write", got=ex.strerror, remedy=remedy)
