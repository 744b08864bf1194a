"""The chart as a release publishes it: packaged, with its image already named: `make chart IMAGE=… DIGEST=…`.

python -m harness.chartpackage --image ghcr.io/acme/vcpuset --digest sha256:… build
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.helm import CHART, run_helm

__all__ = ["main", "package"]


async def package(folder: Path, *, image: str | None = None, digest: str | None = None) -> Path:
    """Package the chart into `folder`, with this image as the default. Returns the archive.

    Raises:
        BinariesMissing: helm has not been built.
        CommandFailed: helm refuses the chart or these values.
    """
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vcpuset-chart-") as work:
        # The links into deploy/ are followed, as by `helm package`.
        chart = Path(shutil.copytree(CHART, Path(work) / "vcpuset"))
        for name, old, new in (("repository", "vcpuset", image), ("digest", '""', digest)):
            if new is not None:
                _set(chart / "values.yaml", f"  {name}: {old}\n", f"  {name}: {new}\n")
        await run_helm("lint", "--strict", chart)
        said = (await run_helm("package", chart, "--destination", folder)).stdout
    return Path(said.rpartition(": ")[2].strip())


def _set(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{file.name} has not one line {old!r}"
    file.write_text(text.replace(old, new))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the path of the archive."""
    parser = argparse.ArgumentParser(prog="python -m harness.chartpackage", description=main.__doc__)
    parser.add_argument("--image", help="the repository of the image, without a tag")
    parser.add_argument("--digest", help="its digest, sha256:…")
    parser.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    archive = asyncio.run(package(given.folder, image=given.image or None, digest=given.digest or None))
    sys.stdout.write(f"{archive}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
