"""What a run has consumed, as its checkpoints and its log lines say: the ledger, and counts by source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from hfpretrain.data.batches import StepData
from hfpretrain.data.ledger import Ledger
from hfpretrain.engines import distributed

LEDGER = "ledger.npy"


class Consumption:
    """What all processes have consumed since the start of the run, up to the last `gather`."""

    def __init__(self, num_sources: int):
        self.ledger = Ledger()
        self.documents_dropped = 0
        self._tokens, self._documents = np.zeros((2, num_sources), dtype=np.int64)
        self._ours: list[list[int]] = []  # of this process, since the last `gather`

    def add(self, data: StepData) -> None:
        """This process's share of a step that is done."""
        signed = data.checksum - 2**64 if data.checksum >= 2**63 else data.checksum
        self._ours.append([signed, data.documents_dropped, *data.tokens.tolist(), *data.documents.tolist()])

    def gather(self, accelerator: Accelerator) -> None:
        """Add up the shares of all processes. All ranks must call it."""
        if not self._ours:
            return
        rows = torch.tensor(self._ours, dtype=torch.int64, device=accelerator.device)
        for checksum, dropped, *counts in distributed.total(accelerator, rows).tolist():
            self.ledger.append(checksum % 2**64)
            tokens, documents = np.split(np.array(counts), 2)
            self._tokens += tokens
            self._documents += documents
            self.documents_dropped += dropped
        self._ours = []

    def by_source(self) -> dict[str, list[int]]:
        """Tokens and documents of each source."""
        return {"source_tokens": self._tokens.tolist(), "source_documents": self._documents.tolist()}

    def state(self) -> dict[str, Any]:
        """What `train_state.json` has of it; the ledger's checksums stand in a file of their own."""
        return {"ledger": self.ledger.digest, **self.by_source(), "documents_dropped": self.documents_dropped}

    def take(self, stored: dict[str, Any], path: Path) -> str:
        """Be what the checkpoint at `path` says, taking `state` out of `stored`; returns the digest its ledger must
        have. Raises `KeyError` for what is missing."""
        self._ours = []
        self._tokens = np.array(stored.pop("source_tokens"))
        self._documents = np.array(stored.pop("source_documents"))
        self.documents_dropped = stored.pop("documents_dropped")
        self.ledger = Ledger(np.load(path / LEDGER))
        return str(stored.pop("ledger"))
