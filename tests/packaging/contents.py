"""Check what is in the sdist and the wheel of a folder: all sources in the one, no sources or generated C in the other."""

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main(folder: str) -> None:
    (sdist,) = Path(folder).glob("*.tar.gz")
    (wheel,) = Path(folder).glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    files = {name for name in names if "." in Path(name).name or name.endswith(("LICENSE", "Makefile"))}
    sources = ("csrc/**/*.[chd]*", "csrc/**/*.inc", "csrc/Makefile", "src/**/*.py*", "tests/**/*.py", "bench/*.py", "docs/*")
    for pattern in sources:
        for path in ROOT.glob(pattern):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and not any(part in name for part in ("__pycache__", ".egg-info", "csrc/build")):
                assert name in files, f"the sdist lacks {name}"
    stray = [
        name
        for name in names
        if name.endswith((".o", ".so", ".pyc", "_core.c")) or name.startswith(("build/", "csrc/build"))
    ]
    assert not stray, f"the sdist has {stray}"

    with zipfile.ZipFile(wheel) as archive:
        names = {info.filename for info in archive.infolist()}
        size = sum(info.file_size for info in archive.infolist())
    stray = [n for n in names if not n.endswith((".py", ".pyi", ".so", "py.typed")) and ".dist-info/" not in n]
    assert not stray, f"the wheel has {stray}"
    for wanted in ("fusedstep/py.typed", "fusedstep/kernels.pyi", "fusedstep/demo/train.py"):
        assert wanted in names, f"the wheel lacks {wanted}"
    assert any(n.startswith("fusedstep/_core.") and n.endswith(".so") for n in names), "the wheel lacks the extension"
    print(f"{sdist.name}: complete; {wheel.name}: {wheel.stat().st_size / 1e3:.0f} kB, {size / 1e3:.0f} kB unpacked")


main(sys.argv[1])
