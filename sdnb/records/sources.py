"""What numbers depend on besides model and text: the package's own sources, and the versions of others."""

import functools
import hashlib
import platform
from importlib import metadata
from pathlib import Path

_PACKAGES = ("sdnb", "torch", "transformers", "accelerate", "safetensors", "numpy")


@functools.cache
def package_fingerprint(*left_out: str) -> str:
    """SHA-256 over the package's own sources, but for the command line, which computes nothing.

    Args:
        left_out: further subfolders that do not count, such as "figures".

    Returns:
        16 hexadecimal digits.
    """
    root = Path(__file__).resolve().parent.parent
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] not in ("cli", *left_out):
            total.update(f"{name.as_posix()}\0".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that numbers depend on.

    Returns:
        Version by name, None where a package is not installed.
    """
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
