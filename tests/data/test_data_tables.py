"""Parquet files, folders of Hugging Face `datasets`, WebDataset shards and lists of files."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from data_files import last, random_images, write_folder
from PIL import Image
from typer.testing import CliRunner

from tessera.cli import app
from tessera.data.convert import convert_images
from tessera.data.dataset import open_dataset
from tessera.data.sources import Options, open_source
from tessera.data.survey import survey
from tessera.errors import DataError
from tessera.images import png_bytes

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

IMAGES = random_images(6)
FILES = [png_bytes(last(image)) for image in IMAGES]
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def contents(path, **options):
    """Source, labels, and images as [N, C, H, W] (loaded while it is open)."""
    with open_source(path, Options(**options)) as source:
        records = list(source.records)
        assert len(records) == source.count
        images = np.stack([record.load() for record in records]).transpose(0, 3, 1, 2)
        return source, [record.label for record in records], images


def refused(path, message, **options):
    def read():
        with open_source(path, Options(**options)) as source:
            for record in source.records:
                record.load()

    with pytest.raises(DataError, match=message) as caught:
        read()
    return str(caught.value)


def hf_table(files=FILES, labels=(1, 0, 1, 2, 0, 2), names=("cat", "dog", "owl"), **more):
    images = pa.array([{"bytes": data, "path": None} for data in files], HF_IMAGE)
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64()), **more})
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(names), "_type": "ClassLabel"},
    }
    info = json.dumps({"info": {"features": features}})
    return table.replace_schema_metadata({"huggingface": info})


def write_parquet(path, table, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def write_saved(path, table, files=2):
    """As `Dataset.save_to_disk` does."""
    path.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    rows = -(-len(table) // files)
    for i, name in enumerate(names):
        with pa.ipc.new_stream(path / name, table.schema) as writer:
            writer.write_table(table.slice(i * rows, rows), max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_indices_data_files": None}
    (path / "state.json").write_text(json.dumps(state))
    info = json.loads((table.schema.metadata or {}).get(b"huggingface", b'{"info": {}}'))["info"]
    (path / "dataset_info.json").write_text(json.dumps(info))
    return path


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if content is entry else content
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


# ------------------------------------------------------------------------------------------- tables


def test_parquet_of_the_hub(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", hf_table(), row_group_size=4)
    source, labels, images = contents(path)
    assert (source.kind, source.class_names) == ("parquet", ("cat", "dog", "owl"))
    assert labels == [1, 0, 1, 2, 0, 2]
    np.testing.assert_array_equal(images, IMAGES)


def test_folders_of_parquet_have_splits(tmp_path):
    for part in range(2):
        table = hf_table().slice(2 * part, 2)
        write_parquet(tmp_path / f"a/data/train-{part:05d}-of-00002.parquet", table)
    np.testing.assert_array_equal(contents(tmp_path / "a")[2], IMAGES[:4])
    write_parquet(tmp_path / "a/data/test-00000-of-00001-3f2a.parquet", hf_table().slice(4))
    assert "test, train" in refused(tmp_path / "a", "several could be the split")
    refused(tmp_path / "a", "no split 'dev'; there are: test, train", split="dev")
    np.testing.assert_array_equal(contents(tmp_path / "a", split="test")[2], IMAGES[4:])
    write_parquet(tmp_path / "b/train/0000.parquet", hf_table())
    write_parquet(tmp_path / "b/validation/0000.parquet", hf_table().slice(5))
    np.testing.assert_array_equal(contents(tmp_path / "b", split="validation")[2], IMAGES[5:])


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        (pa.array(["b", "a", None]), [1, 0, None], ("a", "b")),
        (pa.array(["b", "a", "b"]).dictionary_encode(), [1, 0, 1], ("a", "b")),
        (pa.array([3, -1, 0], pa.int16()), [3, None, 0], None),
        (pa.array([True, False, True]), [1, 0, 1], None),
    ],
    ids=["names", "dictionary", "numbers", "truths"],
)
def test_plain_bytes_and_types_of_labels(tmp_path, labels, expected, names):
    table = pa.table({"img": pa.array(FILES[:3], pa.large_binary()), "label": labels})
    source, found, images = contents(write_parquet(tmp_path / "a.parquet", table))
    assert (found, source.class_names) == (expected, names)
    np.testing.assert_array_equal(images, IMAGES[:3])


def test_columns_are_chosen(tmp_path):
    binary, text = pa.array(FILES, pa.binary()), pa.array(list("ababab"))
    table = pa.table({"left": binary, "right": binary, "label": text, "class": text})
    table = table.append_column("x", [[0.5] * 6])
    path = write_parquet(tmp_path / "a.parquet", table)
    refused(path, "several could be the image column: left, right; .*image_column=NAME")
    refused(path, "several could be the label column: label, class", image_column="left")
    refused(path, "no image column 'mid'; there are: left, right", image_column="mid")
    refused(path, "column 'x' is of the type double; images are", image_column="x")
    options = {"image_column": "right", "label_column": "class"}
    assert contents(path, **options)[1] == [0, 1, 0, 1, 0, 1]
    refused(path, "column 'x' is of the type double; labels", **options | {"label_column": "x"})
    assert contents(path, **options | {"label_column": "none"})[1] == [None] * 6
    path = write_parquet(tmp_path / "b.parquet", pa.table({"x": [0.5], "text": ["a"]}))
    refused(path, r"no column of image files .*x \(double\), text \(string\)")


def test_saved_datasets(tmp_path):
    path = write_saved(tmp_path / "one", hf_table())
    source, labels, images = contents(path)
    assert source.class_names == ("cat", "dog", "owl")
    assert labels == [1, 0, 1, 2, 0, 2]
    np.testing.assert_array_equal(images, IMAGES)
    refused(path, "no split 'train'", split="train")
    for name in ("train", "test"):
        write_saved(tmp_path / "many" / name, hf_table().slice(0 if name == "train" else 4))
    (tmp_path / "many" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    refused(tmp_path / "many", "several could be the split: train, test")
    np.testing.assert_array_equal(contents(tmp_path / "many", split="test")[2], IMAGES[4:])
    np.testing.assert_array_equal(contents(path / "data-00001-of-00002.arrow")[2], IMAGES[3:])


def test_saved_datasets_without_metadata_in_the_schema(tmp_path):
    path = write_saved(tmp_path / "a", hf_table())
    bare = hf_table().replace_schema_metadata(None)
    for i in range(2):
        with pa.ipc.new_stream(path / f"data-{i:05d}-of-00002.arrow", bare.schema) as writer:
            writer.write_table(bare.slice(3 * i, 3))
    assert contents(path)[0].class_names == ("cat", "dog", "owl")


def test_conversion_of_a_table_is_that_of_its_files(tmp_path):
    turned = Image.fromarray(last(IMAGES[0])[:, :6])
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    turned.save(stream, "PNG", exif=exif)
    files = [stream.getvalue(), *FILES[1:5], b"junk"]
    write_parquet(tmp_path / "a.parquet", hf_table([*files[:5], None], (0,) * 6))
    write_folder(tmp_path / "a", {f"{i}.png": data for i, data in enumerate(files)})
    for name in ("a.parquet", "a"):
        report = convert_images(
            tmp_path / name, tmp_path / f"{name}.safetensors", resolution=(8, 8), skip_bad=True
        )
        assert (report.count, len(report.bad)) == (5, 1)
    np.testing.assert_array_equal(
        open_dataset(tmp_path / "a.parquet.safetensors").read(np.arange(5)),
        open_dataset(tmp_path / "a.safetensors").read(np.arange(5)),
    )


def test_command_names_its_options(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", hf_table(x=pa.array(FILES, pa.binary())))
    arguments = ["data", "convert", str(path), str(tmp_path / "a.zip")]
    wrong = CliRunner().invoke(app, [*arguments, "--image-column", "y"])
    assert "there are: image, x" in str(wrong.exception)
    table = pa.table({"a": pa.array(FILES, pa.binary()), "b": pa.array(FILES, pa.binary())})
    write_parquet(tmp_path / "b.parquet", table)
    wrong = CliRunner().invoke(app, ["data", "convert", str(tmp_path / "b.parquet"), "x.zip"])
    assert "choose with --image-column NAME" in str(wrong.exception)
    wrong = CliRunner().invoke(app, ["data", "convert", str(tmp_path / "a"), "x.zip"])
    (tmp_path / "photos").mkdir()
    arguments = ["data", "convert", str(tmp_path / "photos"), "x.zip", "--split", "train"]
    assert "--split is not for this kind" in str(CliRunner().invoke(app, arguments).exception)
    arguments = ["data", "convert", str(path), str(tmp_path / "a.zip"), "--label-column", "none"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert open_dataset(tmp_path / "a.zip").labels is None


# ------------------------------------------------------------------------------------------- shards


def test_shards(tmp_path):
    for shard in range(2):
        files = {}
        for i in range(3 * shard, 3 * shard + 3):
            files |= {f"./{i:04d}.PNG": FILES[i], f"./{i:04d}.cls": f"{i % 2}\n".encode()}
        write_tar(tmp_path / f"p-{shard:03d}.tar", files)
    source, labels, images = contents(tmp_path / "p-{000..001}.tar")
    assert (source.kind, source.name) == ("WebDataset shards", "p")
    assert labels == [0, 1, 0, 1, 0, 1]
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(contents(tmp_path)[2], IMAGES)
    np.testing.assert_array_equal(contents(tmp_path / "p-001.tar")[2], IMAGES[3:])
    refused(tmp_path / "p-{000..002}.tar", r"p-002\.tar: no such file")
    refused(tmp_path / "p-{2..1}.tar", "should rise")


def test_labels_and_images_of_shards_are_chosen(tmp_path):
    files = {}
    for i in range(3):
        words = {"class": "ba"[i % 2], "kind": i}
        files |= {f"{i}.json": json.dumps(words).encode(), f"{i}.l.png": FILES[i]}
        files |= {f"{i}.r.png": FILES[i + 3], f"{i}.txt": b"a caption"}
    path = write_tar(tmp_path / "a.tar", files)
    refused(path, "image of sample 0: l.png, r.png")
    source, labels, images = contents(path, image_column="r.png")
    assert (labels, source.class_names) == ([1, 0, 1], ("a", "b"))
    np.testing.assert_array_equal(images, IMAGES[3:])
    assert contents(path, image_column="l.png", label_column="kind")[1] == [0, 1, 2]
    refused(path, "no sample has a label 'x'", image_column="l.png", label_column="x")


def test_what_is_no_sample_is_ignored(tmp_path):
    entries = {"a.png": FILES[0], "/b.png": FILES[1], "../c.png": FILES[2], "d.json": b"{}"}
    for name, kind in (("e.png", tarfile.SYMTYPE), ("f.png", tarfile.LNKTYPE), ("g.png", b"3")):
        entries[name] = tarfile.TarInfo(name)
        entries[name].type, entries[name].linkname = kind, "/etc/passwd"
    source, _, images = contents(write_tar(tmp_path / "a.tar", entries))
    np.testing.assert_array_equal(images, IMAGES[:1])
    names = [name.removeprefix(f"{tmp_path}/a.tar: ") for name in source.ignored]
    assert names == ["/b.png", "../c.png", "e.png", "f.png", "g.png", "d"]


def test_an_archive_among_images_is_not_what_is_read(tmp_path):
    write_folder(tmp_path / "a", {"x/1.png": FILES[0], "a.tar": b"", "b.parquet": b""})
    assert contents(tmp_path / "a")[0].kind == "image folder"


# -------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "file,label\nx/0.png,1\n\nx/1.png,0\n"),
        ("a.csv", "\ufefflabel;split;file_name\n1;train;x/0.png\n0;test;x/1.png\n"),
        ("a.tsv", 'image\tclass\n"x/0.png"\t1\nx\\1.png\t0\n'),
        ("a.jsonl", '{"path": "x/0.png", "label": 1}\n{"label": 0, "path": "x/1.png"}'),
    ],
)
def test_lists(tmp_path, name, text):
    write_folder(tmp_path, {f"x/{i}.png": FILES[i] for i in range(2)})
    (tmp_path / name).write_text(text, encoding="utf-8")
    source, labels, images = contents(tmp_path / name)
    assert (source.kind, labels, source.class_names) == ("list of files", [1, 0], None)
    np.testing.assert_array_equal(images, IMAGES[:2])


def test_names_of_classes_in_lists(tmp_path):
    write_folder(tmp_path, {f"{i}.png": FILES[i] for i in range(3)})
    path = tmp_path / "a.csv"
    path.write_text("file,label,other\n0.png,dog,1\n1.png,7,2\n2.png,,3\n")
    source, labels, _ = contents(path)
    assert (labels, source.class_names) == ([1, 0, None], ("7", "dog"))
    assert contents(path, label_column="other")[1] == [1, 2, 3]
    assert contents(path, label_column="none")[1] == [None] * 3


def test_wrong_lists(tmp_path):
    write_folder(tmp_path / "in", {"a.png": FILES[0]})
    write_folder(tmp_path, {"out.png": FILES[0]})
    path = tmp_path / "in" / "a.csv"
    for text, message in (
        ("file,label\na.png,0\nb.png,0\n", r"line 3: b\.png: cannot be read \(No such file"),
        ("file,label\n../out.png,0\n", r"line 2: \.\./out\.png lies outside"),
        (f"file,label\n{tmp_path}/out.png,0\n", "lies outside"),
        ("a.png,0\nb.png,1\n", r"no column of files.*There are: a\.png, 0"),
        ("file,path\na.png,a.png\n", "several could be the column of files: file, path"),
        ("file,label\na.png\n", "line 2: 1 columns, and the header has 2"),
        ("file,label\n,1\n", "line 2: no name of a file"),
        ("file,label\na.png," + "9" * 10, "no classes"),
        ("file,label\n" + "x" * 2**20, "a line of over"),
        ("", "no column of files"),
        ("file\n.\n", "not an ordinary file"),
        ("file\na\0.png\n", r"line 2"),
    ):
        path.write_text(text)
        refused(path, message)
    path.write_text(f"file\n{tmp_path}/in/a.png\n")
    np.testing.assert_array_equal(contents(path)[2], IMAGES[:1])
    path.write_bytes(b"file\n\xff\xfe.png\n")
    refused(path, "UTF-8")
    path.with_suffix(".jsonl").write_text("[1]")
    refused(path.with_suffix(".jsonl"), "line 1: should be an object")


# --------------------------------------------------------------------- looked at without converting


def inspected(*words):
    arguments = ["data", "inspect", *map(str, words)]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def kinds_of_collections(folder):
    """The same six images in three classes, as each kind keeps them."""
    files = {f"{i}.png": data for i, data in enumerate(FILES)}
    labels = (1, 0, 1, 2, 0, 2)
    listed = "".join(f"{i}.png,{label}\n" for i, label in enumerate(labels))
    write_folder(folder / "listed", files)
    (folder / "listed/a.csv").write_text(f"file,label\n{listed}")
    shards = dict(files)
    for i, label in enumerate(labels):
        shards[f"{i}.cls"] = str(label).encode()
    return {
        "parquet": write_parquet(folder / "a.parquet", hf_table()),
        "saved": write_saved(folder / "saved", hf_table()),
        "shards": write_tar(folder / "a-000.tar", dict(sorted(shards.items()))),
        "listed": folder / "listed/a.csv",
    }


@pytest.mark.parametrize("kind", ["parquet", "saved", "shards", "listed"])
def test_what_is_not_converted_is_looked_at_as_it_is(tmp_path, kind):
    path, out = kinds_of_collections(tmp_path)[kind], tmp_path / "grid.png"
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    text = inspected(path, "--out", out, "--columns", 3)
    for words in ("not converted", "8x8 (6)", "RGB (6)", "3 classes", "33.3%"):
        assert words in text
    mean = " ".join(f"{value:7.2f}" for value in IMAGES.mean((0, 2, 3)))
    assert mean in text
    assert Image.open(out).height == 3 * 66 - 2
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert set(tmp_path.rglob("*")) - {out} >= before.keys()


def test_images_of_many_sizes_and_modes_are_counted(tmp_path):
    big = np.full((30, 40), 255, np.uint8)
    files = [*FILES, png_bytes(big), png_bytes(big), b"no image"]
    table = hf_table(files, (0, 1, None, 0, 1, 0, 1, 0, 1), ("cat", "dog"))
    path = write_parquet(tmp_path / "a.parquet", table)
    with pytest.raises(DataError, match="image"):
        survey(path)
    found = survey(path, skip_bad=True, columns=2)
    assert found.sizes == (((8, 8), 6), ((40, 30), 2))
    assert found.channels == ((1, 2), (3, 6))
    assert found.mean == ()
    assert [(c.index, c.name, c.count) for c in found.classes] == [(0, "cat", 4), (1, "dog", 3)]
    assert (found.count, found.unlabelled, len(found.skipped)) == (8, 1, 1)
    assert found.picture.shape[0] == 2 * 66 - 2
    np.testing.assert_array_equal(found.picture, survey(path, skip_bad=True, columns=2).picture)
    assert survey(path, skip_bad=True, max_images=3).count <= 3


def test_columns_and_splits_of_what_is_looked_at(tmp_path):
    binary = pa.array(FILES, pa.binary())
    path = write_parquet(tmp_path / "a.parquet", pa.table({"left": binary, "right": binary}))
    with pytest.raises(DataError, match="choose with --image-column NAME"):
        inspected(path)
    text = inspected(path, "--image-column", "left", "--out", tmp_path / "a.png")
    assert "none" in text
    assert Image.open(tmp_path / "a.png").size == (10 * 66 - 2, 64)
    folder = write_folder(tmp_path / "photos", {"a.png": FILES[0]})
    with pytest.raises(DataError, match="those of tables"):
        inspected(folder, "--split", "train")
