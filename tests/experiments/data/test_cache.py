import pytest
from formats import cifar10, gzipped, tar_gz, zipped

from experiments.data import AlteredDataError, MissingDataError, data_root
from experiments.data.cache import data_folders, read_files
from experiments.data.catalogue import DATA_SETS


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_root() == tmp_path / ".cache" / "pydeq"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert data_root() == tmp_path / ".cache" / "pydeq"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data_root() == tmp_path / "xdg" / "pydeq"
    monkeypatch.setenv("PYDEQ_DATA", "~/named")
    assert data_root() == tmp_path / "named"
    assert data_root("~/given") == tmp_path / "given"


def test_a_missing_file_says_where_it_was_looked_for_and_how_to_get_it(tmp_path):
    data = DATA_SETS["cifar10"]
    with pytest.raises(MissingDataError) as caught:
        read_files(data, ["data_batch_1.bin", "test_batch.bin"], tmp_path)
    message = str(caught.value)
    assert "Expected data_batch_1.bin, test_batch.bin, or cifar-10-binary.tar.gz, in one of" in message
    for folder in data_folders(data, tmp_path):
        assert f"\n    {folder}\n" in message
    assert "python -m experiments data get cifar10" in message
    assert "PYDEQ_DATA" in message
    assert isinstance(caught.value, FileNotFoundError)


def test_only_what_is_missing_is_named(publish, write, cache):
    _, contents = cifar10()
    data = publish("cifar10", contents)
    write(cache / "cifar10", {"data_batch_1.bin": contents["data_batch_1.bin"]})
    with pytest.raises(MissingDataError, match=r"Expected data_batch_2\.bin, test_batch\.bin, or cifar-10-binary"):
        read_files(data, ["data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"])


def test_without_a_package_the_site_is_named():
    with pytest.raises(MissingDataError, match=r"No package is known.*published with Merity et al"):
        read_files(DATA_SETS["wikitext103"], ["wiki.train.tokens"])


@pytest.mark.parametrize("form", ["file", "compressed", "archive"])
def test_an_altered_file_is_refused_with_both_sums(publish, write, cache, form):
    content, other = b"what was published", b"What was published"
    if form == "file":
        data, name, put = publish("wikitext103", {"wiki.train.tokens": content}), "wiki.train.tokens", other
    elif form == "compressed":
        packed = gzipped(content)
        data = publish("wikitext103", {"wiki.train.tokens": content}, {"wiki.train.tokens": packed})
        name, put = "wiki.train.tokens.gz", gzipped(other)
        assert len(put) == len(packed)
    else:
        archive = zipped({"wikitext-103/wiki.train.tokens": content})
        data = publish("wikitext103", {"wiki.train.tokens": content}, archives={"wikitext-103-v1.zip": archive})
        name, put = "wikitext-103-v1.zip", zipped({"wikitext-103/wiki.train.tokens": other})
    write(cache / "wikitext103", {name: put})
    with pytest.raises(AlteredDataError) as caught:
        read_files(data, ["wiki.train.tokens"])
    expected = {file.name: file for file in (*data.files, *dict(data.packed).values(), *data.archives)}[name]
    message = str(caught.value)
    assert message.startswith(f"{cache / 'wikitext103' / name} is not {name} as published: its sha256 is ")
    assert message.endswith(f", expected {expected.sha256}")
    assert message.count(expected.sha256) == 1


def test_a_file_of_another_size_is_refused(publish, write, cache):
    data = publish("wikitext103", {"wiki.train.tokens": b"abc"})
    write(cache / "wikitext103", {"wiki.train.tokens": b"ab"})
    with pytest.raises(AlteredDataError, match=r"wiki.train.tokens has 2 bytes, expected 3"):
        read_files(data, ["wiki.train.tokens"])


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_archives_are_read_for_what_is_asked_for(publish, write, cache, kind):
    contents = {"a": b"1", "b": b"22", "c": b"333"}
    name, top, archived, make = {
        "zip": ("wikitext103", "wikitext-103", "wikitext-103-v1.zip", zipped),
        "tar.gz": ("cifar10", "cifar-10-batches-bin", "cifar-10-binary.tar.gz", tar_gz),
    }[kind]
    archive = make({f"{top}/{file}": content for file, content in contents.items()} | {"a": b"not this one"})
    data = publish(name, contents, archives={archived: archive})
    write(cache, {archived: archive})
    assert read_files(data, ["c", "a"]) == {"c": b"333", "a": b"1"}
    assert sorted(path.name for path in cache.iterdir()) == [archived]


@pytest.mark.parametrize("members", [{}, {"wikitext-103/a": b"other"}])
def test_archives_without_the_file_or_with_another_are_refused(publish, write, cache, members):
    archive = zipped(members)
    data = publish("wikitext103", {"a": b"1"}, archives={"wikitext-103-v1.zip": archive})
    write(cache, {"wikitext-103-v1.zip": archive})
    with pytest.raises(AlteredDataError, match=r"wikitext-103-v1\.zip"):
        read_files(data, ["a"])


def test_a_folder_that_is_named_is_the_only_one_searched(publish, write, cache, tmp_path, monkeypatch):
    data = publish("wikitext103", {"a": b"1"}, installed=(tmp_path / "installed",))
    write(tmp_path / "installed", {"a": b"1"})
    assert read_files(data, ["a"]) == {"a": b"1"}
    with pytest.raises(MissingDataError):
        read_files(data, ["a"], tmp_path / "elsewhere")
    write(cache / "wikitext103", {"a": b"1"})
    monkeypatch.setenv("PYDEQ_DATA", str(tmp_path / "named"))
    write(tmp_path / "named" / "wikitext103", {"a": b"2"})
    # What is named is what is read, however wrong.
    with pytest.raises(AlteredDataError, match="named"):
        read_files(data, ["a"])


def test_the_catalogue_pins_every_file_but_those_without_a_published_sum():
    unpinned = {file.name for data in DATA_SETS.values() for file in data.files if not (file.sha256 and file.size)}
    assert unpinned == {"wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"}
    for data in DATA_SETS.values():
        pinned = (*data.files, *dict(data.packed).values(), *data.archives)
        assert len({file.name for file in pinned}) == len(pinned)
        assert all(len(file.sha256) in (0, 64) for file in pinned)
        assert all(archive.sha256 for archive in data.archives)


def test_what_a_compressed_file_holds_is_checked_too(publish, write, cache):
    packed = gzipped(b"something else")
    data = publish("wikitext103", {"wiki.train.tokens": b"what was published"}, {"wiki.train.tokens": packed})
    write(cache / "wikitext103", {"wiki.train.tokens.gz": packed})
    with pytest.raises(AlteredDataError, match=r"tokens\.gz, uncompressed, has 14 bytes, expected 18"):
        read_files(data, ["wiki.train.tokens"])
