"""The backbone as a file to send, for sites that have no copy."""

import hashlib
from functools import cached_property

from safetensors.torch import save

from common.config.study import Study
from common.model import backbones
from common.protocol.backbone import PIECE, BackboneHeld, BackbonePart


class BackboneFile:
    """The weights that this machine loads for a study, as safetensors whatever its own file is."""

    def __init__(self, study: Study) -> None:
        self._study = study

    @cached_property
    def _data(self) -> bytes:
        model = self._study.model
        return save(backbones.get(model.backbone).read_weights(model.weights))

    @cached_property
    def _sha256(self) -> str:
        return hashlib.sha256(self._data).hexdigest()

    @property
    def size(self) -> int:
        """The size in bytes."""
        return len(self._data)

    def announce(self) -> BackbonePart:
        """Announce the backbone by an empty part; a site answers how many bytes it has already."""
        return self._part(0, 0)

    def cut_part(self, held: BackboneHeld) -> BackbonePart:
        """Cut the part that follows the bytes that a site has."""
        return self._part(held.bytes, held.bytes + PIECE)

    def _part(self, start: int, end: int) -> BackbonePart:
        return BackbonePart(
            study=self._study.id,
            sha256=self._sha256,
            size=self.size,
            offset=start,
            data=self._data[start:end],
        )
