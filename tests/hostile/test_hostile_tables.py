"""Tables, shards and lists that are cut off, lie about their sizes, or are something else."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from data_files import last, random_images

from tessera.data.sources import Options, open_source
from tessera.errors import DataError
from tessera.images import png_bytes

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

MIB = 2**20
FILES = [png_bytes(last(image)) for image in random_images(8)]


def read(path: Path, options: Options | None = None) -> int:
    with open_source(path, options) as source:
        for record in source.records:
            record.load()
        return source.count


def table() -> pa.Table:
    return pa.table({"image": pa.array(FILES, pa.binary()), "label": list("abcabcab")})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One set of each kind."""
    folder = tmp_path_factory.mktemp("tables")
    pq.write_table(table(), folder / "a.parquet", row_group_size=3)
    with pa.ipc.new_stream(folder / "a.arrow", table().schema) as writer:
        writer.write_table(table(), max_chunksize=3)
    with tarfile.open(folder / "a.tar", "w") as archive:
        for i, data in enumerate(FILES):
            for name, content in ((f"{i}.png", data), (f"{i}.json", b'{"label": "a"}')):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.tar"])
def test_cut_off_files(made: Path, tmp_path: Path, name: str) -> None:
    data = (made / name).read_bytes().rstrip(b"\0")
    assert read(made / name) == 8
    path = tmp_path / name
    for share in (0.05, 0.3, 0.6, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(DataError, match=r"a\.\w+"):
            read(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.tar"])
def test_damaged_files(made: Path, tmp_path: Path, name: str) -> None:
    """Refused or read, but nothing else happens."""
    whole = (made / name).read_bytes()
    for seed in range(60):
        random, data = Random(seed), bytearray(whole)
        for _ in range(random.choice([1, 3, 20])):
            data[random.randrange(len(data))] = random.randrange(256)
        path = tmp_path / name
        path.write_bytes(data)
        with contextlib.suppress(DataError):
            read(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.tar", "a.csv", "a.tsv", "a.jsonl"])
def test_something_else(tmp_path: Path, name: str) -> None:
    for data in (b"", FILES[0], b"PK\3\4" + bytes(2000), b"PAR1" + bytes(40) + b"PAR1"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            read(tmp_path / name)


def test_rows_of_impossible_size(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [bytes(3 * MIB)]}), path)
    assert path.stat().st_size < MIB
    with pytest.raises(DataError, match=r"3 MiB in 1 rows.*--max-file-size"):
        read(path, Options(max_file_bytes=2 * MIB))
    # One large row among small ones.
    pq.write_table(pa.table({"image": [*FILES, bytes(3 * MIB)]}), path)
    with pytest.raises(DataError, match=r"row 8 has 3 MiB.*--max-file-size"):
        read(path, Options(max_file_bytes=2 * MIB))


def test_names_of_classes_that_are_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.data.sources.base.CLASSES", 100)
    path = tmp_path / "a.csv"
    path.write_text("file,label\n" + "".join(f"a.png,caption {i}\n" for i in range(101)))
    with pytest.raises(DataError, match="no classes; choose others"):
        read(path)


def headers(kind: bytes) -> Iterator[bytes]:
    """A tar file with a header that says that its own continuation has 4 GiB."""
    entry = tarfile.TarInfo("x")
    entry.size, entry.type = 4 * 2**30, kind
    yield entry.tobuf(tarfile.GNU_FORMAT)
    yield bytes(4096)


def test_tar_files_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        path.write_bytes(b"".join(headers(kind)))
        with pytest.raises(DataError, match="a header of over"):
            read(path)
    entry = tarfile.TarInfo("a.png")
    entry.size = 300 * MIB
    with open(path, "wb") as file:
        file.write(entry.tobuf())
        file.truncate(302 * MIB)  # takes no space on the disk
    with pytest.raises(DataError, match="--max-file-size"):
        read(path)


def test_paths_out_of_a_folder_of_datasets(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    shutil.copy(made / "a.arrow", tmp_path / "out.arrow")
    shutil.copy(made / "a.arrow", folder / "in.arrow")
    for name in ("../out.arrow", str(tmp_path / "out.arrow"), "..", 3, None):
        state = {"_data_files": [{"filename": name}]}
        (folder / "state.json").write_text(json.dumps(state))
        with pytest.raises(DataError, match=r"state\.json: should name"):
            read(folder)
    (folder / "state.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="nested"):
        read(folder)
    (folder / "dataset_dict.json").write_text('{"splits": ["../x"]}')
    with pytest.raises(DataError, match="names of splits"):
        read(folder)
    (folder / "dataset_dict.json").unlink()
    state = {"_data_files": [{"filename": "in.arrow"}]}
    (folder / "state.json").write_text(
        json.dumps(state | {"_indices_data_files": [{"filename": "i"}]})
    )
    with pytest.raises(DataError, match="flatten_indices"):
        read(folder)
