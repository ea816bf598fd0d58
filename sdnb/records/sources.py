"""What numbers depend on besides model and text: the package's own sources, and the versions of others."""

import functools
import hashlib
import platform
from importlib import metadata
from pathlib import Path

_PACKAGES = ("sdnb", "torch", "transformers", "accelerate", "safetensors", "numpy")


@functools.cache
def package_fingerprint(*parts: str) -> str:
    """SHA-256 over the package's own sources.

    Args:
        parts: subfolders to take, such as "anatomy"; none takes all but the command
            line, which computes nothing.

    Returns:
        16 hexadecimal digits.
    """
    root = Path(__file__).resolve().parent.parent
    folders = [root / part for part in parts] or [root]
    total = hashlib.sha256()
    paths = {path for folder in folders for path in folder.rglob("*.py")}
    for path in sorted(paths.difference((root / "cli").rglob("*.py"))):
        total.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
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
