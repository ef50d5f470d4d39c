"""The precision a device computes in: measured once, remembered, and fixed for a study.

Half precision is many times as fast where the hardware has units for it, and slower where it does
not, or where layers are limited by memory. So it is measured, on the study's own network.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch
from filelock import FileLock
from torch import nn

from client.disk import usable
from client.prefix import BATCH, Prefix, seconds
from common import files
from common.contract import Dtype
from common.cut import Split, train_mode
from common.errors import SiteError
from common.images import Preprocess
from common.yaml import Section

log = logging.getLogger(__name__)

Asked = Literal["auto", "float32", "bfloat16"]
"""What a site may ask for; `auto` is what the measurement says."""

# Half precision must be clearly faster: what differs between two measurements is no reason.
_CLEARLY = 1.3
_SIDE = 256


class Precision(Section):
    """The types that a site's frozen prefix and its trained suffix compute in.

    Trained parameters are float32 in any case; `bfloat16` is torch's automatic mixed precision.
    """

    prefix: Dtype = "float32"
    suffix: Dtype = "float32"


def settle(
    asked: Asked,
    study: str,
    split: Split,
    preprocess: Preprocess,
    device: torch.device,
    memory: Path,
) -> Precision:
    """The precision of a study at this site: the one it began with, or else the one to begin with.

    Args:
      asked: By the site; other than `auto`, it rules, and nothing is measured.
      study: Its id.
      split: Its network, on `device`.
      preprocess: To the network's input.
      device: That it runs on.
      memory: File that keeps what was chosen for each study and measured for each network.
    """
    with _alone(memory):
        known, network = _load(memory), _key(split, preprocess, device)
        found = dict(known)
        if asked != "auto":
            frozen = not isinstance(split.prefix, nn.Identity)  # else it only normalises pixels
            found[study] = Precision(prefix=asked if frozen else "float32", suffix=asked)
        elif study not in found:
            found[study] = known.get(network) or measure(split, preprocess, device)
            found[network] = found[study]
        if study in known and found[study] != known[study]:
            log.warning("the study goes on in another precision than it began with: %s", asked)
        if found != known:
            text = json.dumps({key: value.model_dump() for key, value in found.items()}, indent=1)
            files.write(memory, text, mode=0o600, durable=False)
        return found[study]


@contextmanager
def _alone(memory: Path) -> Iterator[None]:
    """One process at a time: two that measured at once could choose otherwise."""
    with usable(memory, SiteError):
        memory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(memory.with_name(f".{memory.name}.lock"), mode=0o600):
            yield


def measure(split: Split, preprocess: Preprocess, device: torch.device) -> Precision:
    """The faster precision for either part, on batches of a usual size; a few seconds."""
    if not _has_units(device):
        return Precision()
    chosen = Precision(
        prefix=_faster(lambda dtype: _forward(split, preprocess, device, dtype), device),
        suffix=_faster(lambda dtype: _step(split, preprocess, device, dtype), device),
    )
    log.info("measured: prefix in %s, suffix in %s", chosen.prefix, chosen.suffix)
    return chosen


def _has_units(device: torch.device) -> bool:
    """Whether plain products are clearly faster in half precision: without, nothing else is."""
    if device.type != "cpu":  # on mps too little of it is implemented
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    one = torch.ones(_SIDE, _SIDE)
    half = one.bfloat16()
    return seconds(lambda: one @ one, device) > _CLEARLY * seconds(lambda: half @ half, device)


def _faster(make: Callable[[Dtype], Callable[[], object]], device: torch.device) -> Dtype:
    full, half = (seconds(make(dtype), device) for dtype in get_args(Dtype))
    return "bfloat16" if full > _CLEARLY * half else "float32"


def _forward(
    split: Split, preprocess: Preprocess, device: torch.device, dtype: Dtype
) -> Callable[[], object]:
    """A batch through the frozen prefix."""
    prefix, pixels = Prefix(split.prefix, preprocess, dtype), _pixels(preprocess, device)
    return lambda: prefix(pixels)


def _step(
    split: Split, preprocess: Preprocess, device: torch.device, dtype: Dtype
) -> Callable[[], object]:
    """A batch forward and backward through a copy of the trained suffix."""
    suffix = copy.deepcopy(split.suffix)
    inputs = Prefix(split.prefix, preprocess, "float32")(_pixels(preprocess, device))
    train_mode(suffix)

    def step() -> None:
        with autocast(dtype, device):
            logits = suffix(inputs)
        logits.float().square().mean().backward()

    return step


def autocast(dtype: Dtype, device: torch.device) -> torch.autocast:
    """Automatic mixed precision where `dtype` is not float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype != "float32")


def _pixels(preprocess: Preprocess, device: torch.device) -> torch.Tensor:
    side = preprocess.crop
    return torch.zeros(BATCH, 3, side, side, dtype=torch.uint8, device=device)


def _load(memory: Path) -> dict[str, Precision]:
    """What was remembered; nothing if there is no file, or a damaged one."""
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
        return {key: Precision.model_validate(value) for key, value in content.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _key(split: Split, preprocess: Preprocess, device: torch.device) -> str:
    """The machine and the network, as far as they decide its speed."""
    cpu = torch.backends.cpu.get_cpu_capability()
    unit = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    network = hashlib.sha256(f"{split} {preprocess.crop}".encode()).hexdigest()[:8]
    return f"{unit}, torch {torch.__version__}, network {network}"
