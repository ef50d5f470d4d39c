"""Fine-tuning without a cache, as a Flower tutorial writes it: what `bench` compares with.

No straw man: images are decoded once and stay in memory, convolutions run with channels last, and
layers that do not train record nothing for a backward pass.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from client.data.records import Record
from common.config.study import Study
from common.flower.messages import recorddict_from_proto, recorddict_to_proto
from common.model import backbones
from common.model.split import train_mode
from common.protocol.fields import ARRAYS
from common.protocol.round import make_strategy_record
from common.protocol.tensors import count_bytes, to_arrays


class Tutorial:
    """One client of a study, which runs the whole model in every epoch.

    With `unfreeze: all` everything trains, batch norm in train mode, and the whole state_dict
    travels; otherwise only what `unfreeze` names trains and travels.
    """

    def __init__(self, study: Study, device: torch.device) -> None:
        backbone, wanted = backbones.get(study.model.backbone), study.model
        classes, weights = len(study.classes), wanted.weights
        model = backbone.build(classes=classes, dropout=0.0, weights=weights, seed=study.seed)
        trained = backbone.trainable(model, wanted.unfreeze)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._whole = wanted.unfreeze == "all"
        self._travels = tuple(model.state_dict()) if self._whole else trained
        self._preprocess = backbone.preprocess(weights).with_size(study.images.size)
        self._plan, self._device = study.train, device

    def load_images(self, records: Sequence[Record]) -> TensorDataset:
        """Images as uint8 pixels [n, 3, crop, crop] with their labels, decoded on all cores."""

        def pixels(record: Record) -> Tensor:
            return record.image.square(self._preprocess)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            images = torch.stack(list(pool.map(pixels, records)))
        return TensorDataset(images, torch.tensor([record.label for record in records]))

    def train_epoch(self, images: TensorDataset) -> None:
        """Train on every image once, from a fresh optimizer."""
        plan = self._plan
        self.model.train() if self._whole else train_mode(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=plan.lr, momentum=plan.momentum)
        for pixels, labels in DataLoader(images, batch_size=plan.batch_size, shuffle=True):
            inputs = self._preprocess.normalise(pixels.to(self._device))
            logits = self.model(inputs.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels.to(self._device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def exchange_model(self) -> int:
        """Send the model through one Flower message and load what arrives; returns its bytes."""
        state = self.model.state_dict()
        arrays = to_arrays({name: state[name] for name in self._travels})
        message = recorddict_to_proto(make_strategy_record(arrays, weight=1.0))
        arrived = recorddict_from_proto(message).array_records[ARRAYS]
        self.model.load_state_dict(arrived.to_torch_state_dict(), strict=False)
        return count_bytes(arrays)
