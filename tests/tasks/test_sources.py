"""`statewise data`: only the pinned bytes get in, whole or not at all; no path of an archive is followed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import lzma
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from statewise.cli import main
from statewise.core import DataError, ResourceError, Unknown
from statewise.tasks.sources import Source, _has_pip, cache, get, sources

DATA = {"pack/data/a.csv": b"1,2\n", "pack/data/b.bin": bytes(range(256)) * 100}


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return out.getvalue()


def deb(members: dict[str, bytes], *, first: bytes = b"2.0\n") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    packed = b"!<arch>\n"
    for name, content in (("debian-binary", first), ("data.tar.xz", lzma.compress(out.getvalue()))):
        head = f"{name:<16}{'0':<12}{'0':<6}{'0':<6}{'100644':<8}{len(content):<10}`\n".encode()
        packed += head + content + b"\n" * (len(content) % 2)
    return packed


def made(archive: bytes, members: dict[str, bytes] = DATA, **other: Any) -> tuple[Source, Any, list[int]]:
    """A source, a downloader that gives its archive, and the calls that were made of it."""
    source = Source(
        name="toy", what="toy", licence="none", package="nothing-of-this-name", version="1", archive=sha(archive),
        size=len(archive), members={name: sha(content) for name, content in members.items()}, **other
    )  # fmt: skip
    calls: list[int] = []

    def download(source: Source, folder: Path) -> Path:
        calls.append(1)
        (folder / "toy.whl").write_bytes(archive)
        return folder / "toy.whl"

    return source, download, calls


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STATEWISE_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["wheel", "deb", "odd deb"])
def test_get(kind: str, own_cache: Path) -> None:
    more = {**DATA, "pack/code.py": b"raise SystemExit"}
    archive = wheel(more) if kind == "wheel" else deb(more, first=b"2.0\n" if kind == "deb" else b"2.0")
    source, download, calls = made(archive, client="pip" if kind == "wheel" else "apt-get")
    assert not source.here()
    folder = get(source, download=download)
    assert source.here()
    assert folder.parent == own_cache == cache()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        Path(name).name: content for name, content in DATA.items()
    }
    assert {name: path.read_bytes() for name, path in source.paths().items()} == {
        "a.csv": DATA["pack/data/a.csv"], "b.bin": DATA["pack/data/b.bin"]
    }  # fmt: skip
    assert [path.name for path in own_cache.iterdir()] == [folder.name], "nothing temporary stays"
    get(source, download=download)
    assert len(calls) == 1
    get(source, download=download, force=True)
    assert len(calls) == 2


def test_another_archive_is_refused(own_cache: Path) -> None:
    source, download, _ = made(wheel(DATA))
    with pytest.raises(DataError, match=r"toy.whl: SHA-256 is \w+, expected \w+; nothing was kept"):
        get(replace(source, archive=sha(b"another")), download=download)
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize("client", ["pip", "apt-get"])
def test_another_member_is_refused(client: Any, own_cache: Path) -> None:
    changed = {**DATA, "pack/data/b.bin": b"another"}
    source, download, _ = made(wheel(changed) if client == "pip" else deb(changed), client=client)
    with pytest.raises(DataError, match=r"pack/data/b.bin has SHA-256"):
        get(source, download=download)
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize("client", ["pip", "apt-get"])
def test_a_missing_member_is_named(client: Any, own_cache: Path) -> None:
    some = {"pack/data/a.csv": DATA["pack/data/a.csv"]}
    source, download, _ = made(wheel(some) if client == "pip" else deb(some), client=client)
    with pytest.raises(DataError, match=r"toy.whl has no file pack/data/b.bin"):
        get(source, download=download)
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize("client", ["pip", "apt-get"])
def test_no_path_of_an_archive_is_followed(client: Any, own_cache: Path) -> None:
    evil = {"../../escaped": b"1", "/tmp/escaped": b"2", "pack/../../../escaped": b"3"}
    every = {**DATA, **evil}
    source, download, _ = made(wheel(every) if client == "pip" else deb(every), client=client)
    get(source, download=download)
    source, download, _ = made(wheel(evil) if client == "pip" else deb(evil), {"../../escaped": b"1"}, client=client)
    get(replace(source, name="evil"), download=download)  # even a member that was asked for lands under its bare name
    inside = {path for path in own_cache.rglob("*") if path.is_file()}
    assert {path for path in own_cache.parent.rglob("*") if path.is_file()} == inside
    assert {path.name for path in inside} == {"a.csv", "b.bin", "escaped"}


def test_a_link_in_a_deb_is_not_data(own_cache: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        link = tarfile.TarInfo("./pack/data/a.csv")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    data = lzma.compress(out.getvalue())
    archive = (
        b"!<arch>\n" + f"{'data.tar.xz':<16}{'0':<12}{'0':<6}{'0':<6}{'100644':<8}{len(data):<10}`\n".encode() + data
    )
    source, download, _ = made(archive, {"pack/data/a.csv": b"1,2\n"}, client="apt-get")
    with pytest.raises(DataError, match="has no file"):
        get(source, download=download)


@pytest.mark.parametrize("content", [b"", b"no archive", b"!<arch>\nshort", b"!<arch>\n" + b"x" * 60])
def test_what_is_no_deb(content: bytes) -> None:
    source, download, _ = made(content, client="apt-get")
    with pytest.raises(DataError, match=r"not a Debian package|holds no data.tar.xz"):
        get(source, download=download)


def test_a_damaged_copy_is_found_and_mended(own_cache: Path) -> None:
    source, download, calls = made(wheel(DATA))
    get(source, download=download)
    path = source.folder / "b.bin"
    content = bytearray(path.read_bytes())
    content[77] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match=r"b.bin: SHA-256 is not the pinned .*statewise data get toy --force"):
        source.paths()
    get(source, download=download)
    assert len(calls) == 2
    source.paths()


def test_a_failed_get_leaves_the_old_copy(own_cache: Path) -> None:
    source, download, _ = made(wheel(DATA))
    get(source, download=download)

    def broken(source: Source, folder: Path) -> Path:
        (folder / "toy.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(source, download=broken, force=True)
    assert len(source.paths()) == 2
    assert [path.name for path in own_cache.iterdir()] == [source.folder.name]


def test_full_disk(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, download, calls = made(wheel(DATA))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 10}))
    with pytest.raises(ResourceError, match="10 bytes free, toy needs"):
        get(source, download=download)
    assert not calls


def test_absent_data_says_what_to_run() -> None:
    with pytest.raises(DataError, match=r"run: statewise data get toy$"):
        made(wheel(DATA))[0].paths()


def test_an_installed_package_is_used_only_with_the_pinned_content(tmp_path: Path, monkeypatch: Any) -> None:
    for name, content in DATA.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_bytes(content)
    (tmp_path / "site/pack/__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    source, _, _ = made(wheel(DATA))
    assert source.here()
    assert "pack" not in sys.modules
    other, _, _ = made(wheel(DATA), {**DATA, "pack/data/a.csv": b"another"})
    assert not other.here()


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache() == tmp_path / "cache"
    monkeypatch.delenv("STATEWISE_DATA")
    assert cache() == tmp_path / "xdg" / "statewise"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache() == tmp_path / ".cache" / "statewise"


def test_pip_that_fails_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "noise\nERROR: No matching distribution found\n"
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", said))
    with pytest.raises(DataError) as error:
        get(made(wheel(DATA))[0])
    assert "\n" not in str(error.value)
    assert "pip could not download nothing-of-this-name 1 (ERROR: No matching distribution found)" in str(error.value)
    assert str(error.value).endswith("check the network, then again: statewise data get toy")


def test_pip_is_not_looked_for_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """setuptools takes that for pip at work, and for the rest of the process no longer stands in for distutils."""

    class Watch:
        def find_spec(self, name: str, *_: Any) -> None:
            assert name != "pip", "pip is looked for"

    monkeypatch.delitem(sys.modules, "pip", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Watch(), *sys.meta_path])
    with pytest.raises(AssertionError, match="looked for"):
        importlib.util.find_spec("pip")
    _has_pip()
    monkeypatch.setattr(importlib.metadata, "version", {"pip": "26.0"}.__getitem__)
    assert _has_pip()

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert not _has_pip()
    with pytest.raises(DataError, match="has no pip to download with; run: python -m ensurepip"):
        get(made(wheel(DATA))[0])


def test_no_apt_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(DataError, match=r"this system has no apt-get; the data is in the Debian package .* copy its"):
        get(made(deb(DATA), client="apt-get")[0])


def test_nothing_is_installed_or_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        seen.append(command)
        assert not options.get("shell")
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    for source in sources:
        with pytest.raises(DataError):
            get(source, force=True)
    assert len(seen) == len(sources) >= 8
    for command in seen:
        assert "download" in command
        assert "install" not in command
        if "pip" in command:
            assert {"--no-deps", "--only-binary", ":all:"} <= set(command)


def test_every_source_is_pinned() -> None:
    for source in sources:
        assert len(source.archive) == 64
        assert source.members
        assert all(len(sha256) == 64 for sha256 in source.members.values())
        assert len({Path(member).name for member in source.members}) == len(source.members)
        assert source.licence
        assert "\n" not in source.data
        assert source.data.endswith(f"statewise data get {source.name}")
    with pytest.raises(Unknown, match="near: mnist"):
        sources["mnits"]


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    def run(*argv: str) -> tuple[int, str, str]:
        status = main(["data", *argv])
        said = capsys.readouterr()
        return status, said.out, said.err

    status, out, _ = run()
    assert status == 0
    assert all(source.name in out for source in sources)
    status, out, _ = run("where", "competitions")
    assert (status, out.strip()) == (0, f"competitions is not here; it would be in {own_cache / 'competitions-0.1.4'}")
    status, out, err = run("get")
    assert status == 2
    assert "name at least one data set of" in err
    status, out, err = run("get", "mnits")
    assert status == 2
    assert err.startswith("error[2]: unknown data set 'mnits'; near: mnist")
    source, download, _ = made(wheel(DATA))
    monkeypatch.setattr("statewise.tasks.sources._download", download)
    monkeypatch.setitem(sources._entries, "toy", source)
    status, out, _ = run("get", "toy")
    assert status == 0
    assert "licence: none" in out
    assert str(source.folder) in out
    status, out, _ = run("where", "toy")
    assert {Path(line).name for line in out.split()} == {"a.csv", "b.bin"}
    monkeypatch.setattr("statewise.tasks.sources._download", made(b"another")[1])
    status, out, err = run("get", "toy", "--force")
    assert status == 3
    assert err.startswith("error[3]: toy.whl: SHA-256")
    assert len(err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [source.name for source in sources])
def test_fetch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the network: the pinned file is still there, and still the same."""
    monkeypatch.setenv("STATEWISE_DATA", str(tmp_path))
    source = sources[name]
    get(source, force=True)
    assert source.here()
    assert all(tmp_path in path.parents for path in source.paths().values())
