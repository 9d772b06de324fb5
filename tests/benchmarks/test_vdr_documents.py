from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.vdr import documents
from benchmarks.vdr.documents import (
    PACKAGES,
    SPLITS,
    Package,
    check_tools,
    document_name,
    fetch,
    select,
)
from rtx.runtime.errors import DataError

CONTENT = b"%PDF-1.4" + bytes(30_000)
# Does what apt-get does for one package: names its archive, or copies it.
APT_GET = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
*missing*) echo "E: Unable to locate package missing" >&2; exit 100;;
*--print-uris*) echo "'http://archive/{name}' {name} {size} SHA256:{sha256}";;
*) cp {archive} .;;
esac
"""


@pytest.mark.parametrize(
    ("package", "file", "name"),
    [
        ("r-cran-vcd", "usr/lib/R/site-library/vcd/doc/strucplot.pdf", "vcd-strucplot"),
        ("r-cran-rrcov", "rrcov.pdf", "rrcov"),
        ("ngspice-doc", "usr/share/doc/ngspice-doc/manual.pdf.gz", "ngspice-manual"),
        ("r-doc-pdf", "R-intro.pdf", "r-intro"),
        ("dynare-doc", "dynare++-tutorial.pdf.gz", "dynare-tutorial"),
    ],
)
def test_names_of_documents(package: str, file: str, name: str) -> None:
    assert document_name(package, file) == name


def test_the_list_of_packages() -> None:
    names = [package.name for package in PACKAGES]
    assert len(set(names)) == len(names)
    small = [package.split for package in PACKAGES if package.small]
    for split in SPLITS:
        assert split in small
    assert select(PACKAGES, ["ngspice-doc", "gnuplot-doc", "ngspice-doc"], small=False) == [
        package for name in ("ngspice-doc", "gnuplot-doc") for package in PACKAGES if package.name == name
    ]
    assert select(PACKAGES, [], small=True) == [package for package in PACKAGES if package.small]
    with pytest.raises(DataError, match="no such package among the documents: emacs, vim; known: abinit-doc, "):
        select(PACKAGES, ["emacs", "ngspice-doc", "vim"], small=False)


def test_a_machine_without_apt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(DataError, match="apt-get and dpkg-deb is not on this machine"):
        check_tools()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with two PDFs that are wanted; an apt-get that gives it is the first on the path."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb on this machine")
    root = tmp_path / "root"
    folder = root / "usr/share/doc/manual-doc"
    folder.mkdir(parents=True)
    (folder / "manual.pdf").write_bytes(CONTENT)
    (folder / "guide.pdf.gz").write_bytes(gzip.compress(CONTENT + b"2"))
    (folder / "figure.pdf").write_bytes(b"%PDF-1.4 small")
    (folder / "manual.txt").write_bytes(CONTENT)
    (root / "DEBIAN").mkdir()
    control = "Package: manual-doc\nVersion: 1.2-3\nArchitecture: all\nMaintainer: nobody\nDescription: none\n"
    (root / "DEBIAN/control").write_text(control)
    target = tmp_path / "manual-doc_1.2-3_all.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", str(root), str(target)], check=True, capture_output=True
    )
    binaries = tmp_path / "bin"
    binaries.mkdir()
    script = APT_GET.format(
        log=tmp_path / "log",
        name=target.name,
        archive=target,
        size=target.stat().st_size,
        sha256=hashlib.sha256(target.read_bytes()).hexdigest(),
    )
    (binaries / "apt-get").write_text(script)
    (binaries / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{Path('/usr/bin')}:{Path('/bin')}")
    monkeypatch.setattr(documents, "_PAUSE_S", 0)
    return target


def test_pdfs_are_taken_out_of_a_package(archive: Path, tmp_path: Path) -> None:
    package = Package("manual-doc", "train", ("*/guide.pdf.gz", "*/manual.pdf", "*/figure.pdf"))
    (manual, guide), problems = fetch([package, Package("missing", "train", ("*.pdf",))], tmp_path / "out")
    assert problems == ["missing: apt knows no such package; `apt-get update` may be needed"]
    assert (manual.name, guide.name) == ("manual", "manual-guide")
    assert (manual.package, manual.version, manual.split) == ("manual-doc", "1.2-3", "train")
    assert manual.path.read_bytes() == CONTENT
    assert manual.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert guide.path.read_bytes() == CONTENT + b"2"
    assert fetch([package], tmp_path / "out") == ([manual, guide], [])
    # Downloaded once; the second time apt-get was only asked which version there is.
    assert (tmp_path / "log").read_text().splitlines() == [
        "--quiet --print-uris download manual-doc missing",
        "--quiet --print-uris download manual-doc",
        "--quiet download manual-doc",
        "--quiet --print-uris download manual-doc",
    ]
    (tmp_path / "out" / "downloads" / archive.name).write_bytes(b"half")
    assert fetch([package], tmp_path / "out") == ([manual, guide], [])
    assert (tmp_path / "log").read_text().splitlines()[-1] == "--quiet download manual-doc"


def test_packages_that_cannot_be_had(archive: Path, tmp_path: Path) -> None:
    good, other = Package("manual-doc", "dev", ("*/manual.pdf",)), Package("manual-doc", "dev", ("*/other.pdf",))
    with pytest.raises(DataError, match="none of the packages can be had: missing: apt knows no such package"):
        fetch([Package("missing", "train", ("*.pdf",))], tmp_path / "out")
    _, problems = fetch([good, other], tmp_path / "out")
    assert problems == ["manual-doc 1.2-3: has no PDF like */other.pdf"]
    archive.write_bytes(b"another")
    (tmp_path / "out" / "downloads" / archive.name).unlink()
    with pytest.raises(DataError, match="manual-doc: cannot be downloaded: what came is not what apt announced"):
        fetch([good], tmp_path / "out")
    archive.unlink()
    with pytest.raises(DataError, match=r"manual-doc: cannot be downloaded: cp: .*No such file"):
        fetch([good], tmp_path / "out")
