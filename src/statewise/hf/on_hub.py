"""With huggingface_hub: models with save_pretrained, from_pretrained and push_to_hub of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download

from ..models import LanguageModel, TokenModel
from ..models.from_transformers import SINGLE
from .directory import build, load, save_pretrained


class HubModel(TokenModel, PyTorchModelHubMixin, library_name="statewise"):  # type: ignore[misc]
    """The TokenModel of a description, with the methods of PyTorchModelHubMixin.

    `save_pretrained(folder)` writes, beside a model card, what `statewise.hf.save_pretrained` writes;
    `from_pretrained(folder or name)` reads that, and a name is fetched only where there is no such folder.
    Raises what those functions raise.
    """

    def __init__(self, description: LanguageModel, vocab: int):
        built = build(description, vocab)
        super().__init__(built.body, built.head)
        self.description = description

    def _save_pretrained(self, save_directory: Path) -> None:
        save_pretrained(self, self.description, save_directory)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, revision: str | None, cache_dir: str | Path | None, force_download: bool,
        local_files_only: bool, token: str | bool | None, **_: Any,
    ) -> HubModel:  # fmt: skip
        folder = model_id
        if not os.path.isdir(model_id):
            for name in ("config.json", SINGLE):
                folder = os.path.dirname(
                    hf_hub_download(
                        model_id, name, revision=revision, cache_dir=cache_dir, force_download=force_download,
                        token=token, local_files_only=local_files_only,
                    )
                )  # fmt: skip
        model, description = load(folder)
        found = cls(description, model.vocab or 0)
        found.body, found.head = model.body, model.head
        return found.eval()
