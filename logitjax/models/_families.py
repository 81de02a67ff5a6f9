"""The known families: those of the library, of entry points, and registered ones."""

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from logitjax.models._family import Family
from logitjax.models.families.gemma import GEMMA
from logitjax.models.families.gemma2 import GEMMA2
from logitjax.models.families.gemma3 import GEMMA3
from logitjax.models.families.glm4 import GLM, GLM4
from logitjax.models.families.gpt2 import GPT2
from logitjax.models.families.granite import GRANITE
from logitjax.models.families.llama import LLAMA
from logitjax.models.families.mistral import MISTRAL
from logitjax.models.families.mixtral import MIXTRAL
from logitjax.models.families.olmo2 import OLMO2
from logitjax.models.families.olmo3 import OLMO3
from logitjax.models.families.phi3 import PHI3
from logitjax.models.families.qwen2 import QWEN2
from logitjax.models.families.qwen3 import QWEN3
from logitjax.models.families.qwen3_moe import QWEN3_MOE
from logitjax.models.families.smollm3 import SMOLLM3
from logitjax.registry import Registry
from logitjax.storage import guard

_VALUES = (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA, GEMMA2, GEMMA3, OLMO2, OLMO3, SMOLLM3)
_OWN = {f.name: f for f in (*_VALUES, GRANITE, GLM4, GLM, MIXTRAL, QWEN3_MOE, GPT2)}
_MEMBERS = dict(_OWN)
_REGISTRY = Registry(kind="family", group="logitjax.families", members=_MEMBERS, base=Family)


def register_family(family: Family | str) -> Family:
    """Make a family of decoders known to this process's readers and writers; returns its value.

    A configuration names its family, and so does a `config.json`: loading, exporting, adapters and
    reloading find the value by that name.

    Args:
        family: The value, or the text of `--family`: `package.module:NAME`, the name of an entry
            point of the group `logitjax.families` (which are also found without this call), or
            `llama(name=other)`, which reads models named `other` as Llama.

    Raises:
        ValueError: Its name, wrapper or GGUF architecture belongs to another family; a registered
            value under the same name is replaced.

    >>> register_family("llama").architecture
    'LlamaForCausalLM'
    """
    if isinstance(family, Family):
        value = family
    else:
        value: Family = _REGISTRY.parse(family)
        if (origin := _MEMBERS.get(family.partition("(")[0])) and origin.name != value.name:
            # Its files use their own names.
            value = dataclasses.replace(value, wrapper="", gguf=value.name, pre_tokenizers={})
    for other in _MEMBERS.values():
        same = other.name == value.name
        if same and value.name in _OWN and other != value:
            raise ValueError(f"family {value.name}: expected a name that is not taken")
        for field in ("wrapper", "gguf"):
            name = getattr(value, field)
            if not same and name and name == getattr(other, field):
                raise ValueError(
                    f"family {value.name}: {field}: expected a unique name or none, got "
                    f"{name!r}, which is of {other.name}"
                )
    _MEMBERS[value.name] = value
    return value


def all_families() -> Iterator[Family]:
    """Each family, those of entry points last, which are imported only when reached."""
    yield from list(_MEMBERS.values())
    for name in _REGISTRY.names():
        if name not in _MEMBERS:
            yield register_family(name)


def find_family(
    name: Any,
    where: str,
    names: Callable[[Family], tuple[str | None, ...]] = lambda family: (family.name,),
    raw: Mapping[str, Any] | None = None,
) -> Family:
    """The family with one of the `names`, or an error with the nearest, by `raw` or by name."""
    families = list(all_families())
    for family in families:
        if name is not None and name in names(family):
            return family

    def likeness(family: Family) -> tuple[int, float]:
        texts = [*filter(None, names(family)), family.architecture]
        alike = (difflib.SequenceMatcher(None, str(name)[:80], text).ratio() for text in texts)
        return len({*family.keys, *family.aliases} & set(raw or ())), max(alike)

    expected = [existing for family in families for existing in names(family) if existing]
    near = max(families, key=likeness).name
    flag = (
        f" --family='{near}(name={name[:80]})' reads it as that," if isinstance(name, str) else ""
    )
    raise ValueError(
        f"{where}: expected one of {', '.join(expected)}, got {guard.short(name)}; {near} is the "
        f"closest,{flag} and --family=package:NAME or models.register_family add another"
    )
