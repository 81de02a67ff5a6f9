"""Model cards that describe how a model was made, and uploads to the Hugging Face hub."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

import logitjax
from logitjax import storage

PUSH = "Private repository of the hub, as org/name, to upload the model and its card to."
_ORIGINS = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def model_card(
    *, title: str, made_from: Sequence[str], tags: Sequence[str], report: str,
    settings: Mapping[str, Any],
) -> str:  # fmt: skip
    """The README.md of a model: its sources, settings and scores.

    `made_from` are models as flags name them, `report` is Markdown without its heading.
    """
    bases = [_ORIGINS.get(spec, spec.removeprefix("hf:")) for spec in made_from]
    # Local paths are not base models for anyone else.
    items = [base for spec, base in zip(made_from, bases) if spec in _ORIGINS or spec[:3] == "hf:"]
    head = [f"base_model: {json.dumps(items)}"] if items else []
    head += ["library_name: transformers", f"tags: {json.dumps(['logitjax', *tags])}"]
    options = "".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items())
    return (
        "---\n" + "\n".join(head) + f"\n---\n\n# {title}\n\n"
        f"Made from {', '.join(f'`{base}`' for base in bases)} by logitjax {logitjax.__version__} "
        f"(jax {jax.__version__}). The license of these models applies.\n\n{report.strip()}\n\n"
        f"## Settings\n\n```yaml\n{options}```\n"
    )


def push(folder: epath.Path, repository: str) -> None:
    """Upload a model's folder as one commit; only process 0 does."""
    if jax.process_index() != 0:
        return
    api = storage.require("huggingface_hub", extra="models").HfApi()
    storage.progress.mark(f"uploading to {repository}", log=True)
    api.create_repo(repository, private=True, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repository, folder_path=str(folder), commit_message="Model and card"
    )
    logging.info("uploaded: %s", commit)
