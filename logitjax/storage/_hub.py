"""Snapshots of Hugging Face repositories."""

from collections.abc import Sequence
from typing import Literal

from etils import epath

from logitjax.storage._require import require

# No `*.bin`: they hold the same weights, as pickles.
_FILES = [
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
]  # fmt: skip


def hub_snapshot(
    name: str, files: Sequence[str] = _FILES, *, kind: Literal["model", "dataset"] = "model"
) -> epath.Path:
    """The local directory of ``org/name`` or ``org/name@revision``, downloaded if necessary.

    Args:
        files: patterns of the files to download.

    Raises:
        ValueError: in one line: the name is invalid, or it is neither in the cache nor reachable.
        ImportError: the package is missing.
    """
    huggingface_hub = require("huggingface_hub", extra="models")
    errors = require("huggingface_hub.errors", extra="models")
    repository, _, revision = name.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, repo_type=kind, allow_patterns=list(files)
        )
    except errors.HFValidationError as error:
        raise ValueError(f"{kind} 'hf:{name}': not a repository's name ({error})") from None
    except errors.GatedRepoError:
        raise ValueError(
            f"{kind} 'hf:{name}': request access on its page, then run `hf auth login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise ValueError(f"{kind} 'hf:{name}': no such repository or revision") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{kind} 'hf:{name}': not in the local cache and the hub cannot be reached ({reason})"
        ) from error
    return epath.Path(folder)
