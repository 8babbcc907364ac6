"""Optional packages that can serve some ops: found at start, never required.

A backend counts only in exactly the version it was tested with; any other is named and not used.
If one that counts cannot be loaded or fails, that is an error that names it: nothing else takes
over in silence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


class BackendError(RuntimeError):
    """An optional backend that is installed in the right version cannot be loaded, or failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A package on the index, pinned.

    Args:
        package: the distribution's name.
        version: the one version that is used.
    """

    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"

    def found(self) -> str | None:
        """The installed version, None without one."""
        return _installed(self.package)

    def usable(self) -> bool:
        """Whether exactly the pinned version is installed."""
        return self.found() == self.version

    def unused(self) -> str | None:
        """Why an installed one is not used; None where it is used, or not installed."""
        found = self.found()
        if found is None or found == self.version:
            return None
        return f"{self.package} {found} found, {self.version} needed: not used"

    def file(self, name: str) -> Path:
        """A file that the package installed.

        Raises:
            BackendError: it did not install such a file.
        """
        path = Path(str(metadata.distribution(self.package).locate_file(name)))
        if not path.is_file():
            raise BackendError(f"optional backend {self}: no file {path}")
        return path

    @contextmanager
    def named(self, doing: str) -> Iterator[None]:
        """Whatever goes wrong inside becomes an error that names the backend.

        Raises:
            BackendError: from the error inside.
        """
        try:
            yield
        except BackendError:
            raise
        except Exception as err:
            raise BackendError(
                f"optional backend {self}: {doing} failed: {err} (without the package, this"
                " project's own kernels serve the op)"
            ) from err


@functools.cache
def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# The extra `hopper` of pyproject.toml installs these.
DEEP_GEMM = Backend(package="sgl-deep-gemm", version="0.1.4.post1")
FLASH_MLA = Backend(package="sglang-kernel", version="0.4.5")
