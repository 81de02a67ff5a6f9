"""The file that records the inputs of a directory; a directory of other inputs is refused."""

import dataclasses
import json
import reprlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from logitjax.storage import _guard as guard
from logitjax.storage._files import write_json
from logitjax.storage._guard import read_json

_NAME = "manifest.json"
_FORMAT = 1
# Names of a thousand classes must not fill the error.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of a directory of a `kind`, such as `teacher cache`, and their inputs.

    >>> import tempfile
    >>> manifest = Manifest(tempfile.mkdtemp(), "table")
    >>> manifest.write({"data": "a", "k": 4})
    >>> manifest.read()["made_from"]
    {'data': 'a', 'k': 4}
    >>> manifest.check({"data": "b", "k": 5})
    Traceback (most recent call last):
    ValueError: table ... does not fit: its data is 'a', not 'b'; its k is 4, not 5 ...
    """

    directory: epath.PathLike
    kind: str

    @property
    def path(self) -> epath.Path:
        """The path of the manifest."""
        return epath.Path(self.directory).expanduser() / _NAME

    def exists(self) -> bool:
        """Whether anything, of any kind, was created or started in the directory."""
        return self.path.exists()

    def write(
        self, made_from: Mapping[str, Any], contents: Mapping[str, Any] | None = None
    ) -> None:
        """Record the contents of the directory; creates it if necessary.

        Args:
            made_from: Everything that determines the content: JSON values by name.
            contents: Further data for readers, such as names and sizes of files; write it last.
        """
        record = {"kind": self.kind, "format": _FORMAT, "made_from": dict(made_from)}
        write_json(self.path, record | dict(contents or {}))

    def claim(self, made_from: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """`check` a directory that has a manifest, else `write` it; what it is made from."""
        if self.exists():
            return self.check(made_from, **options)["made_from"]
        self.write(made_from)
        return dict(made_from)

    def read(self) -> dict[str, Any]:
        """Read what `write` wrote: `made_from` and the contents, by name.

        Raises:
            FileNotFoundError: The directory has no manifest.
            ValueError: It holds something else, or the manifest is damaged.
        """
        path, root = self.path, self.path.parent
        if not path.exists():
            raise FileNotFoundError(f"no {self.kind} in {root} (it has no {_NAME})")
        try:
            record = read_json(path, form=dict)
            stored, version = record.pop("kind"), record.pop("format")
            if not isinstance(record["made_from"], dict):
                raise TypeError("made_from is no object")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # Results that take long to recreate must not be deleted because of a damaged label.
            advice = (
                "remove this file, which is then written again"
                if self.kind.endswith(("run", "audit"))
                else f"delete {root} and let it be made again"
            )
            raise ValueError(f"{path} is damaged ({guard.one_line(error)}); {advice}") from None
        if stored != self.kind:
            raise ValueError(f"{root}: expected a {self.kind}, got a {_plain(stored)}")
        if version != _FORMAT:
            raise ValueError(
                f"{path}: expected format {_FORMAT}, got {_plain(version)}; make it again"
            )
        return record

    def check(
        self,
        expected: Mapping[str, Any],
        *,
        at_least: tuple[str, ...] = (),
        names_of: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Read the manifest; refused unless the directory was made from the expected inputs.

        Args:
            expected: Required inputs; omitted parts may have any value.
            at_least: Parts that may also be larger.
            names_of: Parts that only name the subject of a digest: `{name: digest}`. They may
                differ if the digest is the same, as for a moved file.

        Raises:
            FileNotFoundError: The directory has no manifest.
            ValueError: It was made from other inputs; names every difference.
        """
        record = self.read()
        stored = record["made_from"]
        # JSON has no tuples.
        requested = json.loads(json.dumps(dict(expected)))
        for name, fingerprint in (names_of or {}).items():
            if name in requested and stored.get(fingerprint) == requested.get(fingerprint):
                del requested[name]
        wrong = list(_differences("", stored, requested, at_least))
        if wrong:
            raise ValueError(
                f"{self.kind} {epath.Path(self.directory)} does not fit: {'; '.join(wrong)} "
                "(remove it or choose another directory)"
            )
        return record


def _plain(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() else _SHORT.repr(value)


def _differences(path: str, stored: Any, expected: Any, at_least: tuple[str, ...]) -> Any:
    for name, value in expected.items():
        has, full_name = stored.get(name), f"{path}{name}"
        if has == value or (full_name in at_least and has is not None and has >= value):
            continue
        if isinstance(has, Mapping) and isinstance(value, Mapping):
            # Also keys that only the directory has: a missing key in a part is a difference.
            both = dict.fromkeys(has) | dict(value)
            yield from _differences(f"{full_name}.", has, both, at_least)
        else:
            yield f"its {full_name} is {_SHORT.repr(has)}, not {_SHORT.repr(value)}"
