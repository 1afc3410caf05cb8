"""companion.data.assets: wheels found without importing them, refused where they are not the pinned ones."""

import hashlib
import sys

import pytest

from companion.data import assets
from companion.data.assets import ASSETS, Asset, asset_path

CONTENT = b"In the beginning"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A registered asset `toy` whose module raises when it is imported; returns the path of its file."""
    folder = tmp_path / "toy_wheel_module"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    file = folder / "data" / "text.bin"
    file.write_bytes(CONTENT)
    digest = hashlib.sha256(CONTENT).hexdigest()
    toy = Asset("toy-wheel==1.2.3", "toy_wheel_module", "data/text.bin", digest, "public domain")
    monkeypatch.setitem(ASSETS, "toy", toy)
    monkeypatch.syspath_prepend(tmp_path)
    return file


def test_finds_the_file_without_importing_the_module(wheel):
    assert asset_path("toy") == wheel
    assert "toy_wheel_module" not in sys.modules


def test_hashes_a_file_once_and_again_when_it_changes(wheel, monkeypatch):
    digested = []
    digest = hashlib.file_digest
    monkeypatch.setattr(assets.hashlib, "file_digest", lambda *a: digested.append(a) or digest(*a))
    for _ in range(3):
        asset_path("toy")
    assert len(digested) == 1
    wheel.write_bytes(CONTENT + b"!")
    with pytest.raises(ValueError, match="sha256"):
        asset_path("toy")
    assert len(digested) == 2


def _says_how(error) -> bool:
    text = str(error.value)
    return "\n" not in text and "make assets" in text and "toy-wheel==1.2.3" in text


def test_a_folder_is_known_by_all_its_files(wheel, monkeypatch):
    folder = wheel.parent
    (folder / "more.bin").write_bytes(b"x")
    digests = sorted(hashlib.sha256(content).hexdigest() for content in (CONTENT, b"x"))
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    monkeypatch.setitem(ASSETS, "toy", Asset("toy==1", "toy_wheel_module", "data", digest, "public domain"))
    assert asset_path("toy") == folder
    for change in (lambda: (folder / "third.bin").write_bytes(b"y"), (folder / "more.bin").unlink):
        change()
        with pytest.raises(ValueError, match="sha256"):
            asset_path("toy")


def test_missing_file(wheel):
    wheel.unlink()
    with pytest.raises(FileNotFoundError) as error:
        asset_path("toy")
    assert _says_how(error)


def test_missing_wheel(wheel, monkeypatch):
    absent = Asset("toy-wheel==1.2.3", "no_such_module_anywhere", "data/text.bin", "0" * 64, "public domain")
    monkeypatch.setitem(ASSETS, "toy", absent)
    with pytest.raises(FileNotFoundError) as error:
        asset_path("toy")
    assert _says_how(error)


@pytest.mark.parametrize("content", [b"", CONTENT[:-1], CONTENT + b"\0", b"x" * len(CONTENT)])
def test_wrong_content(wheel, content):
    wheel.write_bytes(content)
    with pytest.raises(ValueError, match="not the one of toy-wheel") as error:
        asset_path("toy")
    assert _says_how(error)


def test_a_module_that_is_no_package(wheel, monkeypatch):
    (wheel.parents[2] / "toy_single_file.py").write_text("")
    single = Asset("toy-wheel==1.2.3", "toy_single_file", "data/text.bin", "0" * 64, "public domain")
    monkeypatch.setitem(ASSETS, "toy", single)
    with pytest.raises(FileNotFoundError):
        asset_path("toy")


def test_unknown_name():
    with pytest.raises(ValueError, match="name must be one of 'bible'.*got 'bibel'"):
        asset_path("bibel")


@pytest.mark.parametrize("name", ASSETS)
def test_every_asset_is_pinned_licensed_and_installed(name):
    asset = ASSETS[name]
    assert asset.distribution.count("==") == 1
    assert asset.licence
    assert len(asset.sha256) == 64
    assert asset_path(name).exists()
