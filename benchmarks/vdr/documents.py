"""The documents: PDFs inside packages of Debian's archive, which hold manuals and papers with figures and tables.

All come from `main`, so all are free to use, change and share. Nothing is installed: the packages are downloaded and
their PDFs taken out.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rtx.runtime.errors import DataError
from rtx.runtime.hashing import sha256_of

TRAIN, DEV, TEST = "train", "dev", "test"
SPLITS = (TRAIN, DEV, TEST)

_VIGNETTES = "usr/lib/R/site-library/*/doc/"


@dataclass(frozen=True)
class Package:
    """A Debian package and its documents that are used.

    Attributes:
        name: of the package.
        split: one of SPLITS. A package is never divided, nor are packages of the same authors on the same matter.
        files: patterns of paths in the package (`*` matches slashes too).
        small: whether the small set has it.
    """

    name: str
    split: str
    files: tuple[str, ...]
    small: bool = False


@dataclass(frozen=True)
class Document:
    """A PDF on disk.

    Attributes:
        name: short, made of package and file; part of the ids of its pages.
        package, version: where it comes from.
        split: one of SPLITS.
        path: of the PDF.
        sha256: of its content.
    """

    name: str
    package: str
    version: str
    split: str
    path: Path
    sha256: str


def _vignettes(name: str, split: str, *files: str, small: bool = False) -> Package:
    return Package(name, split, tuple(_VIGNETTES + file for file in files), small)


PACKAGES = (
    # Plotting manuals, a PDF library, statistical graphics, epidemics, robust statistics, graph drawing.
    Package("pyxplot-doc", TEST, ("usr/share/doc/pyxplot/pyxplot.pdf",)),
    Package("python-reportlab-doc", TEST, ("*/reportlab-userguide.pdf",), small=True),
    _vignettes("r-cran-vcd", TEST, "strucplot.pdf", "residual-shadings.pdf", small=True),
    _vignettes("r-cran-surveillance", TEST, "*.pdf"),
    _vignettes("r-cran-robustbase", TEST, "lmrob_simulation.pdf", "psi_functions.pdf"),
    _vignettes("r-cran-rrcov", TEST, "rrcov.pdf"),
    Package("graphviz-doc", TEST, ("*guide.pdf.gz", "*/smyrna.pdf.gz", "*/Agraph.pdf.gz")),
    # Differential equations, mixed models, regression, seriation and tours, a C compiler.
    _vignettes("r-cran-desolve", DEV, "deSolve.pdf", "compiledCode.pdf"),
    _vignettes("r-cran-lme4", DEV, "lmer.pdf"),
    _vignettes("r-cran-quantreg", DEV, "rq.pdf", "crq.pdf"),
    _vignettes("r-cran-seriation", DEV, "seriation.pdf", small=True),
    _vignettes("r-cran-tsp", DEV, "TSP.pdf", small=True),
    _vignettes("r-cran-kernlab", DEV, "kernlab.pdf"),
    Package("sdcc-doc", DEV, ("*/sdccman.pdf.gz",)),
    # Long manuals.
    Package("ngspice-doc", TRAIN, ("*/manual.pdf.gz",)),
    Package("octave-doc", TRAIN, ("*/octave.pdf", "*/liboctave.pdf")),
    Package("gnuplot-doc", TRAIN, ("*/gnuplot.pdf",)),
    Package("r-doc-pdf", TRAIN, ("*/R-*.pdf",)),
    Package("gri-pdf-doc", TRAIN, ("*/gri.pdf.gz",)),
    Package("gmsh-doc", TRAIN, ("usr/share/doc/gmsh-doc/gmsh.pdf.gz",)),
    Package("asymptote-doc", TRAIN, ("*/asymptote.pdf", "*/CAD.pdf")),
    Package("avr-libc", TRAIN, ("*/avr-libc-user-manual.pdf.gz",)),
    Package("hmmer-doc", TRAIN, ("*/Userguide.pdf.gz",)),
    Package("why3-doc-pdf", TRAIN, ("*/manual.pdf",), small=True),
    Package("glpk-doc", TRAIN, ("*/glpk.pdf", "*/gmpl.pdf", "*/graphs.pdf")),
    Package("elk-lapw", TRAIN, ("*/elk.pdf.gz", "*/spacegroup.pdf.gz")),
    Package("evolver-doc", TRAIN, ("*/manual*.pdf",)),
    Package("auto-multiple-choice-doc-pdf", TRAIN, ("*/auto-multiple-choice.en.pdf",)),
    Package("debian-policy", TRAIN, ("*/policy.pdf.gz",)),
    Package("developers-reference", TRAIN, ("*/developers-reference.pdf",)),
    Package("freefem-doc", TRAIN, ("*/freefem.pdf",)),
    Package("mummer-doc", TRAIN, ("*/maxmat3src.pdf",)),
    Package("rna-star", TRAIN, ("*/STARmanual.pdf",)),
    Package("xfig-doc", TRAIN, ("*/xfig-howto.pdf", "*/xfig_ref_en.pdf")),
    Package("abinit-doc", TRAIN, ("*.pdf",)),
    Package("dynare-doc", TRAIN, ("*/parallel.pdf.gz", "*/dynare++-tutorial.pdf.gz", "*/dynare-manual.pdf.gz")),
    Package("libsuitesparse-doc", TRAIN, ("*/Mongoose_UserGuide.pdf", "*/SLIP_LU_UserGuide.pdf", "*/ldl_*.pdf")),
    # Papers with figures.
    Package("r-cran-survival", TRAIN, ("usr/lib/R/library/survival/doc/*.pdf",)),
    _vignettes("r-cran-tgp", TRAIN, "*.pdf"),
    _vignettes("r-cran-hsaur3", TRAIN, "Ch_*.pdf"),
    _vignettes("r-cran-flexmix", TRAIN, "*.pdf", small=True),
    _vignettes("r-cran-partykit", TRAIN, "*.pdf", small=True),
    _vignettes("r-cran-party", TRAIN, "*.pdf"),
    _vignettes("r-cran-strucchange", TRAIN, "*.pdf"),
    _vignettes("r-cran-coin", TRAIN, "*.pdf"),
    _vignettes("r-cran-multcomp", TRAIN, "*.pdf"),
    _vignettes("r-cran-spacetime", TRAIN, "*.pdf"),
    _vignettes("r-cran-gstat", TRAIN, "*.pdf"),
    _vignettes("r-cran-sp", TRAIN, "*.pdf"),
    _vignettes("r-cran-gnm", TRAIN, "*.pdf"),
    _vignettes("r-cran-actuar", TRAIN, "*.pdf"),
    _vignettes("r-cran-fitdistrplus", TRAIN, "paper2JSS.pdf"),
    _vignettes("r-cran-vegan", TRAIN, "*.pdf"),
    _vignettes("r-cran-pscl", TRAIN, "countreg.pdf"),
    _vignettes("r-cran-msm", TRAIN, "msm-manual.pdf"),
    _vignettes("r-cran-clue", TRAIN, "clue.pdf"),
    _vignettes("r-cran-zoo", TRAIN, "zoo.pdf", "zoo-faq.pdf"),
    _vignettes("r-cran-colorspace", TRAIN, "hcl-colors.pdf"),
    _vignettes("r-cran-hexbin", TRAIN, "hexagon_binning.pdf"),
    _vignettes("r-cran-etm", TRAIN, "etmCIF_tutorial.pdf"),
    _vignettes("r-cran-evd", TRAIN, "Multivariate_Extremes.pdf"),
    _vignettes("r-cran-tikzdevice", TRAIN, "tikzDevice.pdf"),
    _vignettes("r-bioc-metagenomeseq", TRAIN, "*.pdf"),
)

_ATTEMPTS, _PAUSE_S, _TIMEOUT_S = 3, 5.0, 300
_MIN_PDF_BYTES = 20_000
_UNKNOWN = re.compile(r"Unable to locate package (\S+)")
_ANNOUNCED = re.compile(r"'\S+' (\S+\.deb) \d+ (SHA\d+):([0-9a-f]+)")


class UnavailableError(DataError):
    """A package that cannot be had; the set is built of the others."""


def document_name(package: str, file: str) -> str:
    """ "r-cran-vcd", ".../strucplot.pdf" -> "vcd-strucplot"; a file named as its package names the document."""
    short = re.sub(r"^r-(cran|bioc)-|(-pdf)?-doc(-pdf)?$", "", package)
    stem = re.sub(r"[^a-z0-9]+", "-", Path(file).name.lower().removesuffix(".gz").removesuffix(".pdf")).strip("-")
    return stem if stem.startswith(short) else f"{short}-{stem}"


def check_tools() -> None:
    """
    Raises:
        DataError: the machine has no apt.
    """
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]:
        raise DataError(
            f"the documents come from Debian packages, and {' and '.join(missing)} is not on this machine; "
            "expected Debian or a system derived from it"
        )


def fetch(packages: Sequence[Package], folder: Path) -> tuple[list[Document], list[str]]:
    """The documents of all packages that can be had, downloaded unless they are there.

    Args:
        packages: which.
        folder: `downloads/` and `pdf/` are made in it.

    Returns:
        The documents, and a sentence on each package that cannot be had.

    Raises:
        DataError: none can be had.
    """
    check_tools()
    for each in ("downloads", "pdf"):
        (folder / each).mkdir(parents=True, exist_ok=True)
    archives = _announced([package.name for package in packages])
    documents: list[Document] = []
    problems: list[str] = []
    for package in packages:
        try:
            if package.name not in archives:
                raise UnavailableError(f"{package.name}: apt knows no such package; `apt-get update` may be needed")
            documents += _documents(package, _download(archives[package.name], folder / "downloads"), folder / "pdf")
        except UnavailableError as missing:
            problems.append(str(missing))
    if not documents:
        raise DataError(f"none of the packages can be had: {'; '.join(problems)}")
    return documents, problems


def _documents(package: Package, archive: Path, target: Path) -> list[Document]:
    version = _run(["dpkg-deb", "--field", archive.name, "Version"], archive.parent).strip()
    documents: list[Document] = []
    for file, content in _members(archive, package.files):
        path = target / f"{document_name(package.name, file)}.pdf"
        if not path.is_file() or path.read_bytes() != content:
            partial = path.with_suffix(".partial")
            partial.write_bytes(content)
            partial.replace(path)
        documents.append(Document(path.stem, package.name, version, package.split, path, sha256_of(path)))
    if not documents:
        raise UnavailableError(f"{package.name} {version}: has no PDF like {', '.join(package.files)}")
    return sorted(documents, key=lambda document: document.name)


def select(packages: Iterable[Package], names: Sequence[str], *, small: bool) -> list[Package]:
    """The packages of the small set or of the whole one, and of these the ones that are named.

    Raises:
        DataError: a name that is no package's.
    """
    chosen = [package for package in packages if package.small or not small]
    if not names:
        return chosen
    known = {package.name: package for package in chosen}
    if unknown := [name for name in names if name not in known]:
        raise DataError(f"no such package among the documents: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return [known[name] for name in dict.fromkeys(names)]


@dataclass(frozen=True)
class _Archive:
    """What apt would download: the package, the name of the file, and its hash with the name of the function."""

    package: str
    file: str
    function: str
    digest: str

    def is_at(self, path: Path) -> bool:
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, self.function.lower()).hexdigest() == self.digest


def _announced(names: Sequence[str]) -> dict[str, _Archive]:
    """By package, the archive of the version that apt would install; apt is asked for all at once, which is faster."""
    left = list(names)
    while left:
        try:
            with tempfile.TemporaryDirectory() as empty:  # apt says nothing of an archive that lies where it is run
                lines = _run(["apt-get", "--quiet", "--print-uris", "download", *left], Path(empty))
        except subprocess.CalledProcessError as failed:
            unknown = set(_UNKNOWN.findall(failed.stderr))
            if not unknown.intersection(left):
                raise UnavailableError(
                    f"apt-get: {(failed.stderr.strip() or 'no message').splitlines()[-1]}"
                ) from failed
            left = [name for name in left if name not in unknown]
            continue
        found = [_Archive(file.split("_", 1)[0], file, *hashed) for file, *hashed in _ANNOUNCED.findall(lines)]
        return {archive.package: archive for archive in found}
    return {}


def _download(archive: _Archive, folder: Path) -> Path:
    path = folder / archive.file
    for attempt in range(_ATTEMPTS):
        if archive.is_at(path):
            return path
        path.unlink(missing_ok=True)
        time.sleep(_PAUSE_S * attempt)
        try:
            _run(["apt-get", "--quiet", "download", archive.package], folder)
        except subprocess.CalledProcessError as failed:
            reason = (failed.stderr.strip() or f"exit code {failed.returncode}").splitlines()[-1]
        except subprocess.TimeoutExpired:
            reason = f"not done in {_TIMEOUT_S} s"
        else:
            reason = "what came is not what apt announced"
    if archive.is_at(path):
        return path
    raise UnavailableError(f"{archive.package}: cannot be downloaded: {reason}")


def _run(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    return done.stdout


def _members(archive: Path, patterns: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Path and content of the PDFs that match, unzipped; a file under two names comes once, tiny ones not at all."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            for member in tar:
                path = member.name.removeprefix("./")
                is_pdf = path.endswith((".pdf", ".pdf.gz")) and member.isfile()
                if is_pdf and any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    content = stream.read()
                    content = gzip.decompress(content) if path.endswith(".gz") else content
                    if len(content) >= _MIN_PDF_BYTES:
                        yield path, content
        process.stdout.read()
    if process.returncode:
        raise UnavailableError(f"{archive.name}: dpkg-deb cannot read it")
